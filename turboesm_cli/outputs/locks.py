"""Locks: one process at a time works on an output, and a lock ends with its process.

    LOCK      held by `flock`: the kernel frees it when its process ends, on whichever host that is
    LOCK.N    where the file system has no `flock`: the highest N holds. It is created exclusively, and says whose
              it is, in JSON; the next one is created only if that process has ended

Whether a process has ended is known of this host, and of an earlier run of this Slurm job, which Slurm has ended
before it starts the job again. Any other counts as alive: who knows better removes the file.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from turboesm_cli import whereabouts
from turboesm_cli.errors import OutputError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What `flock` raises where a file system has no locks, or none for now."""
_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_READ = 2000


@dataclass(frozen=True)
class _Hold:
    """A file that holds an output for this process as long as it says `text`; `number` is N of LOCK.N, else 0."""

    lock: Path
    text: str
    number: int = 0

    @property
    def file(self) -> Path:
        return _numbered(self.lock, self.number)

    @property
    def lasts(self) -> bool:
        newest = not self.number or _numbers(self.lock)[-1:] == [self.number]
        return newest and _said(self.file) == self.text


_held: dict[Path, _Hold] = {}
"""Outputs that this process works on."""


@contextmanager
def locked(lock: Path, path: Path) -> Iterator[None]:
    """Hold the file `lock`, its folder made if need be, while output `path` is worked on.

    Raises OutputError where another process holds it, naming that process, and where no lock can be had.
    """
    path, who = Path(path).resolve(), _who()
    for _ in range(100):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # who held it has just removed the folder
            continue
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; choose another output path") from error
        try:
            hold = _by_flock(handle, lock, path, who)
            if hold is not None:
                _held[path] = hold
                try:
                    yield
                finally:
                    del _held[path]
                    if hold.number:
                        clear(lock, hold.number)
                return
        finally:
            os.close(handle)
    raise OutputError(f"cannot write {path}: {lock} cannot be held; choose another output path")


def clear(lock: Path, last: int | None = None) -> None:
    """Remove the files LOCK.N, up to `last`; the highest one goes last, so that it holds until then."""
    for number in _numbers(lock):
        if last is None or number <= last:
            with suppress(OSError):
                _numbered(lock, number).unlink()


def is_held(path: Path) -> bool:
    """Whether this process works on output `path`, and no other one has taken it over."""
    path = Path(path).resolve()
    return path in _held and _held[path].lasts


def check_held(path: Path) -> None:
    """Raise OutputError where `path` is worked on by this process, and another one has taken it over."""
    if path in _held and not is_held(path):
        hold = _held[path]
        newest = max(_numbers(hold.lock), default=0)
        other = _named(_said(_numbered(hold.lock, newest)), newest) or "another process, now done,"
        raise OutputError(
            f"{path} was taken over by {other} while this process worked on it, and this one wrote nothing there: "
            "its file system has no locks; let one process at a time work on an output"
        )


def _by_flock(handle: int, lock: Path, path: Path, who: str) -> _Hold | None:
    """The lock, or None where it has to be tried again. Raises OutputError."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise _busy(path, _named(_said(lock), 0)) from error
        if error.errno not in _NO_LOCKS:
            raise OutputError(f"cannot lock {lock}: {error.strerror}; choose another output path") from error
        return _by_number(lock, path, who)
    if not _is_at(handle, lock):
        return None
    os.truncate(handle, 0)
    os.pwrite(handle, who.encode(), 0)
    return _Hold(lock, who)


def _by_number(lock: Path, path: Path, who: str) -> _Hold | None:
    """The same without `flock`."""
    before = _numbers(lock)
    if before:
        newest = _numbered(lock, before[-1])
        said = _said(newest)
        if _is_alive(said):
            end = f"; its file system has no locks: if that process has ended, remove {newest}"
            raise _busy(path, _named(said, before[-1]), end)
    number = max(before, default=0) + 1
    text = json.dumps(_identity() | {"who": who})
    try:
        handle = os.open(_numbered(lock, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except (FileExistsError, FileNotFoundError):
        return None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another output path") from error
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)
    if not {*_numbers(lock)} <= {*before, number}:  # another process has done all its work since `before`
        _numbered(lock, number).unlink(missing_ok=True)
        return None
    return _Hold(lock, text, number)


def _numbers(lock: Path) -> list[int]:
    """N of the files LOCK.N, in their order."""
    with suppress(FileNotFoundError):
        found = (path.name.removeprefix(f"{lock.name}.") for path in lock.parent.iterdir())
        return sorted(int(end) for end in found if end.isascii() and end.isdigit())
    return []


def _numbered(lock: Path, number: int) -> Path:
    return lock.with_name(f"{lock.name}.{number}") if number else lock


def _said(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(_READ)
    except OSError:
        return ""


def _named(said: str, number: int) -> str:
    """The process that a lock names, as words that can be shown; "" where it names none."""
    words = said
    if number:
        with suppress(ValueError, TypeError, KeyError):
            words = str(json.loads(said)["who"])
    return "".join(filter(str.isprintable, words[:200]))


def _busy(path: Path, who: str, end: str = "") -> OutputError:
    other = who or "another process"
    return OutputError(f"{path} is being worked on by {other}; wait for it, or choose another output path{end}")


def _identity() -> dict[str, str]:
    """What this process is told from others by: kernel and namespace, process, its start, and its job."""
    process = str(os.getpid())
    return {
        "place": _place(),
        "process": process,
        "started": _started(process),
        "job": whereabouts.slurm_job(),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _is_alive(said: str) -> bool:
    """Whether the process of an identity may be alive."""
    own = _identity()
    try:
        other = {name: str(json.loads(said)[name]) for name in own}
        if own["place"] and other["place"] == own["place"]:
            return bool(other["process"].isdecimal()) and _started(other["process"]) == other["started"]
        ended = own["job"] and other["job"] == own["job"] and int(other["restarts"]) < int(own["restarts"])
        return not ended
    except (ValueError, TypeError, KeyError):
        return True


def _place() -> str:
    """This boot of this host and this namespace of processes, or "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(process: str) -> str:
    """When a process of this place started, in ticks since boot, or "" where it has ended."""
    try:
        state, *rest = (Path("/proc") / process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    except (OSError, ValueError, IndexError):
        return ""


def _is_at(handle: int, lock: Path) -> bool:
    """Whether the open file is still the one at the path: its folder goes when the work is finished."""
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _who() -> str:
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    job = whereabouts.slurm_job()
    return f"process {os.getpid()} on {whereabouts.host()}, since {now}" + (f", Slurm job {job}" if job else "")
