"""`--gpus`: one process a GPU, each on its shard of the input, and one output.

A worker is the same command with `--shard I/N`; its output and its work lie in OUT.gpus until all are joined. One
that dies is started again, and goes on from its work.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from turboesm_cli import console
from turboesm_cli.errors import DeviceError, TurboESMError
from turboesm_cli.outputs.locks import locked, remove_folder

ALL = "all"
TRIES = 4
"""Starts of a worker that dies, at most."""
DIED = 1
"""Exit code of what is no mistake of the user's, such as a fault of a GPU; signals are below 0."""
POLL = 0.1
_PARENT_DIES = 1  # of prctl: PR_SET_PDEATHSIG


def _number(text: str) -> str:
    if text != ALL and not (text.isascii() and text.isdigit() and 1 <= int(text) <= 64):
        raise typer.BadParameter(f"{text!r} is not all, nor a number of GPUs from 1 to 64")
    return text


Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        callback=lambda text: None if text is None else _number(text),
        metavar="all|N",
        help="Spread the work over GPUs of this host, a process each; with --device cpu over N processes.",
        show_default=False,
    ),
]


class WorkerError(TurboESMError):
    """What a worker ended with: its words and its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def is_spread(ctx: Any) -> bool:
    """Whether a command is to be spread; not where its output is there and may be left alone."""
    output = ctx.params.get("output")
    skipped = output is not None and Path(output).exists() and ctx.params.get("if_done") == "skip"
    return ctx.params.get("gpus") is not None and not skipped


def spread(ctx: Any) -> None:
    """Run a command on several devices at once: the same output. Raises TurboESMError."""
    from turboesm_cli.commands.merge import merge

    given = ctx.params
    output = _checked(given)
    devices = _devices(given["gpus"], given["device"])
    folder = output.with_name(f"{output.name}.gpus")
    lock = folder / "lock"
    with locked(lock, folder):
        if given["force"]:
            _clear(folder)
        parts = [folder / f"part-{index}-of-{len(devices)}" for index in range(len(devices))]
        workers = [
            Worker(_command(ctx, f"{index}/{len(devices)}", part, device), part)
            for index, (part, device) in enumerate(zip(parts, devices, strict=True))
        ]
        try:
            run(workers)
        except BaseException:
            if not list(folder.glob("part-*")):
                remove_folder(folder, lock)
            raise
        merge(output, parts, any_device=True, force=given["force"], if_done=given["if_done"])
        remove_folder(folder, lock)


def _checked(given: Mapping[str, Any]) -> Path:
    """The output. Raises BadParameter for what does not go with several processes, OutputError as `Kept`."""
    from turboesm_cli.commands.options import Kept

    for name in ("shard", "json", "plan", "max_error", "max_kl"):
        if given.get(name) not in (None, False):
            raise typer.BadParameter(
                "does not go with --gpus; leave one out", param_hint=f"--{name.replace('_', '-')}"
            )
    if given["output"] is None:
        raise typer.BadParameter("goes with an output: name one with -o", param_hint="--gpus")
    if "-" in (given.get("fasta"), given.get("source")):
        raise typer.BadParameter("each process reads the input: name a file, not -", param_hint="--gpus")
    output = Path(given["output"])
    Kept(output, given["force"], given["if_done"], False)
    return output


def _clear(folder: Path) -> None:
    """Remove what workers have left."""
    for path in folder.glob("part-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _devices(gpus: str, device: str) -> list[str]:
    """The device of each worker. Raises DeviceError where there are not so many."""
    if device == "cpu":
        if gpus == ALL:
            raise typer.BadParameter("with --device cpu name a number of processes", param_hint="--gpus")
        return ["cpu"] * int(gpus)
    if device not in ("auto", "cuda"):
        raise typer.BadParameter("does not go with --gpus; leave one out", param_hint="--device")
    import torch

    there = torch.cuda.device_count()
    wanted = there if gpus == ALL else int(gpus)
    if not 1 <= wanted <= there:
        raise DeviceError(f"--gpus {gpus}: {there} GPUs can be used here; name as many, or leave it out")
    return [f"cuda:{index}" for index in range(wanted)]


_OWN = ("gpus", "output", "device", "force", "if_done", "shard", "json")
"""Options that a worker is not given as they are."""


def _command(ctx: Any, shard: str, part: Path, device: str) -> list[str]:
    """A worker's command line: what the user gave, on a shard and a device."""
    log = ctx.parent.params.get("log") if ctx.parent else None
    words = [sys.executable, "-m", "turboesm_cli.app", *([f"--log={log}"] if log else []), ctx.command.name]
    words += [word for parameter in ctx.command.params for word in _words(ctx, parameter)]
    return [*words, "--shard", shard, "-o", str(part), "--device", device, "--if-done", "skip"]


def _words(ctx: Any, parameter: Any) -> Iterator[str]:
    """A parameter as it is written on a command line; nothing where the user did not give it."""
    source, value = ctx.get_parameter_source(parameter.name), ctx.params.get(parameter.name)
    if parameter.name in _OWN or value is None or source is None or source.name.startswith("DEFAULT"):
        return
    if parameter.param_type_name == "argument":
        yield str(value)
    elif value is True:
        yield parameter.opts[0]
    elif value is not False:
        yield f"{parameter.opts[0]}={value.value if isinstance(value, Enum) else value}"


@dataclass
class Worker:
    """A process that works on a shard, and what it says."""

    command: Sequence[str]
    output: Path
    starts: int = 0
    said: list[str] = field(default_factory=list)
    label: str = ""
    done: int = 0
    total: int = 0
    left: int | None = None
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        self.starts += 1
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", preexec_fn=_end_with_parent,
        )  # fmt: skip
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if found := console.Pace.read(line):
                self.label, self.done, self.total, self.left = found
            elif line.strip():
                self.said.append(line.strip())
                del self.said[:-100]

    @property
    def ended(self) -> bool:
        """Whether it has done its work; started again where it died. Raises WorkerError for what is no use."""
        assert self.process is not None
        code = self.process.poll()
        if code is None or code == 0:
            return code == 0
        time.sleep(POLL)  # for its last words
        words = self.said[-1].removeprefix("error: ") if self.said else "it said nothing"
        if (code < 0 or code == DIED) and self.starts < TRIES:
            console.warn(f"the worker of {self.output.name} died ({code}: {words}); it is started again")
            self.start()
            return False
        raise WorkerError(f"the worker of {self.output.name}: {words}", code if code > 0 else DIED)

    def stop(self) -> None:
        """Have it save its work, and wait for its end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()


def _end_with_parent() -> None:
    """In the worker: it is told to save its work when its parent is gone, however that ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGTERM)


def run(workers: Sequence[Worker]) -> None:
    """Run workers to their ends, with one line of progress for all. Raises WorkerError where one cannot end."""
    console.say(f"{len(workers)} processes work on their shards; this one joins what they write")
    begun = last = time.monotonic()
    try:
        for worker in workers:
            worker.start()
        while [worker for worker in workers if not worker.ended]:
            time.sleep(POLL)
            if time.monotonic() - last >= console.SECONDS_BETWEEN_LOG_LINES and any(w.total for w in workers):
                last = time.monotonic()
                console.say(progress_line(workers, last - begun))
    except BaseException as error:
        for worker in workers:
            worker.stop()
        if not isinstance(error, WorkerError):
            error.add_note("the processes have saved their work; run the same command again to go on")
        raise
    for line in workers[0].said:
        if line.startswith("warning: "):  # of the input, which all have read
            console.warn(line.removeprefix("warning: "))


def progress_line(workers: Sequence[Worker], seconds: float) -> str:
    """How far those are that do the same as the first of whom something is known."""
    label = next(worker.label for worker in workers if worker.label)
    same = [worker for worker in workers if worker.label == label]
    done, total = sum(worker.done for worker in same), sum(worker.total for worker in same)
    who = f"{len(workers)} processes" if len(same) == len(workers) else f"{len(same)} of {len(workers)} processes"
    known = [worker.left for worker in same if worker.left is not None]
    left = f", about {max(known)} s left" if len(known) == len(workers) and max(known) else ""
    return f"{label}: {done} of {total} in {who}, {seconds:.0f} s{left}"
