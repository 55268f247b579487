"""`--gpus`, on processes of a CPU: one output of several workers, one of which dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from typer.testing import CliRunner

from turboesm_cli import console
from turboesm_cli.app import app
from turboesm_cli.commands.gpus import Worker, progress_line

ROOT = Path(__file__).resolve().parents[1]
PEPTIDES = str(ROOT / "data" / "evaluation" / "peptide.fasta")
BUNDLE = str(ROOT / "tests" / "golden" / "auto-v1.tqz")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--gpus", "0"), 2, "nor a number of GPUs"),
        (("--gpus", "many"), 2, "nor a number of GPUs"),
        (("--gpus", "all", "--device", "cpu"), 2, "name a number of"),
        (("--gpus", "2", "--device", "cuda:1"), 2, "does not go with --gpus"),
        (("--gpus", "2", "--shard", "0/2"), 2, "does not go with --gpus"),
        (("--gpus", "2", "--json"), 2, "does not go with --gpus"),
        (("--gpus", "64"), 6, "GPUs can be used here"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    done = run("quantize", BUNDLE, PEPTIDES, "-o", tmp_path / "out.tqkv", *options)
    assert done.exit_code == code and said in " ".join(done.stderr.replace("│", " ").split()), done.output
    assert not [path for path in tmp_path.iterdir() if path.name != "out.tqkv.gpus"]


def test_several_need_an_output_and_a_file(tmp_path: Path) -> None:
    assert run("decode", BUNDLE, PEPTIDES, "--gpus", "2").exit_code == 2
    assert run("score", BUNDLE, "-", "--gpus", "2", "-o", tmp_path / "out.tsv").exit_code == 2


def test_lines_of_progress_are_read_as_they_are_told() -> None:
    told: list[str] = []
    pace = console.Pace("decoding tokens", 12, told.append)
    pace(2, again=True)
    pace(10)
    assert [console.Pace.read(line) for line in told] == [("decoding tokens", 10, 10, 0)]
    assert console.Pace.read("packing: 3 of 9, 12 s, about 24 s left") == ("packing", 3, 9, 24)
    assert console.Pace.read("packing: 3 of 9, 12 s, no estimate yet") == ("packing", 3, 9, None)
    assert console.Pace.read("model: tiny (2 layers, 2 heads of 16) on cpu, 1 threads") is None


def test_processes_are_told_together_where_they_do_the_same(tmp_path: Path) -> None:
    one, other = (Worker([], tmp_path / name) for name in "ab")
    one.label, one.done, one.total, one.left = "packing", 3, 9, 24
    assert progress_line([one, other], 20) == "packing: 3 of 9 in 1 of 2 processes, 20 s"
    other.label, other.done, other.total, other.left = "packing", 4, 8, 30
    assert progress_line([one, other], 30) == "packing: 7 of 17 in 2 processes, 30 s, about 30 s left"
    other.label = "reading"
    assert progress_line([one, other], 40) == "packing: 3 of 9 in 1 of 2 processes, 40 s"


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again_from_its_work(tmp_path: Path, tiny_path: Path) -> None:
    """kill -9 once it has saved something; the output has the bytes of one process, and nothing else is left."""
    command = ["decode", BUNDLE, PEPTIDES, "--max-proteins", "40", "--batch", "1", "--model", str(tiny_path)]
    assert run_forked(*command, "-o", "one.csv", cwd=tmp_path, env=ENVIRONMENT).returncode == 0
    several = [
        sys.executable,
        "-m",
        "turboesm_cli.app",
        *command,
        "-o",
        "two.csv",
        "--gpus",
        "2",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(several, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    work = tmp_path / "two.csv.gpus" / "part-1-of-2.partial"
    while not ((work / "journal").exists() and (work / "journal").stat().st_size > 1500):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(int((work / "lock").read_text().split()[1]), signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 0 and "died (-9" in said and "started again" in said, said
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one.csv", "two.csv"}


@pytest.mark.slow
def test_a_mistake_ends_all_with_its_words_and_code(tmp_path: Path, tiny_path: Path) -> None:
    command = ("quantize", BUNDLE, tmp_path / "none.fasta", "--model", tiny_path, "--gpus", "2", "--device", "cpu")
    done = run(*command, "-o", tmp_path / "out.tqkv")
    assert done.exit_code == 3 and "no such file" in done.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
