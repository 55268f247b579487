"""A file or standard input, compressed or not → lines of text, in pieces of bounded size."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from turboesm_cli.errors import InputError
from turboesm_cli.tokens import MASK_TEXT

PIECE = 1 << 16  # characters of a line held at once
_MASK_BEGUN = re.compile(r"<(m(a(sk?)?)?)?\Z").search
_UNDECODED = re.compile("[\udc80-\udcff]").search  # what `surrogateescape` makes of bytes that are not UTF-8


@dataclass(frozen=True)
class Text:
    """The decompressed text of a source."""

    stream: TextIO
    label: str
    compression: str  # "" where there is none
    damage: tuple[type[Exception], ...]  # what damaged data raise

    def read(self, line: int) -> str:
        """Return the rest of the line, or some 64 Ki characters of it; "" at the end of the text."""
        try:
            piece = self.stream.readline(PIECE)
            if len(piece) < PIECE or not (begun := _MASK_BEGUN(piece)):
                return piece
            # A <mask> must not be cut in two, or neither half would be known.
            return piece + self.stream.readline(len(MASK_TEXT) - len(begun[0]))
        except self.damage as error:
            raise InputError(self._unreadable(line, error)) from error

    def _unreadable(self, line: int, error: Exception) -> str:
        what = str(error) or type(error).__name__
        if self.compression:
            what = f"{self.compression} data damaged or cut off: {what}"
            return f"{self.label}: cannot be read beyond line {line}: {what}; fetch the file again"
        return f"{self.label}: cannot be read beyond line {line}: {what}; check the disk or the pipe"


class Piece(NamedTuple):
    """A line without its end, or a part of a very long one."""

    line: int
    column: int  # of the first character, counted from 1
    text: str


class _Rejoined(io.RawIOBase):
    """A stream with the bytes that were read to tell its format put back in front; a pipe cannot seek."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = len(buffer)
        data = self._head[:size] or self._rest.read(size)
        self._head = self._head[size:]
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def opened(source: str | Path) -> Iterator[Text]:
    """The text of a file, or of standard input where `source` is `-`. Raises InputError."""
    label = "standard input" if str(source) == "-" else str(source)
    with _binary(source, label) as stream:
        try:
            head = stream.read(6)
        except OSError as error:
            raise InputError(f"{label}: cannot be read: {error.strerror or error}") from error
        yield _decoded(head, io.BufferedReader(_Rejoined(head, stream), 1 << 17), label)


@contextmanager
def _binary(source: str | Path, label: str) -> Iterator[BinaryIO]:
    if str(source) == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed; name a FASTA file")
        yield sys.stdin.buffer
        return
    with _open_file(Path(source), label) as stream:
        yield stream


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
        raise InputError(f"{label}: cannot be opened: {error.strerror}") from error


def _decoded(head: bytes, stream: io.BufferedReader, label: str) -> Text:
    name, data, damage = _decompressed(head, stream, label)
    # Bytes that are not UTF-8 pass as lone surrogates, so that the line that holds them can be named.
    text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline=None)
    return Text(text, label, name, damage)


def _decompressed(
    head: bytes, stream: io.BufferedReader, label: str
) -> tuple[str, BinaryIO, tuple[type[Exception], ...]]:
    if head.startswith(b"\x1f\x8b"):
        return "gzip", cast(BinaryIO, gzip.GzipFile(fileobj=stream)), (OSError, EOFError, zlib.error)
    if re.match(rb"BZh[1-9][1\x17]", head):
        return "bzip2", cast(BinaryIO, bz2.BZ2File(stream)), (OSError, EOFError)
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz", cast(BinaryIO, lzma.LZMAFile(stream)), (OSError, EOFError, MemoryError, lzma.LZMAError)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        zstd = _zstd(label)
        return "zstd", zstd.ZstdFile(stream), (OSError, EOFError, zstd.ZstdError)
    return "", stream, (OSError,)


def _zstd(label: str) -> Any:
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise InputError(f"{label}: is compressed by zstd; `pip install backports.zstd`, or decompress it first")


def pieces(text: Text) -> Iterator[Piece]:
    """The lines of a text, long ones in parts. Raises InputError for what is no text in UTF-8."""
    line = column = 1
    while piece := text.read(line):
        if "\0" in piece:
            raise InputError(f"{text.label}: NUL byte at line {line}; give FASTA as text, in UTF-8")
        if not piece.isascii() and _UNDECODED(piece):
            raise InputError(f"{text.label}: line {line} is not UTF-8; give FASTA as text, in UTF-8")
        if piece.endswith("\n"):
            yield Piece(line, column, piece[:-1])
            line, column = line + 1, 1
        else:
            yield Piece(line, column, piece)
            column += len(piece)
