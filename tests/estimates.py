"""How far the estimates of time are off: `python tests/estimates.py [COMMAND ...]`, from a checkout.

Runs commands with the embedded 8M model on bundled proteins and records, at each step of each phase, the time that
the phase had taken and what it said was left. Prints, of all steps after the first tenth of the phase's time, the
smallest and the largest estimate of the whole over what the whole took. Time is this process' own on the CPU, so
that what else the machine does is not counted. Phases of less than a second are left out.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from typer.testing import CliRunner

from turboesm_cli import console
from turboesm_cli.app import app

DATA = Path(__file__).parents[1] / "data"
LEAST = 1.0
"""Seconds."""


class Recorded(console.Pace):
    """A pace that remembers what it said."""

    all: list[Recorded] = []  # noqa: RUF012

    def __init__(self, label: str, total: int, tell: Callable[[str], None], cost: float | None = None) -> None:
        super().__init__(label, total, tell, cost)
        self.label, self.begin = label, time.process_time()
        self.said: list[tuple[float, float | None]] = []
        self.all.append(self)

    def __call__(self, done: int = 1, again: bool = False, cost: float | None = None) -> None:
        super().__call__(done, again, cost)
        now = time.process_time()
        self.said.append((now - self.begin, self.left(now)))

    def ratios(self) -> list[float | None]:
        """Estimated over real totals after the first tenth; None where nothing could be told."""
        total = self.said[-1][0]
        said = [(took, left) for took, left in self.said[:-1] if took > total / 10]
        return [None if left is None else (took + left) / total for took, left in said]


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    bundle, tm = folder / "b.tqz", DATA / "evaluation" / "tm.fasta"
    antibodies = DATA / "antibodies" / "calibration.fasta"
    return {
        "calibrate": ("calibrate", "embedded", DATA / "calibration" / "calibration.fasta", "--max-proteins", 120,
                      "-o", bundle),
        "quantize": ("quantize", bundle, DATA / "evaluation" / "idr.fasta", "-o", folder / "q.tqkv"),
        "decode": ("decode", bundle, tm, "--max-proteins", 24, "-o", folder / "d.csv"),
        "bench": ("bench", "--families", "tm,idr,peptide", "--recipes", "auto@2,auto,paper", "--max-proteins", 8,
                  "--max-calibration", 60, "--model", "embedded", "-o", folder / "r.csv"),
        "quantize antibodies": ("quantize", bundle, antibodies, "--max-proteins", 200, "-o", folder / "a.tqkv"),
    }  # fmt: skip


def main(names: list[str]) -> None:
    console.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[attr-defined]
    console.Pace = Recorded  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in commands(Path(folder)).items():
            if names and name not in names and name != "calibrate":
                continue
            Recorded.all.clear()
            done = CliRunner().invoke(app, [str(each) for each in arguments])
            assert done.exit_code == 0, done.output
            for pace in Recorded.all:
                if not pace.said or pace.said[-1][0] < LEAST:
                    continue
                found = pace.ratios()
                known = [ratio for ratio in found if ratio is not None]
                spread = f"{min(known):.2f} to {max(known):.2f}" if known else "none"
                silent = f", {found.count(None)} of {len(found)} without an estimate" if None in found else ""
                sys.stdout.write(f"{name}: {pace.label}: {pace.said[-1][0]:.1f} s, {spread}{silent}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
