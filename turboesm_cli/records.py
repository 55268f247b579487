"""Lines of FASTA → records, cleaned, with what was mended or found wrong; see the table in `sequences`."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from turboesm_cli.errors import InputError
from turboesm_cli.sources import Piece
from turboesm_cli.tokens import MASK_TEXT, count

RECORD_CAP = 1_000_000  # the longest known protein has some 45,000 residues; beyond this, memory is at stake
MAX_ACCESSION = 200
MAX_DESCRIPTION = 2000
NUCLEOTIDES = "ACGTUN"

_ONLY_RESIDUES = re.compile("[A-IK-Z]*").fullmatch  # every letter but J is a token of ESM-2


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


@dataclass
class Record:
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

    def lengthen_header(self, piece: Piece) -> None:
        """Drop the further pieces of a header: its first one is longer than what is kept."""
        if piece.text.strip():
            self.mends[Mend.LONG_HEADER] = self.line

    def add(self, piece: Piece) -> None:
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

    def _cleaned(self, piece: Piece) -> str:
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
        self.residues += count(text)
        if self.residues <= RECORD_CAP:
            return
        if only_nucleotides("".join(self.parts)):
            raise InputError(f"{self.where}: looks like nucleotides; translate it to protein first")
        raise InputError(f"{self.where}: over {RECORD_CAP:,} residues, too many for a protein; remove it")


def _printable(header: str) -> str:
    if header.isprintable():
        return header
    return "".join(letter if letter.isprintable() else " " for letter in header)


def _place(piece: Piece, index: int) -> str:
    return f"line {piece.line}, column {piece.column + index}"


def only_nucleotides(sequence: str) -> bool:
    """Whether a sequence holds nothing but letters that nucleotides are written with."""
    return bool(sequence) and not sequence.strip(NUCLEOTIDES)


def records(pieces: Iterable[Piece], label: str) -> Iterator[Record]:
    """The records of a file, one in memory at a time. Raises InputError for text before the first header."""
    record: Record | None = None
    in_header = False
    for piece in pieces:
        if piece.column == 1:
            in_header = piece.text.startswith(">")
        if in_header and piece.column == 1:
            if record is not None:
                yield record
            record = Record(label, 1 if record is None else record.record + 1, piece.line)
            record.name(piece.text[1:])
        elif record is None:
            _require_blank(piece, label)
        elif in_header:
            record.lengthen_header(piece)
        else:
            record.add(piece)
    if record is not None:
        yield record


def _require_blank(piece: Piece, label: str) -> None:
    if piece.text.strip():
        raise InputError(
            f"{label}: does not look like FASTA: line {piece.line} is {piece.text.strip()[:30]!r}, "
            "before any '>' header; convert it to FASTA"
        )
