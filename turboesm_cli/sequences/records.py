"""Lines of FASTA → records, cleaned, with what was mended or found wrong; see the table in `sequences`."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.lines import MARKS, Lines, Mend, NotSequence, place
from turboesm_cli.sequences.lookalikes import is_nucleotides, no_protein
from turboesm_cli.sequences.residues import MASK_TEXT, count
from turboesm_cli.sequences.sources import FOREIGN, Piece

RECORD_CAP = 1_000_000  # the longest known protein has some 45,000 residues; beyond this, memory is at stake
MAX_ACCESSION = 200
MAX_DESCRIPTION = 2000

_JOINED = re.compile(r"#\d+(?:,\d+)+\s").match
_SEAM = re.compile(rf"[{MARKS}]*(?<!<mask)>(?=\S)").search


@dataclass
class Dots:
    """The dots of a record: stops, gaps, or "as in the first record", which only other records can tell."""

    count: int = 0
    first: str = ""  # where the first one is
    last: bool = False  # nothing but gaps follows the last one
    columns: str = ""  # a hash of which columns they are in

    def add(self, piece: Piece, text: str, column: int) -> None:
        """Take a line, cleaned, whose first letter is in a column of the record."""
        self.last = text.endswith(".") or (self.last and not text)
        if "." not in text:
            return
        self.first = self.first or place(piece, piece.text.index("."))
        self.count += text.count(".")
        held = f"{self.columns}{column}:{''.join('.' if letter == '.' else ' ' for letter in text).rstrip()}"
        self.columns = hashlib.blake2b(held.encode(), digest_size=8).hexdigest()


@dataclass
class Record:
    """A record while it is read: its cleaned sequence so far, and what was mended or found wrong."""

    label: str
    record: int
    line: int
    accession: str = ""
    description: str = ""
    parts: list[str] = field(default_factory=list)  # of residues, line by line
    residues: int = 0
    stop: str = ""  # where a "*" ended the sequence
    dots: Dots = field(default_factory=Dots)
    reason: str = ""  # why the record is to be rejected
    lines: Lines = field(default_factory=Lines)

    @property
    def where(self) -> str:
        return f"{self.label}: record {self.record} ({self.accession}), line {self.line}"

    @property
    def mends(self) -> dict[Mend, int]:
        """What was mended → the line where it was needed first."""
        return self.lines.mends

    @property
    def width(self) -> int:
        """Letters, gaps counted."""
        return self.lines.width

    def name(self, header: str) -> None:
        """Take accession and description from `header`, the line after its `>`."""
        shown = header if header.isascii() else "".join(filter(_is_visible, header))
        if len(shown) < len(header):
            self.mends[Mend.INVISIBLE] = self.line
        if not shown.replace("\t", " ").isprintable():
            self.mends[Mend.CONTROL] = self.line
        accession, _, description = _printable(shown).strip().partition(" ")
        description = description.strip()
        if len(accession) > MAX_ACCESSION or len(description) > MAX_DESCRIPTION:
            self.mends[Mend.LONG_HEADER] = self.line
        if not accession:
            self.mends[Mend.UNNAMED] = self.line
        self.accession = accession[:MAX_ACCESSION] or f"record-{self.record}"
        self.description = description[:MAX_DESCRIPTION].rstrip()
        self.reason = no_protein(self.accession)

    def lengthen_header(self, piece: Piece) -> None:
        """Drop the further pieces of a header: its first one is longer than what is kept."""
        if piece.text.strip():
            self.mends[Mend.LONG_HEADER] = self.line

    def add(self, piece: Piece) -> None:
        """Append a line of sequence, cleaned."""
        if self.reason:
            return
        column = self.width
        try:
            text = self.lines.read(piece)
        except NotSequence as error:
            self.reason = str(error)
            return
        if not text:
            return
        self.dots.add(piece, text, column)
        self._append(piece, text.replace(".", ""))

    def _append(self, piece: Piece, text: str) -> None:
        if (self.stop and text) or "*" in text[:-1]:
            stop = self.stop or place(piece, piece.text.index("*"))
            self.reason = f"stop '*' inside the sequence at {stop}"
            return
        if text.endswith("*"):
            self.stop = place(piece, piece.text.index("*"))
            self.mends.setdefault(Mend.STOP, piece.line)
        self.parts.append(text.removesuffix("*"))
        self.residues += count(self.parts[-1])
        self.lines.residues = self.residues
        if self.residues > RECORD_CAP:
            self._stop_at_cap()

    def _stop_at_cap(self) -> None:
        if is_nucleotides("".join(self.parts)):
            raise InputError(f"{self.where}: looks like nucleotides; translate it to protein first")
        raise InputError(f"{self.where}: over {RECORD_CAP:,} residues, too many for a protein; remove it")


def _is_visible(letter: str) -> bool:
    """Whether a letter takes room: soft hyphens, zero-width spaces and byte-order marks do not."""
    return unicodedata.category(letter) != "Cf"


def _printable(header: str) -> str:
    if header.isprintable():
        return header
    return "".join(letter if letter.isprintable() else " " for letter in header)


def records(pieces: Iterable[Piece], label: str) -> Iterator[Record]:
    """The records of a file, one in memory at a time. Raises InputError for text before the first header."""
    record: Record | None = None
    in_header = False
    for piece in pieces:
        if in_header and piece.column > 1 and record is not None:
            record.lengthen_header(piece)
            continue
        line, header, mends = _parted(piece)
        in_header = header is not None
        if record is not None:
            record.add(line)
        else:
            _require_blank(line, label)
        if header is None:
            continue
        if record is not None:
            record.mends.update(dict.fromkeys(mends & {Mend.SEAM}, piece.line))
            yield record
        record = Record(label, 1 if record is None else record.record + 1, piece.line)
        record.name(header)
        record.mends.update(dict.fromkeys(mends, piece.line))
    if record is not None:
        yield record


def _parted(piece: Piece) -> tuple[Piece, str | None, set[Mend]]:
    """A line's sequence; the header that begins in it, or None; and what had to be mended to tell them apart."""
    if piece.column == 1 and piece.text.startswith(">"):
        return piece._replace(text=""), piece.text[1:], set()
    found = _SEAM(piece.text) if ">" in piece.text else None
    before = piece.text[: found.start()] if found else ""
    if found is None or "<" in before.replace(MASK_TEXT, ""):  # markup
        return piece, None, set()
    mends = {Mend.SEAM} if before.strip() or piece.column > 1 else set()
    if len(found[0]) > 1:
        mends.add(Mend.MARK)
    return piece._replace(text=before), piece.text[found.end() :], mends


def _require_blank(piece: Piece, label: str) -> None:
    text = piece.text.strip().strip(MARKS)
    if not text:
        return
    what = next((f", {name}" for start, name in FOREIGN.items() if text.startswith(start)), "")
    if text.startswith("#") and not what:
        _require_one_chain(piece, label)
        return
    raise InputError(
        f"{label}: does not look like FASTA{what}: line {piece.line} is {text[:30]!r}, "
        "before any '>' header; convert it to FASTA"
    )


def _require_one_chain(piece: Piece, label: str) -> None:
    """A line before the first record with which A3M files begin. Raises InputError for one that joins chains."""
    if _JOINED(piece.text):
        raise InputError(
            f"{label}: line {piece.line} is {piece.text[:30]!r}: an A3M of ColabFold whose rows are several "
            "chains joined; give one chain a record"
        )
