"""Two trials of a cluster's work on one machine, by hand: what shards cost, and whether faults harm anything.

    python tests/cluster_trial.py costs --proteins 100000 --shards 8
    python tests/cluster_trial.py faults --faults 20        (as root: it mounts a small file system of its own)
    python tests/cluster_trial.py faults --command quantize

Both make a tiny model and short random proteins, and print a line of JSON for each step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
COMMAND = [sys.executable, "-m", "turboesm_cli.app"]
AT_ONCE = 2
"""Processes."""


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def write_proteins(path: Path, count: int) -> None:
    """Short random proteins; one identifier in a hundred is there twice."""
    letters = random.Random(1)
    with path.open("w") as stream:
        for number in range(count):
            sequence = "".join(letters.choices("ACDEFGHIKLMNPQRSTVWY", k=letters.randint(8, 40)))
            stream.write(f">p{number - number % 100 // 99}\n{sequence}\n")


def prepared(folder: Path, name: str, count: int) -> list[str | Path]:
    """A command over so many proteins, without its output."""
    from conftest import save_tiny

    model, fasta, bundle = save_tiny(folder / "tiny.pt"), folder / "in.fasta", folder / "tiny.tqz"
    write_proteins(fasta, count)
    measured([*COMMAND, "calibrate", model, fasta, "--max-proteins", "300", "-o", bundle])
    return [*COMMAND, name, bundle, fasta, "--model", model]


def measured(command: list[str | Path]) -> tuple[float, float, float]:
    """Seconds of CPU and of time, and MiB of memory at most, of a command that succeeds."""
    start = time.monotonic()
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return used.ru_utime + used.ru_stime, time.monotonic() - start, used.ru_maxrss / 1024


def costs(command_name: str, proteins: int, shards: int) -> None:
    """CPU time and memory of one run, and of shards and their merge."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = prepared(folder, command_name, proteins)
        cpu, took, memory = measured([*command, "-o", folder / "whole.csv"])
        tell(step="one run", cpu_s=cpu, wall_s=took, peak_mib=memory)
        total, parts = 0.0, [folder / f"part-{index}" for index in range(shards)]
        for index, part in enumerate(parts):
            own, took, memory = measured([*command, "--shard", f"{index}/{shards}", "-o", part])
            total += own
            tell(step=f"shard {index}/{shards}", cpu_s=own, wall_s=took, peak_mib=memory)
        merging, took, memory = measured([*COMMAND, "merge", folder / "merged.csv", *parts])
        tell(step="merge", cpu_s=merging, wall_s=took, peak_mib=memory)
        same = (folder / "merged.csv").read_bytes() == (folder / "whole.csv").read_bytes()
        tell(step="all", cpu_s=total + merging, of_one_run=(total + merging) / cpu, same_bytes=same)


class Script:
    """What a user submits: every shard, two at a time, and the merge once all have succeeded."""

    def __init__(self, command: list[str | Path], folder: Path, shards: int) -> None:
        self._command, self.folder, self.shards = command, folder, shards

    def start(self, index: int) -> subprocess.Popen[str]:
        part = ["--shard", f"{index}/{self.shards}", "-o", self.folder / f"part-{index}", "--if-done", "skip"]
        return subprocess.Popen(
            [*self._command, *part], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def run(self, during: Callable[[dict[int, subprocess.Popen[str]]], None] = lambda running: None) -> list[int]:
        """Exit codes of the shards and, if all are 0, of the merge; `during` is called while the first work."""
        codes: list[int] = []
        for first in range(0, self.shards, AT_ONCE):
            running = {index: self.start(index) for index in range(first, min(first + AT_ONCE, self.shards))}
            if first == 0:
                during(running)
            for process in running.values():
                _, said = process.communicate()
                assert "Traceback" not in said and "a defect" not in said, said
                codes.append(process.returncode)
        if any(codes):
            return codes
        parts = [self.folder / f"part-{index}" for index in range(self.shards)]
        merge = [*COMMAND, "merge", self.folder / "merged", *parts, "--if-done", "skip"]
        done = subprocess.run(merge, env=ENVIRONMENT, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return [*codes, done.returncode]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fault(kind: str, script: Script, moment: float) -> list[int]:
    """Exit codes of the script's first run, in which this happens some seconds after the start of the work."""
    filler = script.folder / "filler"

    def during(running: dict[int, subprocess.Popen[str]]) -> None:
        while not (script.folder / "part-0.partial").exists() and running[0].poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        if kind in ("SIGKILL", "SIGTERM", "SIGUSR1"):
            running[0].send_signal(signal.Signals[kind])
        elif kind == "requeue":  # what Slurm does
            for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
                running[0].send_signal(number)
                time.sleep(0.2)
        elif kind == "second task":
            _, said = script.start(0).communicate()
            tell(step="the second task", said=said.strip().splitlines()[-1][:160])
        elif kind == "full disk":
            with suppress(OSError), filler.open("wb", buffering=0) as stream:
                while stream.write(bytes(1 << 16)):
                    pass

    if kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", script.folder], check=True)
        codes = script.run()
        subprocess.run(["mount", "-o", "remount,rw", script.folder], check=True)
        return codes
    codes = script.run(during)
    filler.unlink(missing_ok=True)
    return codes


KINDS = ("SIGKILL", "SIGTERM", "SIGUSR1", "requeue", "second task", "full disk", "read-only")


def faults(command_name: str, count: int, seed: int, proteins: int, shards: int) -> None:
    """Random faults, each in a folder of its own; then the same script again, until it succeeds."""
    drawn, good = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        command = prepared(Path(name), command_name, proteins)
        measured([*command, "-o", Path(name) / "whole.csv"])
        expected = (Path(name) / "whole.csv").read_bytes()
        kinds = [*KINDS, *drawn.choices(KINDS, k=max(0, count - len(KINDS)))][:count]
        for number, kind in enumerate(kinds):
            with small_disk(Path(name) / str(number)) as folder:
                moment, script = drawn.uniform(0, 3), Script(command, folder, shards)
                codes = fault(kind, script, moment)
                again = script.run() if codes[-1] or len(codes) == shards else []
                merged = folder / "merged"
                same = merged.exists() and merged.read_bytes() == expected
                good += same and not any(again)
                tell(step=number, fault=kind, after_s=round(moment, 2), codes=codes, again=again, same_bytes=same)
    tell(step="all", good=good, of=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=("costs", "faults"))
    parser.add_argument("--command", choices=("decode", "quantize"), default="decode")
    parser.add_argument("--proteins", type=int)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.trial == "costs":
        costs(given.command, given.proteins or 100_000, given.shards or 8)
    else:
        faults(given.command, given.faults, given.seed, given.proteins or 400, given.shards or 4)


if __name__ == "__main__":
    main()
