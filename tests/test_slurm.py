"""The scripts in turboesm_cli/slurm, on a real Slurm of one node: killed, requeued, preempted, merged."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import run_afresh
from slurm_node import Slurm, missing, one_node

from turboesm_cli.codec.bundle import read_bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm can be started: {missing()}"),
]

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "turboesm_cli" / "slurm"
CALIBRATION = str(ROOT / "data" / "calibration" / "calibration.fasta")
PEPTIDES = str(ROOT / "data" / "evaluation" / "peptide.fasta")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))} | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}
ENDS = 60.0
WORKFLOWS = Path(os.environ.get("TURBOESM_WORKFLOWS", sys.prefix))
"""A virtual environment with snakemake, its Slurm executor and submitit, which no extra of turboesm has."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with one_node(tmp_path_factory.mktemp("slurm"), ENVIRONMENT) as running:
        yield running


@pytest.fixture(scope="module")
def commands(slurm: Slurm, tiny_path: Path) -> dict[str, list[str]]:
    """Commands without their outputs; they use a bundle that is made first."""
    model = ["--model", str(tiny_path)]
    calibrate = ["calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "30"]
    whole(slurm, calibrate, "tiny.tqz")
    return {
        "tqz": calibrate,
        "tqkv": ["quantize", "tiny.tqz", PEPTIDES, "--max-proteins", "20", *model],
        "fasta": ["decode", "tiny.tqz", PEPTIDES, "--max-proteins", "8", "--generate", "5", "--seed", "1", *model],
        # one protein at a time, so that each is saved when it is done
        "csv": ["decode", "tiny.tqz", CALIBRATION, "--max-proteins", "16", "--batch", "1", *model],
    }


def whole(slurm: Slurm, command: list[str], output: str) -> Path:
    """The output of one run that nothing happens to, in a process of its own, as the jobs have."""
    done = run_afresh(*command, "-o", output, cwd=slurm.home, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return slurm.home / output


@pytest.fixture(scope="module")
def single(slurm: Slurm, commands: dict[str, list[str]]) -> Path:
    """Figures of one job that nothing happens to."""
    slurm.wait(slurm.submit(SCRIPTS / "single.sh", "whole.csv", *commands["csv"]))
    return slurm.home / "whole.csv"


def at_work(slurm: Slurm, output: str, units: int = 4000) -> int:
    """The process that works on an output, once it has saved something."""
    folder = slurm.home / f"{output}.partial"
    end = time.monotonic() + ENDS
    while not ((folder / "journal").exists() and (folder / "journal").stat().st_size > units):
        assert time.monotonic() < end, slurm.said()
        time.sleep(0.02)
    return int((folder / "lock").read_text().split()[1])


def start_again(slurm: Slurm, job: str) -> None:
    """What is requeued waits for two minutes; here for two seconds.

    In the second in which a node ended a job it refuses to start it anew ("Job credential revoked", FAILED).
    """
    slurm.wait(job, "PENDING", seconds=ENDS)
    slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now+2")


@pytest.mark.timeout(300)
def test_arrays_are_merged_although_a_task_is_killed(
    slurm: Slurm, commands: dict[str, list[str]], single: Path
) -> None:
    """One task of four is killed by kill -9, and requeues itself; the merge waits for it by afterok."""
    merges = {}
    for kind, tasks in (("csv", "0-3"), ("tqz", "1-2"), ("tqkv", "0-1"), ("fasta", "0-2:2")):
        job = slurm.submit(SCRIPTS / "array.sh", f"out.{kind}", *commands[kind], options=(f"--array={tasks}",))
        merges[kind] = slurm.submit(SCRIPTS / "merge.sh", f"out.{kind}", options=(f"--dependency=afterok:{job}",))
        if kind == "csv":
            killed = f"{job}_1"
    os.kill(at_work(slurm, "out.csv.parts/part-1"), signal.SIGKILL)
    start_again(slurm, killed)
    expected = {kind: whole(slurm, commands[kind], f"whole.{kind}") for kind in ("tqz", "tqkv", "fasta")}
    for job in merges.values():
        slurm.wait(job)
    assert "going on with the unfinished work" in slurm.said()
    expected["csv"] = single
    for kind in ("csv", "tqkv", "fasta"):
        assert (slurm.home / f"out.{kind}").read_bytes() == expected[kind].read_bytes(), kind
    found, wanted = read_bundle(slurm.home / "out.tqz"), read_bundle(expected["tqz"])
    for own, other in zip(found.spec.layers, wanted.spec.layers, strict=True):
        if own is not None and other is not None:
            for mine, theirs in ((own.k, other.k), (own.v, other.v)):
                for name, tensor in theirs.tensors.items():
                    torch.testing.assert_close(mine.tensors[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.timeout(300)
def test_a_job_requeues_itself_and_is_preempted(
    slurm: Slurm, commands: dict[str, list[str]], single: Path
) -> None:
    """USR1 goes to the batch shell, as Slurm sends it before the time limit; then a job of more weight comes."""
    job = slurm.submit(SCRIPTS / "requeue.sh", "long.csv", *commands["csv"])
    at_work(slurm, "long.csv")
    slurm.ask("scancel", "--signal=USR1", "--batch", job)
    start_again(slurm, job)
    slurm.wait(job, "RUNNING", seconds=ENDS)
    done = (slurm.home / "long.csv.partial" / "journal").stat().st_size
    at_work(slurm, "long.csv", done)
    urgent = slurm.submit(
        SCRIPTS / "single.sh", "urgent.tqkv", *commands["tqkv"],
        options=("--partition=urgent", "--cpus-per-task=2"),
    )  # fmt: skip
    slurm.wait(urgent)
    start_again(slurm, job)
    slurm.wait(job)
    assert (slurm.home / f"turboesm-{job}.out").read_text().count("going on with the unfinished work") == 2
    assert (slurm.home / "long.csv").read_bytes() == single.read_bytes()


def through(slurm: Slurm, folder: Path, command: list[object], **environment: str) -> None:
    """Run a program of WORKFLOWS in `folder`, whose jobs find this Slurm although they are given no SLURM_CONF."""
    configured = slurm.home / "bin" / "srun"
    configured.parent.mkdir(exist_ok=True)
    configured.write_text(f'#!/bin/sh\nSLURM_CONF={slurm.configuration} exec /usr/bin/srun "$@"\n')
    configured.chmod(0o755)
    path = f"{configured.parent}:{WORKFLOWS / 'bin'}:{ENVIRONMENT['PATH']}"
    done = subprocess.run(
        [WORKFLOWS / "bin" / str(command[0]), *map(str, command[1:])], cwd=folder, capture_output=True, text=True,
        env=ENVIRONMENT | {"PATH": path, "SLURM_CONF": str(slurm.configuration)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    not (WORKFLOWS / "bin" / "snakemake").exists(), reason=f"no snakemake in {WORKFLOWS}: set TURBOESM_WORKFLOWS"
)
def test_the_snakefile_on_its_slurm_executor(
    slurm: Slurm, commands: dict[str, list[str]], tiny_path: Path
) -> None:
    folder = slurm.home / "snakemake"
    folder.mkdir()
    options = (
        "--executor slurm --slurm-no-account --slurm-status-command squeue --jobs 2 "
        "--set-threads calibrate=1 decode=1 --slurm-init-seconds-before-status-checks 1"
    )
    config = [f"model={tiny_path}", f"calibration={CALIBRATION}", f"proteins={PEPTIDES}", "shards=2"]
    few = "options=--max-proteins 5"
    through(
        slurm,
        folder,
        ["snakemake", "--snakefile", SCRIPTS / "Snakefile", *options.split(), "--config", *config, few],
    )
    alone = ["decode", str(folder / "bundle.tqz"), PEPTIDES, "--max-proteins", "5", "--model", str(tiny_path)]
    assert (folder / "decode.csv").read_bytes() == whole(slurm, alone, "alone.csv").read_bytes()


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    not list(WORKFLOWS.glob("lib/python*/site-packages/submitit")),
    reason=f"no submitit in {WORKFLOWS}: set TURBOESM_WORKFLOWS",
)
def test_the_example_of_submitit(slurm: Slurm, commands: dict[str, list[str]], tiny_path: Path) -> None:
    guide = (ROOT / "turboesm_cli" / "guides" / "hpc.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import submitit.*?)```", guide, re.DOTALL)
    folder = slurm.home / "submitit"
    folder.mkdir()
    (folder / "650M.tqz").write_bytes((slurm.home / "tiny.tqz").read_bytes())
    (folder / "proteins.fasta").write_text(">a\nMKTAYIAKQRQISF\n>b\nGIGKFLHSAKKF\n>c\nFLPLIGRVLSGIL\n")
    (folder / "example.py").write_text(example.replace("shards = 16", "shards = 2").replace("=8, mem", "=1, mem"))
    through(slurm, folder, ["python", "example.py"], TURBOESM_MODEL=str(tiny_path))
    alone = ["decode", "tiny.tqz", str(folder / "proteins.fasta"), "--model", str(tiny_path)]
    assert (folder / "decode.csv").read_bytes() == whole(slurm, alone, "alone2.csv").read_bytes()
