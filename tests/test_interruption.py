"""Long commands that are stopped and run again end with the bytes of those that were left alone.

$TURBOESM_KILLS sets how often each is killed (3 without it, 50 in `make killtest`), $TURBOESM_SEED the moments.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interruption import Command, finish, interrupt, moments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = str(ROOT / "data" / "calibration" / "calibration.fasta")
PEPTIDES = str(ROOT / "data" / "evaluation" / "peptide.fasta")
KILLS = int(os.environ.get("TURBOESM_KILLS", "3"))
SEED = int(os.environ.get("TURBOESM_SEED", "1"))
"""Of the random moments."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    finish(Command(("calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "12"), "tiny.tqz"), folder)
    return folder / "tiny.tqz"


@pytest.fixture(scope="module")
def commands(bundle: Path, tiny_path: Path) -> dict[str, Command]:
    model = ("--model", str(tiny_path))
    return {
        "calibrate": Command(("calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "250"), "out.tqz"),
        "quantize": Command(("quantize", str(bundle), CALIBRATION, "--max-proteins", "60", *model), "out.tqkv"),
        "decode": Command(
            ("decode", str(bundle), PEPTIDES, "--max-proteins", "20", "--prompt", "0.2", *model), "out.csv"
        ),
        "generate": Command(
            (
                "decode", str(bundle), PEPTIDES, "--max-proteins", "20", "--generate", "20", "--seed", "1", *model,
            ),
            "out.fasta",
        ),
        "bench": Command(
            (
                "bench", "--families", "globular,idr", "--recipes", "paper,flat,auto", "--max-calibration", "60",
                "--max-proteins", "12", *model,
            ),
            "out.csv",
        ),
    }  # fmt: skip


@pytest.mark.timeout(40 * KILLS + 300)
@pytest.mark.parametrize("name", ["calibrate", "quantize", "decode", "generate", "bench"])
def test_kill_9_at_random_moments(
    name: str,
    commands: dict[str, Command],
    tmp_path: Path,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    command = commands[name]
    (tmp_path / "alone").mkdir()
    expected, span = finish(command, tmp_path / "alone")
    stopped = resumed = 0
    for index, moment in enumerate(moments(SEED, span)):
        folder = tmp_path / str(index)
        folder.mkdir()
        outcome = interrupt(command, folder, moment)
        assert outcome.result == expected, f"killed after {moment:.3f} s of {span:.3f} s"
        assert outcome.leftovers in ((), (f"{command.output}.partial",))
        stopped += outcome.stopped
        resumed += outcome.resumed
        if stopped == KILLS:
            break
    record_testsuite_property(name, f"{stopped} of {stopped} over {span:.1f} s, {resumed} went on with saved work")


def start(command: Command, folder: Path, limit: int | None = None) -> subprocess.Popen[str]:
    """A process of its own, whose files may have `limit` bytes."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells have background jobs ignore it
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = [sys.executable, "-m", "turboesm_cli.app", *command.arguments, "-o", command.output]
    return subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=prepare)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_has_its_own_exit_code(
    number: signal.Signals, code: int, commands: dict[str, Command], tmp_path: Path
) -> None:
    command = commands["calibrate"]
    (tmp_path / "alone").mkdir()
    expected, _ = finish(command, tmp_path / "alone")
    folder = tmp_path / "stopped"
    folder.mkdir()
    process = start(command, folder)
    totals = folder / "out.tqz.partial" / "fitted-sums.total"
    while not totals.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ") and "run the same command again to go on" in said
    assert [path.name for path in folder.iterdir()] == ["out.tqz.partial"]
    again = start(command, folder)
    _, said = again.communicate()
    assert again.returncode == 0 and "going on with the unfinished work" in said
    assert [path.name for path in folder.iterdir()] == ["out.tqz"]
    assert command.result(folder) == expected


def test_a_full_disk_is_one_line_and_loses_nothing(commands: dict[str, Command], tmp_path: Path) -> None:
    command = commands["quantize"]
    (tmp_path / "alone").mkdir()
    expected, _ = finish(command, tmp_path / "alone")
    folder = tmp_path / "full"
    folder.mkdir()
    full = start(command, folder, limit=len(expected) // 2)
    _, said = full.communicate()
    assert full.returncode == 7 and "Traceback" not in said, said
    assert "File too large" in said.splitlines()[-1] and "run the same command again" in said.splitlines()[-1]
    assert [path.name for path in folder.iterdir()] == ["out.tqkv.partial"]
    again = start(command, folder)
    _, said = again.communicate()
    assert again.returncode == 0 and "going on with" in said
    assert command.result(folder) == expected


def test_two_at_once_on_one_output(commands: dict[str, Command], tmp_path: Path) -> None:
    first = start(commands["calibrate"], tmp_path)
    lock = tmp_path / "out.tqz.partial" / "lock"
    while not (lock.exists() and f"process {first.pid}" in lock.read_text(encoding="utf-8")):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # so that it is still there when the second has loaded its model
    second = start(commands["calibrate"], tmp_path)
    _, said = second.communicate()
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 7 and f"worked on by process {first.pid}" in said.splitlines()[-1]
    _, said = first.communicate()
    assert first.returncode == 0, said
    assert [path.name for path in tmp_path.iterdir()] == ["out.tqz"]
