"""Stockholm, Clustal and Phylip -> a record for each row, its gaps dropped; A2M and A3M are read as FASTA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.biopython import Unreadable, parse, record_of
from turboesm_cli.sequences.chunks import Chunk, lines
from turboesm_cli.sequences.records import Record
from turboesm_cli.sequences.sources import Piece

_STOCKHOLM, _END = "# STOCKHOLM", "//"
_STOCKHOLM_GAPS = "-.~"
_PHYLIP = ("phylip-relaxed", "phylip", "phylip-sequential")
"""Names of any length before a blank, or of ten letters; rows in blocks, or one after another."""
_SIZES = re.compile(r"\s*(\d{1,9})\s+(\d{1,9})\b").match
CLUSTAL_BEGINS = ("CLUSTAL", "PROBCONS", "MUSCLE", "MSAPROBS", "Kalign", "Biopython")
"""Programs that write Clustal's format, as the first line names them."""


def stockholm(pieces: Iterable[Piece], label: str) -> Iterator[Record]:
    """The rows of all alignments of a Stockholm file, one alignment in memory at a time. Raises InputError."""
    numbers = count(1)
    held: Chunk | None = None
    for line in lines(pieces, label):
        if held is None:
            if not line.text.strip():
                continue
            if not line.text.startswith(_STOCKHOLM):
                raise InputError(f"{label}: line {line.number} is {line.text[:30]!r}, not {_STOCKHOLM!r}; mend it")
            held = Chunk(label, line.number)
        held.add(line.text)
        if line.text.rstrip() == _END:
            yield from _rows(held, _read(held, "stockholm", label), label, numbers, _STOCKHOLM_GAPS)
            held = None
    if held is not None:
        raise InputError(f"{label}: the alignment at line {held.line} does not end with {_END!r}; fetch it again")


def clustal(pieces: Iterable[Piece], label: str) -> Iterator[Record]:
    """The rows of a Clustal file. Raises InputError."""
    held = _whole(pieces, label)
    empty = True
    for line in held.lines:
        title = line.text.startswith(CLUSTAL_BEGINS)
        if title and empty and line.number > held.line:
            break
        empty = title or (empty and not line.text.strip())
    if empty:  # Biopython would look for the first row for ever
        raise InputError(f"{label}: a Clustal title without an alignment; fetch the file again")
    return _rows(held, _read(held, "clustal", label), label, count(1), "-")


def phylip(pieces: Iterable[Piece], label: str) -> Iterator[Record]:
    """The rows of a Phylip file, in whichever of its forms they are as many and as long as its first line says.

    Raises InputError where there is none, or where two forms give other rows.
    """
    held = _whole(pieces, label)
    found = [rows for name in _PHYLIP if (rows := _phylip_rows(held, name))]
    if not found:
        raise InputError(
            f"{label}: rows that are not as many, or not as long, as line {held.line} says, in any form "
            "of Phylip; mend it, or convert it to FASTA"
        )
    if any(_letters(rows) != _letters(found[0]) for rows in found[1:]):
        raise InputError(f"{label}: could be Phylip in blocks or row by row, which differ; convert it to FASTA")
    return _rows(held, found[0], label, count(1), "-")


def _phylip_rows(held: Chunk, name: str) -> list[Any]:
    """The rows in one form; none where it does not fit the sizes that are promised."""
    try:
        rows = parse(held.text, name)
    except Unreadable:
        return []
    promised = _SIZES(held.text)
    if promised is None or not 0 < int(promised[1]) <= len(rows):
        return []
    # A name begins its line: rows one after another, read as blocks, would take indented residues for names.
    begun = {name for line in held.lines for name in (*line.text.split(" ", 1)[:1], line.text[:10].strip())}
    fits = all(len(row) == int(promised[2]) for row in rows[: int(promised[1])])
    return rows if fits and all(row.id in begun for row in rows) else []


def _letters(rows: list[Any]) -> list[tuple[str, str]]:
    return [(row.id, str(row.seq)) for row in rows]


def _whole(pieces: Iterable[Piece], label: str) -> Chunk:
    """All lines from the first that is not blank on."""
    held: Chunk | None = None
    for line in lines(pieces, label):
        if held is None and line.text.strip():
            held = Chunk(label, line.number)
        if held is not None:
            held.add(line.text)
    return held or Chunk(label, 1)


def _read(held: Chunk, name: str, label: str) -> list[Any]:
    try:
        return parse(held.text, name)
    except Unreadable as error:
        raise InputError(f"{label}: the {name} alignment at line {held.line}: {error}; mend the file") from error


def _rows(held: Chunk, rows: list[Any], label: str, numbers: Iterator[int], gaps: str) -> Iterator[Record]:
    where: dict[str, int] = {}
    for line in held.lines:
        where.setdefault(line.text.split(None, 1)[0] if line.text.strip() else "", line.number)
    for row in rows:
        first = row.id.split(None, 1)[0] if row.id.strip() else ""
        yield record_of(row, label, next(numbers), where.get(first, held.line), gaps)
