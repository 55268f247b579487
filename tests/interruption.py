"""Commands that are killed at random moments and run again, against the same commands left alone.

A moment is drawn evenly from the time between the first sign of work (the folder beside the output) and the end.
Processes are forked from a server that has imported torch, since most of a short command is that import.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path

CUT_OFF_AFTER = 300.0
POLL = 0.002


@dataclass(frozen=True)
class Command:
    """A long command: its arguments without the output, and the output's name."""

    arguments: tuple[str, ...]
    output: str

    def start(self, folder: Path) -> Process:
        """Run it in `folder`, with a cache folder of its own; what it says goes to the file `stderr` there."""
        process = _forks.Process(target=_run, args=([*self.arguments, "-o", self.output], str(folder)))
        process.start()
        return process

    def result(self, folder: Path) -> bytes:
        """The output's bytes; of figures all but the timings, which no two runs share."""
        data = (folder / self.output).read_bytes()
        if not self.output.endswith(".csv"):
            return data
        rows = csv.DictReader(io.StringIO(data.decode()))
        return "\n".join(str(row) for row in rows if row["protocol"] != "time").encode()


@dataclass(frozen=True)
class Outcome:
    """What a command that was stopped left behind, and what running it again made of it."""

    stopped: bool  # False where it ended before its moment came
    resumed: bool  # it said that it went on with saved work
    result: bytes
    leftovers: tuple[str, ...]


def finish(command: Command, folder: Path) -> tuple[bytes, float]:
    """Run a command to its end: its result, and the seconds from the first sign of work on."""
    process = command.start(folder)
    began = _wait_for_work(process, folder / f"{command.output}.partial")
    process.join(CUT_OFF_AFTER)
    assert process.exitcode == 0, (folder / "stderr").read_text()
    return command.result(folder), time.monotonic() - began


def interrupt(command: Command, folder: Path, moment: float) -> Outcome:
    """Kill a command `moment` seconds after its first sign of work, then run it again to its end."""
    process = command.start(folder)
    _wait_for_work(process, folder / f"{command.output}.partial")
    process.join(moment)
    process.kill()
    process.join(CUT_OFF_AFTER)
    stopped = process.exitcode != 0
    if not (folder / command.output).exists():  # else it was killed between publishing and clearing up
        again = command.start(folder)
        again.join(CUT_OFF_AFTER)
        assert again.exitcode == 0, (folder / "stderr").read_text()
    stderr = (folder / "stderr").read_text()
    found = {path.name for path in folder.iterdir()} - {command.output, "cache", "stderr"}
    return Outcome(stopped, "going on with" in stderr, command.result(folder), tuple(sorted(found)))


def moments(seed: int, span: float) -> Iterator[float]:
    """Random moments, in seconds."""
    generator = random.Random(seed)
    while True:
        yield generator.uniform(0, span)


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "turboesm_cli.app",
        "turboesm_cli.codec.calibration",
        "turboesm_cli.evaluation.accuracy",
        "turboesm_cli.cache.cache_file",
        "torch._dynamo",
    ]
)


def _run(arguments: list[str], folder: str) -> None:
    os.chdir(folder)
    os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
    said = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = ["turboesm", *arguments]
    from turboesm_cli.app import main

    main()


def _wait_for_work(process: Process, partial: Path) -> float:
    end = time.monotonic() + CUT_OFF_AFTER
    while not partial.exists() and process.exitcode is None and time.monotonic() < end:
        time.sleep(POLL)
    return time.monotonic()
