"""Biopython's parsers, kept from harm: what they read as records of ours, what they cannot read as a reason."""

from __future__ import annotations

import warnings
from io import StringIO
from typing import Any

from turboesm_cli.sequences.lines import Mend
from turboesm_cli.sequences.records import Record
from turboesm_cli.sequences.sources import Piece

_NOTHING = ("<unknown id>", "<unknown name>", "<unknown description>", ".")
"""What Biopython says where a file says nothing."""


class Unreadable(Exception):
    """Why Biopython cannot read a text."""


def parse(text: str, name: str) -> list[Any]:
    """The SeqRecords of a text in the format that Biopython calls `name`. Raises Unreadable."""
    from Bio import SeqIO

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about features; lengths are checked by those who call
            return list(SeqIO.parse(StringIO(text), name))
    except MemoryError:
        raise
    except Exception as error:  # of damaged text the parsers raise whatever comes: AssertionError, IndexError, ...
        raise Unreadable(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """What an error of a parser says, on one line."""
    words = " ".join(str(error).split())[:200]
    return f"Biopython cannot read it: {words or type(error).__name__}"


def record_of(found: Any, label: str, number: int, line: int, gaps: str = "", accession: str = "") -> Record:
    """A SeqRecord as a record, under the rules of FASTA; `gaps` are its letters that stand for no residue."""
    record = Record(label, number, line)
    name = accession or ("" if found.id in _NOTHING else "_".join(found.id.split()))
    description = "" if found.description in _NOTHING else found.description.removeprefix(found.id).strip()
    record.name(f"{name} {description}")
    if record.reason:
        return record
    try:
        letters = str(found.seq)
    except Exception:  # UndefinedSequenceError, of a record that holds a length alone
        record.reason = "its sequence is not in the file"
        return record
    residues = letters.translate(str.maketrans("", "", gaps))
    if residues != letters:
        record.mends[Mend.GAPS] = line
    record.add(Piece(0, 1, residues))
    return record


def rejected(label: str, number: int, line: int, name: str, reason: str) -> Record:
    """A record that is skipped for a reason which its text gave."""
    record = Record(label, number, line)
    record.name(name)
    record.reason = reason
    return record


def without_letters(record: Record, found: Any) -> Record:
    """A chain's record, to be rejected where none of its residues has a letter: nucleic acids are all X here."""
    if not record.reason and not str(found.seq).strip("X"):
        record.reason = "no residue that has a letter: a nucleic acid, or a chain that is not known"
    return record
