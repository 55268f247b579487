"""Runs that nobody watches, by the real command: schedulers' signals, shared machines, odd streams and disks."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Done, run_forked

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PEPTIDES = str(ROOT / "data" / "evaluation" / "peptide.fasta")
CALIBRATION = str(ROOT / "data" / "calibration" / "calibration.fasta")
COMMAND = [sys.executable, "-m", "turboesm_cli.app"]
BARE = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "SLURM_", "GOMP_"))}


def run(*arguments: str, cwd: Path, before: Callable[[], None] | None = None, **environment: str) -> Done:
    """A command's end, what it printed and said; `before` is called in its process."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=cwd, env=BARE | environment, preexec_fn=before
    )  # fmt: skip


def run_quickly(*arguments: str, cwd: Path, **environment: str) -> Done:
    """The same where neither the start nor the end of a process is what is tested."""
    return run_forked(*arguments, cwd=cwd, env=BARE | environment)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    done = run("calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "12", "-o", "tiny.tqz", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "tiny.tqz"


@pytest.fixture
def decode(bundle: Path, tiny_path: Path) -> list[str]:
    return ["decode", str(bundle), PEPTIDES, "--max-proteins", "2", "--model", str(tiny_path)]


def last(done: Done) -> str:
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


# Threads


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {},
            f"threads: {len(os.sched_getaffinity(0))}, by the cores that the process may run on; they wait",
        ),
        ({"SLURM_CPUS_PER_TASK": "3"}, "threads: 3, by SLURM_CPUS_PER_TASK; they wait passive"),
        ({"SLURM_CPUS_PER_TASK": "many"}, "by the cores that the process may run on"),
        (
            {"SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "1"},
            "threads: 1, by OMP_NUM_THREADS; they wait passive",
        ),
        ({"OMP_WAIT_POLICY": "active"}, "they wait active"),
    ],
)
def test_threads_follow_what_the_job_was_given(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    done = run("--log", "log", "report", "none.csv", cwd=tmp_path, **environment)
    assert done.returncode == 3
    started = (tmp_path / "log").read_text().splitlines()[0]
    assert said in started or ("container" in started and "SLURM" not in said and "OMP_NUM" not in said)


def test_the_threads_that_are_said_are_those_that_torch_has(decode: list[str], tmp_path: Path) -> None:
    done = run(*decode, cwd=tmp_path, SLURM_CPUS_PER_TASK="1")
    assert done.returncode == 0 and "on cpu, 1 threads\n" in done.stderr


# Signals


@contextlib.contextmanager
def at_work(tmp_path: Path, tiny_path: Path, before: Callable[[], None]) -> Iterator[subprocess.Popen[str]]:
    """`calibrate` in a folder, with something saved."""
    arguments = ["calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "120", "-o", "out.tqz"]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=BARE, preexec_fn=before
    )
    while not (tmp_path / "out.tqz.partial" / "fitted-sums.total").exists():
        assert process.poll() is None
        time.sleep(0.005)
    yield process


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_what_schedulers_send_before_they_kill_saves_the_work(name: str, tmp_path: Path, tiny_path: Path) -> None:
    number = signal.Signals[name]
    with at_work(tmp_path, tiny_path, lambda: signal.signal(number, signal.SIG_DFL)) as process:
        process.send_signal(number)
        process.send_signal(signal.SIGTERM)  # which comes next
        _, said = process.communicate()
    assert process.returncode == 143, said
    assert "Traceback" not in said and "run the same command again to go on" in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith(("error: terminated by ", "error: terminated by SIGTERM"))


def test_nohup_is_not_undone(tmp_path: Path, tiny_path: Path) -> None:
    def as_nohup_does() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with at_work(tmp_path, tiny_path, as_nohup_does) as process:
        process.send_signal(signal.SIGHUP)
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert [path.name for path in tmp_path.iterdir()] == ["out.tqz"]


# Streams


def shell(line: str, cwd: Path) -> Done:
    script = f'turboesm() {{ {" ".join(COMMAND)} "$@"; }}\n{line}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=cwd, env=BARE)


@pytest.mark.parametrize("what", ["report {bundle}", "report {bundle} --json", "--help", "decode --help"])
def test_a_reader_that_has_enough_is_no_failure(what: str, bundle: Path, tmp_path: Path) -> None:
    done = shell(f"turboesm {what.format(bundle=bundle)} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == 0 and done.stderr == ""


def test_results_that_a_full_disk_swallows_are_missed(bundle: Path, tmp_path: Path) -> None:
    for arguments in (f"report {bundle}", f"report {bundle} --json", "--help", "--version"):
        done = shell(f"turboesm {arguments} > /dev/full", tmp_path)
        assert done.returncode == 7, arguments
        assert "cannot write results to standard output: No space left on device" in last(done)


def test_results_that_are_printed_where_nothing_is_open_are_missed(bundle: Path, tmp_path: Path) -> None:
    done = shell(f"turboesm report {bundle} >&-", tmp_path)
    assert done.returncode == 7 and "standard output is closed" in last(done)


def test_results_in_a_file_need_no_open_stream(decode: list[str], tmp_path: Path) -> None:
    done = shell(f"turboesm {' '.join(decode)} -o out.csv >&-", tmp_path)
    assert done.returncode == 0 and "out.csv is complete" in last(done)
    expected = (tmp_path / "out.csv").read_bytes()
    for streams in (">&- 2>&-", "> /dev/null 2> /dev/full", "<&- >&- 2>&-"):
        done = shell(f"turboesm {' '.join(decode)} -o out.csv --force {streams}", tmp_path)
        assert done.returncode == 0 and done.stderr == "" and (tmp_path / "out.csv").read_bytes() == expected


def test_an_error_that_nobody_can_be_told_keeps_its_exit_code(tmp_path: Path) -> None:
    for streams in ("2> /dev/full", "2>&-", ">&- 2>&-"):
        assert shell(f"turboesm report none.csv {streams}", tmp_path).returncode == 3


# Disks


SHARES = {
    "no fsync of a folder": """
import os, stat, errno
real = os.fsync
def fsync(handle):
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real(handle)
os.fsync = fsync
""",
    "no chmod": """
import os, errno, pathlib
def chmod(*_arguments, **_more):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
os.chmod = pathlib.Path.chmod = chmod
""",
    "no opening of a folder": """
import os, errno
real = os.open
def opened(path, flags, *more, **further):
    if os.path.isdir(path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return real(path, flags, *more, **further)
os.open = opened
""",
    "no fsync": """
import os, errno
def fsync(_handle):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
os.fsync = fsync
""",
}


@pytest.mark.parametrize("share", SHARES)
def test_network_shares_know_less(share: str, decode: list[str], tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "sitecustomize.py").write_text(SHARES[share])
    done = run(*decode, "-o", "out.csv", cwd=tmp_path, PYTHONPATH=str(tmp_path / "share"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "share"]


@pytest.mark.parametrize("mebibytes", [300, 710, 1500])
def test_too_little_memory_is_one_line(mebibytes: int, decode: list[str], tmp_path: Path) -> None:
    limit = mebibytes << 20
    done = run(*decode, cwd=tmp_path, before=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    if done.returncode:  # how much is too little is the machine's affair
        assert done.returncode == 6 and "memory" in last(done)


# Home


def test_home_is_meant_wherever_a_path_begins(decode: list[str], bundle: Path, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    (tmp_path / "few.fasta").write_text(">a\nMKTAYIAKQRQISFVK\n")
    (tmp_path / "tiny.tqz").write_bytes(bundle.read_bytes())
    model = Path(decode[-1])
    (tmp_path / "tiny.pt").write_bytes(model.read_bytes())
    done = run_quickly(
        "--log=~/log", "decode", "~/tiny.tqz", "~/few.fasta", "--model=~/tiny.pt", "--output=~/out.csv",
        "--rejects=~/rejects.tsv", cwd=ROOT, **home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"log", "out.csv", "rejects.tsv"} < {path.name for path in tmp_path.iterdir()}
    done = run_quickly(
        "bench", "--families", "~/few.fasta,peptide", "--bundle=~/tiny.tqz", "--max-proteins", "1",
        "--output=~/bench.csv", cwd=ROOT, TURBOESM_MODEL="~/tiny.pt", **home,
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "bench.csv").exists(), done.stderr
    done = run_quickly("report", "~/bench.csv", "--output=~/page.html", "--title", "~ about", cwd=ROOT, **home)
    assert done.returncode == 0 and "~ about" in (tmp_path / "page.html").read_text(), done.stderr


@pytest.mark.parametrize("option", ["--model=~nosuchuser/m.pt", "--output=~nosuchuser/o.csv"])
def test_a_home_of_nobody_is_refused(option: str, decode: list[str], tmp_path: Path) -> None:
    done = run_quickly(*decode, option, cwd=tmp_path, COLUMNS="300")
    assert done.returncode == 2 and "there is no user of that name" in done.stderr
    assert not list(tmp_path.iterdir())


# Numbers


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--temperature", value) for value in ("inf", "nan", "-1", "-inf")],
        *[("--top-p", value) for value in ("nan", "-0.1", "1.1", "inf")],
    ],
)
def test_sampling_with_numbers_that_are_none_is_refused(
    option: str, value: str, decode: list[str], tmp_path: Path
) -> None:
    done = run_quickly(*decode, "--generate", "4", option, value, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and option in done.stderr


def test_sampling_at_the_ends_of_what_is_allowed_samples(decode: list[str], tmp_path: Path) -> None:
    likeliest = run_quickly(*decode, "--generate", "4", "--temperature", "0", cwd=tmp_path)
    assert likeliest.returncode == 0
    assert all(len(record.split("\n")[1]) > 4 for record in likeliest.stdout.split(">")[1:])
    assert run_quickly(*decode, "--generate", "4", "--top-p", "0", cwd=tmp_path).stdout == likeliest.stdout
    hottest = run_quickly(*decode, "--generate", "4", "--temperature", "1e300", cwd=tmp_path)
    assert hottest.returncode == 0 and len(hottest.stdout) == len(likeliest.stdout)


@pytest.mark.parametrize("option", ["--bits", "--bits-k", "--bits-v"])
def test_bits_that_are_no_numbers_are_refused(option: str, tiny_path: Path, tmp_path: Path) -> None:
    done = run_quickly("calibrate", str(tiny_path), CALIBRATION, option, "nan", cwd=tmp_path)
    assert done.returncode == 2 and "no finite number" in done.stderr


# Jobs that are submitted again


def commands(bundle: Path, tiny_path: Path) -> dict[str, list[str]]:
    model = ["--model", str(tiny_path), "--max-proteins", "3"]
    return {
        "out.tqz": ["calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "12"],
        "out.tqkv": ["quantize", str(bundle), PEPTIDES, *model],
        "out.csv": ["decode", str(bundle), PEPTIDES, *model],
        "out.fasta": ["decode", str(bundle), PEPTIDES, "--generate", "2", *model],
        "bench.csv": ["bench", "--families", "peptide", "--bundle", str(bundle), *model],
    }


@pytest.mark.parametrize("name", ["out.tqz", "out.tqkv", "out.csv", "out.fasta", "bench.csv"])
def test_a_job_that_is_done_ends_at_once_when_it_is_submitted_again(
    name: str, bundle: Path, tiny_path: Path, tmp_path: Path
) -> None:
    command = [*commands(bundle, tiny_path)[name], "-o", name]
    start = run if name == "out.csv" else run_quickly  # which have torch's threads from their servers
    first = start(*command, "--if-done", "skip", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    written = (tmp_path / name).stat()
    again = start(*command, "--if-done", "skip", cwd=tmp_path)
    assert again.returncode == 0 and "from this very run; nothing to do" in last(again)
    assert (tmp_path / name).stat() == written
    assert (again.stdout == first.stdout) if name == "out.tqz" else again.stdout == ""
    other = start(*command, "--max-proteins", "2", "--if-done", "skip", cwd=tmp_path)
    assert other.returncode == 7 and "of another run" in last(other) and (tmp_path / name).stat() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"{name}.done"])


def test_an_output_of_nobody_knows_which_run_is_not_taken_for_this_one(decode: list[str], tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("mine")
    done = run_quickly(*decode, "-o", "out.csv", "--if-done", "skip", cwd=tmp_path)
    assert done.returncode == 7 and "no out.csv.done says of which run it is" in last(done)
    assert (tmp_path / "out.csv").read_text() == "mine"


def test_options_that_contradict_each_other_are_refused(decode: list[str], tmp_path: Path) -> None:
    for option in (["--if-done", "skip"], ["--resume-anywhere"]):
        done = run_quickly(*decode, "-o", "out.csv", "--force", *option, cwd=tmp_path)
        assert done.returncode == 2 and option[0] in done.stderr
        done = run_quickly(*decode, *option, cwd=tmp_path)
        assert done.returncode == 2 and option[0] in done.stderr, "it has no output that work is kept for"


def test_work_goes_on_with_other_threads_where_that_is_asked_for(tmp_path: Path, tiny_path: Path) -> None:
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("torch takes no more threads than there are cores")
    with at_work(tmp_path, tiny_path, lambda: None) as process:  # with all cores
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    command = ["calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "120", "-o", "out.tqz"]
    refused = run(*command, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert refused.returncode == 7 and "1 threads" in last(refused) and "--resume-anywhere" in last(refused)
    done = run(*command, "--resume-anywhere", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert (
        "done on " in done.stderr
        and ", then " in done.stderr
        and "left by an earlier run, which did" in done.stderr
    )
    shown = run("report", "out.tqz", "--json", cwd=tmp_path)
    devices = json.loads(shown.stdout)[0]["devices"]
    assert devices.count("threads") == 2 and devices.endswith("1 threads")


def test_force_starts_anew(tmp_path: Path, tiny_path: Path) -> None:
    with at_work(tmp_path, tiny_path, lambda: None) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    command = ["calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "120", "-o", "out.tqz"]
    done = run_quickly(*command, "--force", cwd=tmp_path)
    assert done.returncode == 0 and "going on" not in done.stderr and "earlier run" not in done.stderr


def test_two_on_one_output_without_locks_lose_nothing_and_tell_the_truth(
    decode: list[str], tmp_path: Path
) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "sitecustomize.py").write_text(
        "import fcntl, socket, errno, os\n"
        "def flock(*_):\n    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))\n"
        "fcntl.flock = flock\nsocket.gethostname = lambda: os.environ['NODE']\n"
    )
    found = os.pathsep.join(filter(None, [str(tmp_path / "share"), BARE.get("PYTHONPATH")]))
    alone = run(*decode, "-o", "alone.csv", cwd=tmp_path)
    assert alone.returncode == 0
    both = [
        subprocess.Popen(
            [*COMMAND, *decode, "-o", "out.csv"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=BARE | {"PYTHONPATH": found, "NODE": node},
        )
        for node in ("node1", "node2")
    ]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and {*codes} <= {0, 7}, said
    for code, text in zip(codes, said, strict=True):
        assert "Traceback" not in text
        if code:
            assert "is being worked on by" in text or "exists; pass --force" in text
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "alone.csv").read_text()
