"""Outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from turboesm_cli.errors import OutputError
from turboesm_cli.outputs.locks import check_held

OVERWRITES = "overwrites"
"""A file in a work folder that says so: see `overwrites`."""


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
        check_held(path)
        if seal is not None:
            seal(partial)
        _publish(partial, path)
    except OSError as error:
        check_held(path)  # whoever took it over has cleared this process's files away
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
