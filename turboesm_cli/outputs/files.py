"""Outputs that appear whole or not at all, and locks that end with their process."""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from turboesm_cli import whereabouts
from turboesm_cli.errors import OutputError

OVERWRITES = "overwrites"
"""A file in a work folder that says so: see `overwrites`."""
_held: dict[Path, tuple[Path, str]] = {}
"""Outputs that this process works on: the lock of each, and what the process wrote into it."""


@contextmanager
def atomic_output(
    path: Path, seal: Callable[[Path], None] | None = None, body: Path | None = None
) -> Iterator[Path]:
    """Yield a path beside `path`, or in its work folder; on success it is synced and renamed to `path`.

    seal  is given what was written before it is renamed
    body  the file in the work folder to yield and to rename; it is made where there is none

    On any exception the partial file is removed, unless it is `body`, and `path` is left as it was. Raises
    OutputError where the folder cannot be written to or the disk is full.
    """
    path = Path(path).resolve()  # a link's target is replaced, not the link
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: it is no regular file; choose another output path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = work_folder(path)
        folder = work if work.is_dir() else path.parent  # what kill -9 leaves there goes with the folder
        partial = _new_partial(folder) if body is None else body
        partial.touch()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another output path") from error
    try:
        yield partial
        _check_held(path)
        if seal is not None:
            seal(partial)
        _publish(partial, path)
    except OSError as error:
        _check_held(path)  # whoever took it over has cleared this process's files away
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if body is None:
            partial.unlink(missing_ok=True)


def _new_partial(folder: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=".turboesm-", suffix=".part", dir=folder)
    os.close(handle)
    return Path(name)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all. Raises OutputError."""
    with atomic_output(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_output(path: Path, may_exist: bool) -> None:
    """Raise OutputError where `path` cannot be written, or exists and may not, before any work is done for it."""
    if str(path) == "-":
        raise OutputError("this output cannot go to stdout; name a file (--json prints results there)")
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OutputError(
            f"cannot write {str(path)[:200]}: {error.strerror}; choose another output path"
        ) from error
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: it is no regular file; choose another output path")
    if path.exists() and not may_exist:
        raise OutputError(f"{path} exists; pass --force to overwrite it, or choose another output path")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write {path}: {parent} is no folder that can be written to; choose another path"
        )


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def work_folder(path: Path) -> Path:
    """The folder beside output `path` in which unfinished work on it is kept."""
    path = Path(path).resolve()
    return path.with_name(f"{path.name}.partial")


def overwrites(path: Path) -> bool:
    """Whether unfinished work on output `path` was begun with leave to overwrite it."""
    return (work_folder(path) / OVERWRITES).exists()


@contextmanager
def locked(lock: Path, path: Path) -> Iterator[None]:
    """Hold the file `lock`, its folder made if need be, while output `path` is worked on.

    The kernel lets go of it when the process ends, however it ends. Raises OutputError where another process
    holds it, naming that process. Where the file system knows no locks, a process of this host that is alive
    counts as holding it; one of another host may take it over, which this one is told of when it publishes.
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
            _lock(handle, path)
            if _is_at(handle, lock):
                os.truncate(handle, 0)
                os.pwrite(handle, who.encode(), 0)
                _held[path] = lock, who
                try:
                    yield
                finally:
                    del _held[path]
                return
        finally:
            os.close(handle)
    raise OutputError(f"cannot write {path}: {lock} cannot be held; choose another output path")


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(path, _read(handle)) from error
    except OSError as error:  # the file system knows no locks
        who = _read(handle)
        process, _, rest = who.removeprefix("process ").partition(" on ")
        if process.isdecimal() and rest.startswith(f"{whereabouts.host()}, ") and _is_alive(int(process)):
            raise _busy(path, who) from error


def _read(handle: int) -> str:
    who = os.pread(handle, 200, 0).decode(errors="replace")
    return "".join(letter for letter in who if letter.isprintable()) or "another process"


def _busy(path: Path, who: str) -> OutputError:
    return OutputError(f"{path} is being worked on by {who}; wait for it, or choose another output path")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return process != os.getpid()


def is_held(path: Path) -> bool:
    """Whether this process works on output `path`, and no other one has taken it over."""
    path = Path(path).resolve()
    return path in _held and _who_holds(_held[path][0]) == _held[path][1]


def _who_holds(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _check_held(path: Path) -> None:
    """Raise OutputError where `path` is worked on by this process, and another one has taken it over."""
    if path in _held and not is_held(path):
        found = _who_holds(_held[path][0])
        other = "".join(letter for letter in found[:200] if letter.isprintable()) or "another process, now done,"
        raise OutputError(
            f"{path} was taken over by {other} while this process worked on it, and this one wrote nothing there: "
            "its file system has no locks; let one process at a time work on an output"
        )


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


def _publish(partial: Path, path: Path) -> None:
    with partial.open("rb") as stream:
        sync(stream.fileno())
    umask = os.umask(0)
    os.umask(umask)
    with _where_known():
        partial.chmod(0o666 & ~umask)
    partial.replace(path)
    with _where_known():
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sync(handle: int) -> None:
    """Have an open file on the disk, where its file system can tell. Raises OSError where that fails."""
    with _where_known():
        os.fsync(handle)


_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}


@contextmanager
def _where_known() -> Iterator[None]:
    """For what some file systems do not know (network shares, exFAT, FUSE), and outputs are whole without."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
