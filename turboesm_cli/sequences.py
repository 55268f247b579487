"""FASTA → checked protein records → tokens of ESM-2.

`read_fasta` streams: it holds one piece of a line and one record at a time, and beyond that only the
identifiers and the report. What it meets, and what it then does:

| met                                                      | done                                          |
|----------------------------------------------------------|-----------------------------------------------|
| gzip, bzip2, xz (told by content, not by name)           | accept                                        |
| zstd                                                     | accept with Python 3.14 or `backports.zstd`   |
| `-`                                                      | accept: standard input                        |
| CRLF or CR line ends, UTF-8 byte-order mark, blank lines | accept                                        |
| U Z B X O, and the literal `<mask>` on one line          | accept: tokens of ESM-2                       |
| lower case (soft-masking)                                | mend: upper-cased                             |
| blanks and digits in sequence lines                      | mend: dropped                                 |
| gaps `-` and `.`                                         | mend: dropped, for they are no residues       |
| one `*` at the end                                       | mend: dropped                                 |
| J (leucine or isoleucine)                                | mend: read as X, for ESM-2 has no J           |
| empty header                                             | mend: named `record-N`                        |
| control characters in a header                           | mend: replaced by spaces                      |
| accession over 200 or description over 2,000 characters  | mend: shortened                               |
| identifier seen before                                   | mend: renamed `ID.2`, `ID.3`, ...             |
| over `max_residues`, policy `truncate`                   | mend: cut to the first `max_residues`         |
| over `max_residues`, policy `window`                     | accept: windows `ID/1-1022`, `ID/1023-2044`.. |
| `*` elsewhere, any other letter or symbol                | reject                                        |
| no residues after the header                             | reject                                        |
| 60 residues or more, all of ACGTUN                       | reject: looks like nucleotides                |
| first 20 records all of ACGTUN, 60 residues or more      | stop: looks like nucleotides                  |
| over `max_residues`, policy `error`                      | stop                                          |
| over 1,000,000 residues in a record                      | stop, whatever the policy                     |
| no file, a folder, no permission, damaged compression    | stop                                          |
| NUL bytes, bytes that are not UTF-8                      | stop: no text                                 |
| text before the first `>`, no record, no good record     | stop                                          |

A mend is counted in the report, a reject skips the record and leaves a row there, a stop raises
InputError. With `strict` the first mend or reject is a stop, truncation included. Records before a stop
have been yielded by then: what is made of them should be published only once the iterator is exhausted.

Not done: other formats, such as FASTQ; `;` comments; compression within compression; a `<mask>` that is
folded over two lines, which is rejected.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import io
import lzma
import re
import string
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from turboesm_cli.errors import InputError
from turboesm_cli.files import atomic_output

MAX_RESIDUES = 1022  # ESM-2 was trained with crops of 1024 tokens, <cls> and <eos> included
RECORD_CAP = 1_000_000  # the longest known protein has some 45,000 residues; beyond this, memory is at stake
MAX_ACCESSION = 200
MAX_DESCRIPTION = 2000
NUCLEOTIDE_RESIDUES = 60  # a peptide may by chance hold only ACGTUN; a protein of this length does not
NUCLEOTIDE_RECORDS = 20

CLS, PAD, EOS, UNK, MASK = 0, 1, 2, 3, 32
MASK_TEXT = "<mask>"
VOCABULARY = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", MASK_TEXT)

_SILENT = frozenset({CLS, PAD, EOS})
_TOKEN_OF = {text: token for token, text in enumerate(VOCABULARY) if token not in _SILENT}
_TOKEN = re.compile(r"<[a-z_0-9]+>|.", re.DOTALL)

_PIECE = 1 << 16  # characters of a line held at once
_ONLY_RESIDUES = re.compile("[A-IK-Z]*").fullmatch  # every letter but J is a token of ESM-2
_MASK_BEGUN = re.compile(r"<(m(a(sk?)?)?)?\Z").search
_UNDECODED = re.compile("[\udc80-\udcff]").search  # what `surrogateescape` makes of bytes that are not UTF-8
_NUCLEOTIDES = "ACGTUN"


class Mend(StrEnum):
    """What was mended in a record; the keys of `ReadReport.mended`."""

    LOWER_CASE = "lower-case letters upper-cased"
    BLANKS = "blanks or digits dropped"
    GAPS = "gaps dropped"
    STOP = "final stop '*' dropped"
    J = "J read as X"
    UNNAMED = "empty header named by its record number"
    CONTROL = "control characters in the header replaced by spaces"
    LONG_HEADER = "long header shortened"
    DUPLICATE = "duplicate identifier renamed"
    TRUNCATED = "long sequence truncated"


_MENDABLE = {
    Mend.LOWER_CASE: frozenset(string.ascii_lowercase),
    Mend.BLANKS: frozenset(" \t\v\f" + string.digits),
    Mend.GAPS: frozenset("-."),
    Mend.J: frozenset("Jj"),
}
_KNOWN = frozenset(string.ascii_uppercase + "*").union(*_MENDABLE.values())
_MENDED = str.maketrans(
    string.ascii_lowercase + "J", string.ascii_uppercase.replace("J", "X") + "X", " \t\v\f-." + string.digits
)


class LongPolicy(StrEnum):
    """What to do with a record of more than `max_residues` residues."""

    ERROR = "error"
    TRUNCATE = "truncate"
    WINDOW = "window"


@dataclass(frozen=True)
class Protein:
    """One sequence to be tokenized, and where it was read."""

    accession: str  # first word of the header
    description: str  # rest of the header
    sequence: str  # upper-case letters of ESM-2's alphabet; the literal "<mask>" may occur
    source: str = ""  # name of the file, or "-"
    record: int = 0  # counted from 1
    line: int = 0  # line of the header, counted from 1

    @property
    def residues(self) -> int:
        """Length in tokens, without <cls> and <eos>; a <mask> counts one."""
        return _count(self.sequence)


@dataclass(frozen=True)
class ReadPolicy:
    """How `read_fasta` treats what it could mend or skip, and long records."""

    strict: bool = False  # stop at the first thing that would be mended or skipped
    long: LongPolicy = LongPolicy.ERROR
    max_residues: int = MAX_RESIDUES

    def __post_init__(self) -> None:
        if self.max_residues < 1:
            raise InputError(f"max_residues is {self.max_residues}; give at least 1")


@dataclass(frozen=True)
class Reject:
    """A record that was skipped, and why."""

    source: str
    record: int
    line: int
    accession: str
    reason: str


@dataclass
class ReadReport:
    """What `read_fasta` did, filled while it runs; one report may serve several files."""

    accepted: int = 0  # records, not windows of them
    mended: Counter[str] = field(default_factory=Counter)  # what was mended → in how many accepted records
    rejects: list[Reject] = field(default_factory=list)


def read_fasta(
    source: str | Path, policy: ReadPolicy = ReadPolicy(), report: ReadReport | None = None
) -> Iterator[Protein]:
    """Yield the proteins of a FASTA file, compressed or not, or of standard input where `source` is `-`.

    The table above says what is accepted, mended, rejected and refused; `report` is filled along the way.
    Raises InputError while iterating, also where the file cannot be opened.
    """
    with _opened(source) as text:
        sieve = _Sieve(text.label, Path(source).name, policy, ReadReport() if report is None else report)
        for record in _records(_pieces(text), text.label):
            yield from sieve.sift(record)
        sieve.finish()


def tokenize(sequence: str) -> list[int]:
    """Return the token ids of `sequence`, <cls> first and <eos> last.

    Raises InputError at what is no token of ESM-2; `read_fasta` yields no such sequence.
    """
    try:
        residues = [_TOKEN_OF[text] for text in _TOKEN.findall(sequence)]
    except KeyError as error:
        raise InputError(f"{error.args[0]!r} is no token of ESM-2; write X for an unknown residue") from error
    return [CLS, *residues, EOS]


def detokenize(tokens: Iterable[int]) -> str:
    """Return the text of `tokens` without <cls>, <eos> and <pad>; the inverse of `tokenize`."""
    return "".join(VOCABULARY[token] for token in tokens if token not in _SILENT)


def digest(proteins: Iterable[Protein]) -> str:
    """Return the SHA-256, in hex, of the sorted SHA-256s of the sequences.

    Order and names do not count; how often a sequence occurs does.
    """
    each = sorted(hashlib.sha256(protein.sequence.encode()).digest() for protein in proteins)
    return hashlib.sha256(b"".join(each)).hexdigest()


def digest_in_order(proteins: Iterable[Protein]) -> str:
    """Return the SHA-256, in hex, of headers and sequences: names and order count."""
    found = hashlib.sha256()
    for protein in proteins:
        found.update(f"{protein.accession}\0{protein.description}\0{protein.sequence}\0".encode())
    return found.hexdigest()


def write_fasta(path: Path, proteins: Iterable[Protein], width: int = 80) -> None:
    """Write `proteins` to `path`, `width` residues a line, whole or not at all. Raises OutputError."""
    with atomic_output(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as stream:
        for protein in proteins:
            stream.write(f">{protein.accession} {protein.description}".rstrip() + "\n")
            stream.writelines(line + "\n" for line in _slices(protein.sequence, width))


def _count(sequence: str) -> int:
    return len(sequence) - (len(MASK_TEXT) - 1) * sequence.count(MASK_TEXT)


def _slices(sequence: str, size: int) -> Iterator[str]:
    """Cut `sequence` into parts of `size` residues, the last one shorter; never within a <mask>."""
    residues = _TOKEN.findall(sequence) if MASK_TEXT in sequence else sequence
    for start in range(0, len(residues), size):
        yield "".join(residues[start : start + size])


@dataclass(frozen=True)
class _Text:
    """The decompressed text of a source."""

    stream: TextIO
    label: str
    compression: str  # "" where there is none
    damage: tuple[type[Exception], ...]  # what damaged data raise

    def read(self, line: int) -> str:
        """Return the rest of the line, or some 64 Ki characters of it; "" at the end of the text."""
        try:
            piece = self.stream.readline(_PIECE)
            if len(piece) < _PIECE or not (begun := _MASK_BEGUN(piece)):
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


class _Piece(NamedTuple):
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
def _opened(source: str | Path) -> Iterator[_Text]:
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


def _decoded(head: bytes, stream: io.BufferedReader, label: str) -> _Text:
    name, data, damage = _decompressed(head, stream, label)
    # Bytes that are not UTF-8 pass as lone surrogates, so that the line that holds them can be named.
    text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline=None)
    return _Text(text, label, name, damage)


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


def _pieces(text: _Text) -> Iterator[_Piece]:
    line = column = 1
    while piece := text.read(line):
        if "\0" in piece:
            raise InputError(f"{text.label}: NUL byte at line {line}; give FASTA as text, in UTF-8")
        if not piece.isascii() and _UNDECODED(piece):
            raise InputError(f"{text.label}: line {line} is not UTF-8; give FASTA as text, in UTF-8")
        if piece.endswith("\n"):
            yield _Piece(line, column, piece[:-1])
            line, column = line + 1, 1
        else:
            yield _Piece(line, column, piece)
            column += len(piece)


@dataclass
class _Record:
    """A record while it is read: its cleaned sequence so far, and what was mended or found wrong."""

    label: str
    record: int
    line: int
    accession: str = ""
    description: str = ""
    parts: list[str] = field(default_factory=list)
    residues: int = 0
    stop: str = ""  # where a "*" ended the sequence
    reason: str = ""  # why the record is to be rejected
    mends: dict[Mend, int] = field(default_factory=dict)  # → the line where each was needed first

    @property
    def where(self) -> str:
        return f"{self.label}: record {self.record} ({self.accession}), line {self.line}"

    def name(self, header: str) -> None:
        """Take accession and description from `header`, the line after its `>`."""
        if not header.replace("\t", " ").isprintable():
            self.mends[Mend.CONTROL] = self.line
        accession, _, description = _printable(header).strip().partition(" ")
        description = description.strip()
        if len(accession) > MAX_ACCESSION or len(description) > MAX_DESCRIPTION:
            self.mends[Mend.LONG_HEADER] = self.line
        if not accession:
            self.mends[Mend.UNNAMED] = self.line
        self.accession = accession[:MAX_ACCESSION] or f"record-{self.record}"
        self.description = description[:MAX_DESCRIPTION].rstrip()

    def lengthen_header(self, piece: _Piece) -> None:
        """Drop the further pieces of a header: its first one is longer than what is kept."""
        if piece.text.strip():
            self.mends[Mend.LONG_HEADER] = self.line

    def add(self, piece: _Piece) -> None:
        """Append a line of sequence, cleaned."""
        if self.reason:
            return
        text = piece.text if _ONLY_RESIDUES(piece.text) else self._cleaned(piece)
        if not text:
            return
        if self.stop or "*" in text[:-1]:
            stop = self.stop or _place(piece, piece.text.index("*"))
            self.reason = f"stop '*' inside the sequence at {stop}"
        elif text.endswith("*"):
            self.stop = _place(piece, piece.text.index("*"))
            self.mends.setdefault(Mend.STOP, piece.line)
            self._append(text[:-1])
        else:
            self._append(text)

    def _cleaned(self, piece: _Piece) -> str:
        """Return the residues and stops of `piece`, or "" where it is blank or holds an unknown letter."""
        if not piece.text.strip():
            return ""
        # A <mask> counts as residues of the same length here, so that columns stay true.
        probe = piece.text.replace(MASK_TEXT, "X" * len(MASK_TEXT))
        letters = set(probe)
        if letters - _KNOWN:
            index = next(index for index, letter in enumerate(probe) if letter not in _KNOWN)
            self.reason = f"unknown letter {probe[index]!r} at {_place(piece, index)}"
            return ""
        for mend, mendable in _MENDABLE.items():
            if not letters.isdisjoint(mendable):
                self.mends.setdefault(mend, piece.line)
        return MASK_TEXT.join(part.translate(_MENDED) for part in piece.text.split(MASK_TEXT))

    def _append(self, text: str) -> None:
        self.parts.append(text)
        self.residues += _count(text)
        if self.residues <= RECORD_CAP:
            return
        if _only_nucleotides("".join(self.parts)):
            raise InputError(f"{self.where}: looks like nucleotides; translate it to protein first")
        raise InputError(f"{self.where}: over {RECORD_CAP:,} residues, too many for a protein; remove it")


def _printable(header: str) -> str:
    if header.isprintable():
        return header
    return "".join(letter if letter.isprintable() else " " for letter in header)


def _place(piece: _Piece, index: int) -> str:
    return f"line {piece.line}, column {piece.column + index}"


def _only_nucleotides(sequence: str) -> bool:
    return bool(sequence) and not sequence.strip(_NUCLEOTIDES)


def _records(pieces: Iterable[_Piece], label: str) -> Iterator[_Record]:
    record: _Record | None = None
    in_header = False
    for piece in pieces:
        if piece.column == 1:
            in_header = piece.text.startswith(">")
        if in_header and piece.column == 1:
            if record is not None:
                yield record
            record = _Record(label, 1 if record is None else record.record + 1, piece.line)
            record.name(piece.text[1:])
        elif record is None:
            _require_blank(piece, label)
        elif in_header:
            record.lengthen_header(piece)
        else:
            record.add(piece)
    if record is not None:
        yield record


def _require_blank(piece: _Piece, label: str) -> None:
    if piece.text.strip():
        raise InputError(
            f"{label}: does not look like FASTA: line {piece.line} is {piece.text.strip()[:30]!r}, "
            "before any '>' header; convert it to FASTA"
        )


class _Sieve:
    """Turns the records of one source into proteins, by the policy, and reports on them."""

    def __init__(self, label: str, source: str, policy: ReadPolicy, report: ReadReport) -> None:
        self._label = label
        self._source = source
        self._policy = policy
        self._report = report
        self._suffixes: dict[str, int] = {}  # identifiers given so far → the last suffix given to it
        self._nucleotide_records = 0  # with which the source began
        self._nucleotide_residues = 0
        self._accepted = False
        self._first_reject = ""

    def sift(self, record: _Record) -> Iterator[Protein]:
        """Yield what the policy makes of `record`: nothing, a protein, or its windows."""
        sequence = "".join(record.parts)
        reason = record.reason or self._objection(record, sequence)
        if reason:
            self._reject(record, reason)
            return
        proteins = self._proteins(record, sequence)
        self._accept(record)
        yield from proteins

    def finish(self) -> None:
        """Raise InputError where no record was accepted."""
        if self._first_reject and not self._accepted:
            raise InputError(f"{self._first_reject}; every other record was rejected, too: mend the file")
        if not self._accepted:
            raise InputError(f"{self._label}: holds no record; FASTA starts with a '>' header")

    def _objection(self, record: _Record, sequence: str) -> str:
        if not sequence:
            return "no residues after the header"
        if not _only_nucleotides(sequence):
            return ""
        self._count_nucleotides(record)
        if record.residues < NUCLEOTIDE_RESIDUES:
            return ""
        return f"looks like nucleotides (all of {_NUCLEOTIDES}); translate it to protein first"

    def _count_nucleotides(self, record: _Record) -> None:
        if record.record != self._nucleotide_records + 1:
            return
        self._nucleotide_records += 1
        self._nucleotide_residues += record.residues
        enough = self._nucleotide_residues >= NUCLEOTIDE_RESIDUES
        if enough and self._nucleotide_records == NUCLEOTIDE_RECORDS:
            raise InputError(
                f"{self._label}: looks like nucleotides: its first {NUCLEOTIDE_RECORDS} records hold only "
                f"{_NUCLEOTIDES}; translate it to protein first"
            )

    def _reject(self, record: _Record, reason: str) -> None:
        if self._policy.strict:
            raise InputError(f"{record.where}: {reason}; mend the record, or skip it by reading without --strict")
        self._first_reject = self._first_reject or f"{record.where}: {reason}"
        self._report.rejects.append(Reject(self._source, record.record, record.line, record.accession, reason))

    def _accept(self, record: _Record) -> None:
        if self._policy.strict and record.mends:
            mend, line = next(iter(record.mends.items()))
            raise InputError(
                f"{self._label}: record {record.record} ({record.accession}), line {line}: would be mended: "
                f"{mend}; mend the file, or read it without --strict"
            )
        self._accepted = True
        self._report.accepted += 1
        self._report.mended.update(mend.value for mend in record.mends)

    def _proteins(self, record: _Record, sequence: str) -> list[Protein]:
        accession = self._unique(record, record.accession)
        limit = self._policy.max_residues
        if record.residues <= limit:
            return [self._protein(record, accession, sequence)]
        if self._policy.long == LongPolicy.WINDOW:
            return self._windows(record, accession, sequence)
        if self._policy.long == LongPolicy.TRUNCATE:
            record.mends[Mend.TRUNCATED] = record.line
            return [self._protein(record, accession, next(_slices(sequence, limit)))]
        raise InputError(
            f"{record.where}: {record.residues:,} residues, over the limit of {limit:,}; remove the record, "
            "or choose --long truncate or --long window"
        )

    def _windows(self, record: _Record, accession: str, sequence: str) -> list[Protein]:
        windows, first = [], 1
        for part in _slices(sequence, self._policy.max_residues):
            last = first + _count(part) - 1
            name = self._unique(record, f"{accession}/{first}-{last}")
            windows.append(self._protein(record, name, part))
            first = last + 1
        return windows

    def _protein(self, record: _Record, accession: str, sequence: str) -> Protein:
        return Protein(accession, record.description, sequence, self._source, record.record, record.line)

    def _unique(self, record: _Record, accession: str) -> str:
        """Return `accession`, or where it was given before the first `accession.N` that was not."""
        if accession not in self._suffixes:
            self._suffixes[accession] = 1
            return accession
        record.mends.setdefault(Mend.DUPLICATE, record.line)
        suffix = self._suffixes[accession] + 1
        while f"{accession}.{suffix}" in self._suffixes:
            suffix += 1
        self._suffixes[accession] = suffix
        self._suffixes[f"{accession}.{suffix}"] = 1
        return f"{accession}.{suffix}"
