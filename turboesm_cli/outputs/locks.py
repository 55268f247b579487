"""Locks: one process at a time works on an output, and a lock ends with its process.

    LOCK      held by `flock`: the kernel frees it when its process ends, on whichever host that is
    LOCK.N    where the file system has no `flock`: the highest N holds. It is created exclusively, and says whose
              it is, in JSON; the next one is created only if that process has ended, or has written RELEASED.
              No N is used again: the files go with their folder, which is renamed before it is emptied

Whether a process has ended is known of this host, and of an earlier run of this Slurm job, which Slurm has ended
before it starts the job again. Any other counts as alive: who knows better removes the file.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import shutil
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
RELEASED = "\nreleased\n"


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
        newest = not self.number or _newest(self.lock.parent, self.lock) == self.number
        return newest and _said(self.file) == self.text

    def release(self) -> None:
        """Let others have a lock that the kernel knows nothing of."""
        if self.number and self.lasts:
            with suppress(OSError), self.file.open("a", encoding="utf-8") as stream:
                stream.write(RELEASED)


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
                    hold.release()
                return
        finally:
            os.close(handle)
    raise OutputError(f"cannot write {path}: {lock} cannot be held; choose another output path")


def remove_folder(folder: Path, lock: Path) -> None:
    """Remove the folder of a lock with all that is in it, as who holds the lock may."""
    with suppress(OSError):
        if _newest(folder, lock):
            folder = folder.rename(folder.with_name(f"{folder.name}.{os.getpid()}.removed"))
        shutil.rmtree(folder, ignore_errors=True)


def is_lock(path: Path, lock: Path) -> bool:
    """Whether a file is `lock` or one of LOCK.N."""
    return path.name == lock.name or _number(path.name, lock) > 0


def is_held(path: Path) -> bool:
    """Whether this process works on output `path`, and no other one has taken it over."""
    path = Path(path).resolve()
    return path in _held and _held[path].lasts


def check_held(path: Path) -> None:
    """Raise OutputError where `path` is worked on by this process, and another one has taken it over."""
    if path in _held and not is_held(path):
        hold = _held[path]
        newest = _newest(hold.lock.parent, hold.lock)
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
    text = json.dumps(_identity() | {"who": who})
    try:
        folder = os.open(lock.parent, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        newest = _newest(folder, lock)
        if newest and _is_alive(said := _said(_numbered(lock, newest).name, folder)):
            end = f"; its file system has no locks: if that process has ended, remove {_numbered(lock, newest)}"
            raise _busy(path, _named(said, newest), end)
        name = _numbered(lock, newest + 1).name
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)
        return _Hold(lock, text, newest + 1) if _is_at(folder, lock.parent) else None
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOENT, errno.ESTALE):
            return None
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another output path") from error
    finally:
        os.close(folder)


def _newest(folder: Path | int, lock: Path) -> int:
    """The highest N of the files LOCK.N in a folder, or one that is open; 0 where there are none."""
    try:
        with os.scandir(folder) as found:
            return max((_number(entry.name, lock) for entry in found), default=0)
    except FileNotFoundError:
        return 0


def _number(name: str, lock: Path) -> int:
    end = name.removeprefix(f"{lock.name}.")
    return int(end) if end != name and end.isascii() and end.isdigit() else 0


def _numbered(lock: Path, number: int) -> Path:
    return lock.with_name(f"{lock.name}.{number}") if number else lock


def _said(file: Path | str, folder: int | None = None) -> str:
    """What a file says; `folder` is the open one that it is in."""
    try:
        handle = os.open(file, os.O_RDONLY, dir_fd=folder)
    except OSError:
        return ""
    try:
        return os.read(handle, _READ).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(handle)


def _named(said: str, number: int) -> str:
    """The process that a lock names, as words that can be shown; "" where it names none."""
    words = said
    if number:
        with suppress(ValueError, TypeError, KeyError):
            words = str(json.loads(said.removesuffix(RELEASED))["who"])
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
    if said.endswith(RELEASED):
        return False
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
