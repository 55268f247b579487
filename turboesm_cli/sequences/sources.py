"""A file or standard input, compressed or not → lines of text, in pieces of bounded size."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.inputs import Input
from turboesm_cli.sequences.residues import MASK_TEXT

PIECE = 1 << 16  # characters of a line held at once
_HEAD = 512  # bytes that tell what a file is
_COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b").match,
    "bzip2": re.compile(rb"BZh[1-9][1\x17]").match,
    "xz": re.compile(rb"\xfd7zXZ\0").match,
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd").match,
}
_UNPACK = "an archive, not FASTA; unpack it and name the FASTA file in it"
_EXPORT = "not FASTA; write its sequences to a FASTA file"
BINARY = (
    (257, b"ustar", f"a tar file: {_UNPACK} (`tar -xf`)"),
    (
        0,
        b"PK\x03\x04",
        f"a zip file (as are PyTorch's): {_UNPACK} (`unzip`); caches of quantize are for `decode`, never piped",
    ),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z file: {_UNPACK} (`7z x`)"),
    (0, b"Rar!", f"a RAR file: {_UNPACK} (`unrar x`)"),
    (0, b"\x1f\x9d", "compressed by `compress`; decompress it (`uncompress`), then name that file"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4; decompress it (`unlz4`), then name that file"),
    *((0, bytes([0x80, protocol]), f"a pickled Python object, {_EXPORT}") for protocol in range(2, 6)),
    (0, b"\x89HDF", f"an HDF5 file, {_EXPORT}"),
    (0, b"\x93NUMPY", f"a NumPy array, {_EXPORT}"),
    (0, b"PAR1", f"a Parquet table, {_EXPORT}"),
    (0, b"SQLite format 3", f"an SQLite database, {_EXPORT}"),
    (0, b"\xd0\xcf\x11\xe0", f"a file of Microsoft Office, {_EXPORT}"),
    (0, b"%PDF-", f"a PDF document, {_EXPORT}"),
)
"""Where in a file what bytes tell what it is."""

FOREIGN = {
    "@": "but like FASTQ or SAM, reads of nucleotides, to be assembled and translated to protein first",
    "##gff": "but like GFF",
    "#NEXUS": "but like NEXUS",
    "ID   ": "but like a record of a database that holds no sequences",
    "<": "but like HTML or XML",
    "{": "but like JSON",
    "[": "but like JSON",
    "version https://git-lfs": "but like a Git LFS pointer; fetch the file itself (`git lfs pull`)",
}
"""How texts of other formats begin."""

_MASK_BEGUN = re.compile(r"<(m(a(sk?)?)?)?\Z").search
_UNDECODED = re.compile("[\udc80-\udcff]").search  # what `surrogateescape` makes of bytes that are not UTF-8


@dataclass(frozen=True)
class Text:
    """The decompressed text of a source."""

    stream: TextIO
    label: str
    compression: str  # "" where there is none
    damage: tuple[type[Exception], ...]  # what damaged data raise
    head: str = ""  # some hundred characters of its beginning, which tell its format

    def read(self, line: int) -> str:
        """Return the rest of the line, or some 64 Ki characters of it; "" at the end of the text."""
        try:
            piece = self.stream.readline(PIECE)
            if len(piece) < PIECE or not (begun := _MASK_BEGUN(piece)):
                return piece
            # A <mask> must not be cut in two, or neither half would be known.
            return piece + self.stream.readline(len(MASK_TEXT) - len(begun[0]))
        except self.damage as error:
            raise InputError(_unreadable(self.label, self.compression, line, error)) from error


def _unreadable(label: str, compression: str, line: int, error: Exception) -> str:
    what = str(error) or type(error).__name__
    if compression:
        what = f"{compression} data damaged or cut off: {what}"
        return f"{label}: cannot be read beyond line {line}: {what}; fetch the file again"
    return f"{label}: cannot be read beyond line {line}: {what}; check the disk or the pipe"


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
def opened(source: str | Path | Input) -> Iterator[Text]:
    """Open a file or, as `-`, standard input, or take an input that is open. Raises InputError."""
    with ExitStack() as stack:
        found = source if isinstance(source, Input) else stack.enter_context(Input(source))
        head, stream = _headed(found.stream(), (OSError,), found.label, "")
        yield _decoded(head, stream, found.label)


def _headed(
    stream: BinaryIO, damage: tuple[type[Exception], ...], label: str, compression: str
) -> tuple[bytes, io.BufferedReader]:
    """The first bytes of a stream, and the whole stream."""
    try:
        head = stream.read(_HEAD)
    except damage as error:
        raise InputError(_unreadable(label, compression, 1, error)) from error
    return head, io.BufferedReader(_Rejoined(head, stream), 1 << 17)


def _decoded(head: bytes, stream: io.BufferedReader, label: str) -> Text:
    name, data, damage = _decompressed(head, stream, label)
    if name:
        head, data = _headed(data, damage, label, name)
    _require_text(head, label, name)
    # Bytes that are not UTF-8 pass as lone surrogates, so that the line that holds them can be named.
    text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline=None)
    return Text(text, label, name, damage, head.decode("utf-8-sig", "replace").replace("\r\n", "\n"))


def _require_text(head: bytes, label: str, compression: str) -> None:
    """Raise InputError, saying what it is, for a well-known kind of file that is no text."""
    if compression and (inner := _compression(head)):
        raise InputError(f"{label}: is {inner} within {compression}; decompress it once, then name that file")
    for at, start, what in BINARY:
        if head.startswith(start, at):
            raise InputError(f"{label}: is {what}")


def _compression(head: bytes) -> str:
    return next((name for name, matches in _COMPRESSED.items() if matches(head)), "")


def _decompressed(
    head: bytes, stream: io.BufferedReader, label: str
) -> tuple[str, BinaryIO, tuple[type[Exception], ...]]:
    name = _compression(head)
    if name == "gzip":
        return name, cast(BinaryIO, gzip.GzipFile(fileobj=stream)), (OSError, EOFError, zlib.error)
    if name == "bzip2":
        return name, cast(BinaryIO, bz2.BZ2File(stream)), (OSError, EOFError)
    if name == "xz":
        return name, cast(BinaryIO, lzma.LZMAFile(stream)), (OSError, EOFError, MemoryError, lzma.LZMAError)
    if name == "zstd":
        zstd = _zstd(label)
        return name, zstd.ZstdFile(stream), (OSError, EOFError, zstd.ZstdError)
    return "", cast(BinaryIO, stream), (OSError,)


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
            raise InputError(f"{text.label}: NUL byte at line {line}; give it as text, in UTF-8")
        if not piece.isascii() and _UNDECODED(piece):
            raise InputError(f"{text.label}: line {line} is not UTF-8; give it as text, in UTF-8")
        if piece.endswith("\n"):
            yield Piece(line, column, piece[:-1])
            line, column = line + 1, 1
        else:
            yield Piece(line, column, piece)
            column += len(piece)
