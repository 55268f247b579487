"""A file, a pipe or standard input, opened once however often it is read, and watched while it is.

A regular file is read from its first byte by each reader, through the one handle: one that is renamed, replaced or
deleted meanwhile is read on as it was, and one that is written to is noticed. Anything else can be read once.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import sys
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from turboesm_cli.errors import InputError

_HANDLE = re.compile(r"/dev/stdin|(?:/dev|/proc/self)/fd/(\d{1,9})").fullmatch


class Input:
    """An open input: a context, or closed when it is no longer referred to. Raises InputError."""

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self.label = "standard input" if self.source == "-" else self.source
        self._stream = _standard_input() if self.source == "-" else _open_file(Path(source), self.label)
        self._close = weakref.finalize(self, self._stream.close if self.source != "-" else _leave_open)
        found = self._stat()
        self._regular = found is not None and stat.S_ISREG(found.st_mode)
        self._first = _stamp(found)

    def __enter__(self) -> Input:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._close()

    @property
    def rereadable(self) -> bool:
        """Whether `stream` gives the same bytes again."""
        return self._regular and self.source != "-"

    def stream(self) -> BinaryIO:
        """The bytes: of a regular file from the first one on, of all else what is left."""
        if not self.rereadable:
            return self._stream
        return io.BufferedReader(_Positioned(self._stream, self))

    def require_unchanged(self, links: bool = False) -> None:
        """Raise InputError where a regular file was written to since it was opened; with `links`, or renamed.

        A writer may set the time of its last write back, but not that of the last change, which renames move, too.
        """
        fields = None if links else -1
        if self._regular and _stamp(self._stat())[:fields] != self._first[:fields]:
            raise InputError(f"{self.label} changed while it was read; run the command again")

    def _stat(self) -> os.stat_result | None:
        try:
            return os.fstat(self._stream.fileno())
        except (OSError, AttributeError):  # a stream in memory
            return None


class _Positioned(io.RawIOBase):
    """A reader of its own on a handle that others read, too; it keeps the input open."""

    def __init__(self, stream: BinaryIO, owner: Input) -> None:
        self._handle, self._owner, self._at = stream.fileno(), owner, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = os.preadv(self._handle, [buffer], self._at)
        self._at += size
        return size


def _stamp(found: os.stat_result | None) -> tuple[int, ...]:
    return () if found is None else (found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _leave_open() -> None:
    """Standard input is not ours to close."""


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise InputError("standard input is closed; name a FASTA file")
    return cast(BinaryIO, sys.stdin.buffer)


def _open_file(path: Path, label: str) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise InputError(f"{label}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{label}: is a folder; name a FASTA file in it") from error
    except PermissionError as error:
        raise InputError(f"{label}: no permission to read it; try `chmod u+r`") from error
    except OSError as error:
        if error.errno == errno.ENXIO and (named := _HANDLE(str(path))):  # a socket
            return os.fdopen(os.dup(int(named[1] or 0)), "rb")
        raise InputError(f"{label}: cannot be opened: {error.strerror}") from error
