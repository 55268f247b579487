"""GenBank, EMBL and UniProt text -> records, read by Biopython one at a time.

A record of nucleotides is told by its first line and skipped, however long it is. One whose sequence is not as
long as its first line says is damaged, and rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.biopython import Unreadable, parse, record_of, rejected
from turboesm_cli.sequences.chunks import Chunk, Line, lines
from turboesm_cli.sequences.records import Record
from turboesm_cli.sequences.sources import Piece

_LENGTH = re.compile(r"\s(\d{1,12}) (aa|bp|rc|AA|BP|RC)\b").search
_END = "//"


@dataclass(frozen=True)
class FlatFile:
    """A format whose records begin with a certain word and end with `//`.

    parser  Biopython's name of it
    begins  the first line of a record
    """

    name: str
    parser: str
    begins: str

    def records(self, pieces: Iterable[Piece], label: str) -> Iterator[Record]:
        """The records of a file. Raises InputError where one is not finished, or for text between two."""
        number = 0
        held: _Held | None = None
        for line in lines(pieces, label):
            if held is None:
                if not line.text.startswith(self.begins):
                    self._require_nothing(line, number, label)
                    continue
                number += 1
                held = _Held(self, label, number, line)
            elif line.text.rstrip() == _END:
                yield held.record()
                held = None
            elif line.text.startswith(self.begins):
                raise held.cut_off()
            else:
                held.add(line.text)
        if held is not None:
            raise held.cut_off()

    def _require_nothing(self, line: Line, number: int, label: str) -> None:
        """Before the first record there may be a header, as in the databases' own releases."""
        if number and line.text.strip():
            raise InputError(
                f"{label}: line {line.number} is {line.text[:30]!r}, which begins no record of {self.name}; "
                "mend the file"
            )


class _Held:
    """A record while it is read."""

    def __init__(self, kind: FlatFile, label: str, number: int, first: Line) -> None:
        self._kind, self._label, self._number, self._first = kind, label, number, first
        self._chunk = Chunk(label, first.number)
        self._chunk.add(first.text)
        found = _LENGTH(first.text)
        self._length = int(found[1]) if found else None
        self._of_nucleotides = found is not None and found[2].lower() != "aa"

    def add(self, text: str) -> None:
        if not self._of_nucleotides:
            self._chunk.add(text)

    def cut_off(self) -> InputError:
        return InputError(
            f"{self._label}: record {self._number} ({self._name}), line {self._first.number}, does not end with "
            f"{_END!r}: the file is damaged or cut off; fetch it again"
        )

    def record(self) -> Record:
        if self._of_nucleotides:
            return self._rejected("a record of nucleotides, as its first line says; translate it to protein first")
        try:
            found = parse(self._chunk.text + _END + "\n", self._kind.parser)
        except Unreadable as error:
            return self._rejected(f"{error}, as {self._kind.name}")
        if len(found) != 1:
            return self._rejected(f"Biopython finds {len(found)} records in it, as {self._kind.name}")
        record = record_of(found[0], self._label, self._number, self._first.number)
        if not record.reason and self._length not in (None, len(found[0])):
            record.reason = f"{len(found[0])} residues, where its first line says {self._length}: damaged"
        return record

    @property
    def _name(self) -> str:
        words = self._first.text.split(None, 2)
        return words[1].rstrip(";") if len(words) > 1 else ""

    def _rejected(self, reason: str) -> Record:
        return rejected(self._label, self._number, self._first.number, self._name, reason)


GENBANK = FlatFile("GenBank", "genbank", "LOCUS ")
EMBL = FlatFile("EMBL", "embl", "ID   ")
UNIPROT = FlatFile("UniProt text", "swiss", "ID   ")
