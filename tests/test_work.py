"""Work saved beside an output: whole records alone count, one process at a time, one run at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from turboesm_cli.errors import InputError, OutputError
from turboesm_cli.outputs.files import atomic_output, work_folder
from turboesm_cli.outputs.journal import Journal
from turboesm_cli.outputs.work import NOTHING_KEPT, Policy, SavedWork, Tensors, done_record, is_done, saved_work

RUN = {"command": "test", "seed": "1", "device": "a CPU"}
FORCE = Policy(force=True)
SKIP = Policy(skip=True)
ANYWHERE = Policy(anywhere=True)


def number(value: float) -> Tensors:
    return {"x": torch.tensor(value)}


def never() -> Tensors:
    raise AssertionError("this unit was saved, and is not computed again")


def stop_after(path: Path, units: int, run: dict[str, str] = RUN) -> BaseException:
    """Do some units and be interrupted; the exception, with its note."""
    with pytest.raises(KeyboardInterrupt) as caught, saved_work(path, run) as work:
        for index in range(units):
            work.unit(str(index), lambda index=index: number(index))
        raise KeyboardInterrupt
    return caught.value


def test_a_journal_gives_back_what_it_took(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    parts = {"a": b"", "b" * 300: b"x" * 3_000_000, "é": bytes(range(256))}
    for name, data in parts.items():
        journal.append(name, data)
    journal.close()
    again = Journal(tmp_path / "j")
    assert {name: again.read(name) for name in parts} == parts
    assert len(again) == 3 and "c" not in again
    again.close()


def test_a_journal_cut_off_anywhere_keeps_its_whole_records(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    ends = [0]
    for name in "abc":
        journal.append(name, name.encode() * 5)
        ends.append((tmp_path / "j").stat().st_size)
    journal.close()
    whole = (tmp_path / "j").read_bytes()
    for size in range(len(whole) + 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        cut = Journal(tmp_path / "cut")
        assert len(cut) == sum(end <= size for end in ends) - 1
        cut.append("new", b"data")  # goes after the last whole record
        cut.close()
        again = Journal(tmp_path / "cut")
        assert again.read("new") == b"data"
        again.close()


def test_a_flipped_bit_ends_the_journal_before_its_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("a", b"first")
    first = (tmp_path / "j").stat().st_size
    journal.append("b", b"second")
    journal.close()
    whole = (tmp_path / "j").read_bytes()
    for at in range(first, len(whole)):
        (tmp_path / "bad").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        bad = Journal(tmp_path / "bad")
        assert len(bad) == 1 and bad.read("a") == b"first"
        bad.close()


def test_units_are_computed_once(tmp_path: Path) -> None:
    path = tmp_path / "out"
    error = stop_after(path, 3)
    assert "run the same command again" in error.__notes__[0] and str(work_folder(path)) in error.__notes__[0]
    with saved_work(path, RUN) as work:
        assert work.units == 3
        assert [float(work.unit(str(index), never)["x"]) for index in range(3)] == [0, 1, 2]
        assert float(work.under("p").unit("0", lambda: number(7))["x"]) == 7
        assert float(work.unit("p-0", never)["x"]) == 7
        path.write_text("published")
    assert list(tmp_path.iterdir()) == [path]


def test_totals_are_replaced(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), saved_work(tmp_path / "out", RUN) as work:
        assert work.total("sum") == {}
        work.unit("0", lambda: number(1))
        for value in (1, 2, 3):
            work.save_total("sum", number(value), last=True)
        raise KeyboardInterrupt
    with saved_work(tmp_path / "out", RUN) as work:
        assert float(work.total("sum")["x"]) == 3


def test_dear_totals_are_not_saved_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("turboesm_cli.outputs.work.time.monotonic", lambda: now[0])
    save_file = __import__("safetensors.torch").torch.save_file

    def slow(*arguments: object) -> None:
        now[0] += 10
        save_file(*arguments)

    monkeypatch.setattr("safetensors.torch.save_file", slow)
    saved = []
    with saved_work(tmp_path / "out", RUN) as work:
        for value in range(100):
            now[0] += 1
            work.save_total("sum", number(value))
            saved.append(float(work.total("sum")["x"]))
        work.save_total("sum", number(100), last=True)
        assert float(work.total("sum")["x"]) == 100
    assert len(set(saved)) == 2  # at 10 s each, a fifth of the time is one every 50 s


def test_a_run_without_units_leaves_nothing(tmp_path: Path) -> None:
    assert not hasattr(stop_after(tmp_path / "out", 0), "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_keeps_what_is_not_ours(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with saved_work(tmp_path / "out", RUN) as work:
        work.unit("0", lambda: number(1))
        work.save_total("sum", number(1), last=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_work_that_can_only_fail_again_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, saved_work(tmp_path / "out", RUN) as work:
        work.unit("0", lambda: number(1))
        raise InputError("too few tokens")
    assert not hasattr(caught.value, "__notes__") and list(tmp_path.iterdir()) == []


def test_another_run_is_refused_or_forced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    stop_after(path, 2)
    with (
        pytest.raises(OutputError, match=r"another run \(seed: 1, not 2\).*--force"),
        saved_work(path, RUN | {"seed": "2"}),
    ):
        pass
    with saved_work(path, RUN) as work:
        assert work.units == 2, "the refusal has kept the work"
        raise_later = work.units
    assert raise_later == 2
    stop_after(path, 2)
    with saved_work(path, RUN | {"seed": "2"}, FORCE) as work:
        assert work.units == 0


def test_force_starts_anew_and_what_it_began_goes_on_without_it(tmp_path: Path) -> None:
    path = tmp_path / "out"
    stop_after(path, 2)
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), saved_work(path, RUN, FORCE) as work:
        assert work.units == 0, "not what was begun before"
        work.unit("0", lambda: number(1))
        raise KeyboardInterrupt
    with saved_work(path, RUN) as work:
        assert work.units == 1 and work.resumed("0") and not work.resumed("1")
        work.unit("1", lambda: number(1))
        assert not work.resumed("1")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="exists; pass --force"), saved_work(path, RUN):
        pass


def test_leave_to_overwrite_is_of_one_run_alone(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), saved_work(path, RUN, FORCE) as work:
        work.unit("0", lambda: number(1))
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="exists; pass --force"), saved_work(path, RUN | {"seed": "2"}):
        pass


def test_work_of_another_device_goes_on_where_that_is_asked_for_and_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "out"
    stop_after(path, 2)
    elsewhere = RUN | {"device": "a GPU"}
    with (
        pytest.raises(OutputError, match=r"a CPU, not a GPU.*--resume-anywhere to go on"),
        saved_work(path, elsewhere),
    ):
        pass
    with pytest.raises(OutputError, match="seed: 1, not 2"), saved_work(path, elsewhere | {"seed": "2"}, ANYWHERE):
        pass
    for _ in range(2):  # once more on the same device adds nothing
        with pytest.raises(KeyboardInterrupt), saved_work(path, elsewhere, ANYWHERE) as work:
            assert work.units == 2 and work.devices == work.under("x").devices == "a CPU, then a GPU"
            raise KeyboardInterrupt
    with saved_work(path, RUN, ANYWHERE) as work:
        assert work.units == 2 and work.devices == "a CPU, then a GPU"
    with saved_work(path, RUN, ANYWHERE) as work:
        assert work.devices == ""


def test_a_finished_output_is_told_from_all_others(tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert not is_done(path, RUN)
    with saved_work(path, RUN, SKIP) as work:
        work.unit("0", lambda: number(1))
        path.write_text("new")
    assert is_done(path, RUN)
    with pytest.raises(OutputError, match=r"of another run \(seed: 1, not 2\)"):
        is_done(path, RUN | {"seed": "2"})
    elsewhere = RUN | {"device": "a GPU"}
    assert is_done(path, elsewhere, anywhere=True)
    for run, anywhere in ((elsewhere, False), (elsewhere | {"seed": "2"}, True)):
        with pytest.raises(OutputError, match="of another run"):
            is_done(path, run, anywhere)
    path.write_text("edited")
    with pytest.raises(OutputError, match="was changed since"):
        is_done(path, RUN)
    for text in ("", "[]", "{}", '{"run": 3, "sha256": 4}'):
        done_record(path).write_text(text)
        with pytest.raises(OutputError, match=r"no out\.done says of which run"):
            is_done(path, RUN)
    done_record(path).write_text('{"run": {"seed": "0"}, "sha256": "of what was there"}')
    with saved_work(path, RUN, FORCE):
        path.write_text("newer")
    assert list(tmp_path.iterdir()) == [path], "a record that is not true is not left"


def test_a_run_that_is_killed_between_publishing_and_clearing_up_ends_with_skip(tmp_path: Path) -> None:
    path = tmp_path / "out"
    stop_after(path, 1)
    path.write_text("published")
    assert not is_done(path, RUN)
    with saved_work(path, RUN, SKIP) as work:
        work.unit("0", never)
        path.write_text("published")
    assert is_done(path, RUN)


def test_a_strange_journal_is_refused_not_trusted(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "out")
    folder.mkdir()
    journal = Journal(folder / "journal")
    journal.append("run", b'["not", "a", "run"]')
    journal.append("0", b"no tensors")
    journal.close()
    with pytest.raises(OutputError, match="another run"), saved_work(tmp_path / "out", RUN):
        pass
    stop_after(tmp_path / "out2", 1)
    journal = Journal(work_folder(tmp_path / "out2") / "journal")
    journal.append("1", b"no tensors")
    journal.close()
    with pytest.raises(OutputError, match="damaged"), saved_work(tmp_path / "out2", RUN) as work:
        work.unit("1", never)


def test_two_at_once_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with saved_work(path, RUN) as work:
        with (
            pytest.raises(OutputError, match=rf"worked on by process {os.getpid()} on .*since"),
            saved_work(path, RUN, FORCE),
        ):
            pass
        work.unit("0", lambda: number(1))  # the refusal has left the folder alone
        assert (work_folder(path) / "journal").exists()


HOLD = """
import fcntl, sys, time
from pathlib import Path
from turboesm_cli.outputs.locks import locked

def no_locks(handle, how):
    raise OSError(int(sys.argv[2]), "no locks")

if sys.argv[2] != "0":
    fcntl.flock = no_locks
with locked(Path(sys.argv[1]) / "lock", Path(sys.argv[1]).with_suffix("")):
    print("held", flush=True)
    time.sleep(60)
"""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def no_locks(_handle: int, _how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, errno.ENOLCK])
def test_a_lock_ends_with_its_process(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has locks, and where it has none."""
    path = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(work_folder(path)), str(number)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    if number:
        without_locks(monkeypatch, number)
    with pytest.raises(OutputError, match=f"worked on by process {process.pid} on"), saved_work(path, RUN):
        pass
    process.send_signal(signal.SIGKILL)
    if number:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie holds nothing
    else:
        process.wait()
    with saved_work(path, RUN):
        path.touch()
    process.wait()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_where_there_are_no_locks_one_process_works_on_an_output(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, number)
    path = tmp_path / "out"
    with saved_work(path, RUN) as work:
        work.unit("0", lambda: {"x": torch.tensor(1)})
        with pytest.raises(OutputError, match=rf"process {os.getpid()} .*remove .*lock\.1"), saved_work(path, RUN):
            pass
        path.touch()
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_that_fails_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(OutputError, match=r"cannot lock .*Input/output error"), saved_work(tmp_path / "out", RUN):
        pass


def test_without_locks_a_process_elsewhere_counts_as_alive_until_its_job_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    path = tmp_path / "out"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stop_after(path, 2)
    held = work_folder(path) / "lock.2"  # the first one is released
    elsewhere = {"place": "another kernel", "process": "1", "started": "1", "job": "17", "restarts": "1"}
    held.write_text(json.dumps(elsewhere | {"who": "process 1 on node9"}))
    for job, restarts in (("17", "1"), ("17", "0"), ("18", "2"), ("", "2")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with (
            pytest.raises(OutputError, match=r"by process 1 on node9; .* remove .*lock\.2"),
            saved_work(path, RUN),
        ):
            pass
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with saved_work(path, RUN) as work:
        assert work.units == 2
        path.touch()
    assert list(tmp_path.iterdir()) == [path]
    for strange in ("", "[]", "{}", "process 1"):
        held.parent.mkdir(exist_ok=True)
        held.write_text(strange)
        with pytest.raises(OutputError, match="being worked on by"), saved_work(path, RUN, FORCE):
            pass


CONTEND = """
import errno, fcntl, os, random, sys, time
from contextlib import suppress
from pathlib import Path
from turboesm_cli.errors import OutputError
from turboesm_cli.outputs.locks import locked, remove_folder

def no_locks(handle, how):
    raise OSError(errno.ENOLCK, "no locks")

def work(child):
    with locked(lock, folder / "out"):
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
        time.sleep(0.0005)
        (folder / "inside").unlink()
        with (folder / "times").open("a") as stream:
            print(child, file=stream)
        if (chance := random.random()) < 0.3:
            os._exit(0)
        if chance > 0.8:
            remove_folder(lock.parent, lock)

fcntl.flock = no_locks
folder, end = Path(sys.argv[1]), time.monotonic() + 1.5
lock = folder / "work" / "lock"
for child in range(4):
    if not os.fork():
        while time.monotonic() < end:
            if not os.fork():
                random.seed()
                for _ in range(8):
                    with suppress(OutputError):
                        work(child)
                os._exit(0)
            if os.waitstatus_to_exitcode(os.wait()[1]):
                os._exit(1)
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for child in range(4)))
"""


def test_without_locks_those_who_contend_come_one_at_a_time(tmp_path: Path) -> None:
    """Although some die over their lock, some release it, and some remove the folder that it is in."""
    done = subprocess.run([sys.executable, "-c", CONTEND, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len({*(tmp_path / "times").read_text().split()}) > 1


@pytest.mark.parametrize("finished", [False, True])
def test_who_loses_a_race_is_told_so_and_harms_nothing(tmp_path: Path, finished: bool) -> None:
    path = tmp_path / "out"
    with (
        pytest.raises(OutputError, match=r"taken over by .* wrote nothing there") as caught,
        saved_work(path, RUN),
        atomic_output(path) as partial,
    ):
        partial.write_text("ours")
        if finished:
            shutil.rmtree(work_folder(path))
            path.write_text("theirs")
        else:
            (work_folder(path) / "lock").write_text("process 1 on another host, since now")
    assert "another process, now done" in str(caught.value) or "process 1 on another host" in str(caught.value)
    assert finished == path.exists() and (not finished or path.read_text() == "theirs")
    assert finished or (work_folder(path) / "lock").exists()


def test_records_that_another_process_wrote_over_are_no_results(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="is another process writing there"),
        saved_work(tmp_path / "out", RUN) as work,
    ):
        work.unit("0", lambda: number(1))
        journal = work_folder(tmp_path / "out") / "journal"
        data = bytearray(journal.read_bytes())
        data[-1] ^= 1
        journal.write_bytes(data)
        work.unit("0", never)


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "out"
    big = {"x": torch.zeros(5000)}
    with (
        files_of_at_most(30_000),
        pytest.raises(OutputError, match="cannot save work in") as caught,
        saved_work(path, RUN) as work,
    ):
        for index in range(5):
            work.unit(str(index), lambda: big)
    assert "run the same command again" in caught.value.__notes__[0]
    with saved_work(path, RUN) as work:
        assert work.units == 1
        assert torch.equal(work.unit("0", never)["x"], big["x"])


def test_what_another_process_was_writing_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "out"
    stop_after(path, 1)
    (work_folder(path) / ".turboesm-x.part").write_text("half")
    with pytest.raises(KeyboardInterrupt), saved_work(path, RUN):
        assert not list(work_folder(path).glob(".turboesm-*.part"))
        raise KeyboardInterrupt


def test_work_that_is_not_kept_is_computed() -> None:
    assert float(NOTHING_KEPT.under("a").unit("x", lambda: number(2))["x"]) == 2
    assert NOTHING_KEPT.total("x") == {}
    assert not isinstance(NOTHING_KEPT, SavedWork)


def test_a_file_of_the_users_that_is_called_done_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for mine in ("", "by make", "{}", '{"run": {}}', '{"run": [], "sha256": ""}'):
        done_record(path).write_text(mine)
        with saved_work(path, RUN):
            pass
        with pytest.raises(OutputError, match="is no record of turboesm"), saved_work(path, RUN, SKIP):
            pass
        assert done_record(path).read_text() == mine
