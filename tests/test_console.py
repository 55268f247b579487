"""What long work says of how far it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turboesm_cli import __version__, console
from turboesm_cli.app import app
from turboesm_cli.sequences.rejects import HEADER


def told(monkeypatch: pytest.MonkeyPatch, total: int, ticks: list[tuple[float, int]]) -> list[str]:
    """The lines of work that does `done` items at each of some seconds after its start."""
    lines: list[str] = []
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    tick = console.Pace("decoding", total, lines.append)
    for at, done in ticks:
        now = 100.0 + at
        tick(done)
    return lines


def test_what_comes_before_the_first_step_is_not_part_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch, 1000, [(50, 10), (60.5, 110), (71, 110), (90, 770)])
    assert lines == [
        "decoding: 10 of 1000, 50 s, no estimate yet",
        "decoding: 120 of 1000, 60 s, about 84 s left",
        "decoding: 230 of 1000, 71 s, about 74 s left",
        "decoding: 1000 of 1000, 90 s, done",
    ]


def test_work_that_is_lost_gives_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch, 100, [(20, 10), (40, -10)])
    assert lines[-1] == "decoding: 0 of 100, 40 s, no estimate yet"


def test_the_end_is_told_once_and_again_after_work_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch, 10, [(1, 10), (2, 0), (30, 0), (31, -4), (32, 4)])
    assert lines == ["decoding: 10 of 10, 1 s, done", "decoding: 10 of 10, 32 s, done"]


def test_what_an_earlier_run_did_is_not_left_and_says_nothing_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    tick = console.Pace("decoding", 1000, lines.append)
    for _ in range(9):
        tick(100, again=True)
    for at, done in ((10.0, 10), (20.5, 10), (30, 80)):
        now = 100.0 + at
        tick(done)
    assert lines == [
        "decoding: 10 of 100 left by an earlier run, which did 900, 10 s, no estimate yet",
        "decoding: 20 of 100 left by an earlier run, which did 900, 20 s, about 84 s left",
        "decoding: 100 of 100 left by an earlier run, which did 900, 30 s, done",
    ]


def test_estimates_follow_what_units_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten items that take 1, 2, ... 10 s: after the first tenth, 5 s, the whole is estimated right."""
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    tick = console.Pace("decoding", 10, lambda _line: None, cost=5 * 55)
    found = []
    for seconds in range(1, 11):
        now += seconds
        tick(cost=5 * seconds)
        found.append(tick.left(now))
    assert found == [None, *(pytest.approx(sum(range(done + 1, 11))) for done in range(2, 11))]
    uneven = console.Pace("decoding", 10, lambda _line: None)
    uneven()
    now += 1
    uneven(0, cost=100)  # which was not told before
    assert uneven.left(now) is None


def test_work_that_an_earlier_run_finished_ends_at_once() -> None:
    lines: list[str] = []
    tick = console.Pace("decoding", 2, lines.append)
    tick(2, again=True)
    assert lines == ["decoding: 0 of 0 left by an earlier run, which did 2, 0 s, done"]


def test_a_defect_is_one_line_that_says_what_a_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_path: object) -> None:
        raise ZeroDivisionError("no\nsuch number")

    monkeypatch.setattr("turboesm_cli.cache.inventory.facts_of", broken)
    monkeypatch.setattr("sys.argv", ["turboesm", "report", "a file.tqz"])
    done = CliRunner().invoke(app, ["report", "a file.tqz"])
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
    for word in ("ZeroDivisionError: no such number", __version__, "report 'a file.tqz'", "turboesm --debug"):
        assert word in done.stderr
    debugged = CliRunner().invoke(app, ["--debug", "report", "a file.tqz"])
    assert isinstance(debugged.exception, ZeroDivisionError)


SHARING = """
import os, sys
from pathlib import Path
from turboesm_cli import console
from turboesm_cli.sequences.rejects import Reject, check_rejects, write_rejects

log, table = Path(sys.argv[1]), Path(sys.argv[2])
for name in "abcd":
    if not os.fork():
        console.log_to(log)
        for number in range(50):
            console.log(f"{name} {number}\\n" + "\\n".join([name * 5000] * 3))
            check_rejects(table)
            write_rejects(table, [Reject("in.fasta", record, record, "x", "empty") for record in range(300)])
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in "abcd"))
"""


def test_a_log_and_a_table_of_rejects_are_shared(tmp_path: Path) -> None:
    """Four processes at once: no message of the log is within another, and the table is always whole."""
    command = [sys.executable, "-c", SHARING, str(tmp_path / "log"), str(tmp_path / "rejects.tsv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.partition("] ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == 4 * 50 * 4
    for head, *rest in zip(*[iter(lines)] * 4, strict=True):
        assert re.fullmatch(r"[abcd] \d+", head) and rest == [head[0] * 5000] * 3
    for name in "abcd":
        assert [line.split()[1] for line in lines if re.fullmatch(rf"{name} \d+", line)] == [*map(str, range(50))]
    table = (tmp_path / "rejects.tsv").read_text()
    assert table.startswith(HEADER) and table.count(HEADER) == 1 and table.count("\n") == 301
    assert {path.name for path in tmp_path.iterdir()} == {"log", "rejects.tsv"}
