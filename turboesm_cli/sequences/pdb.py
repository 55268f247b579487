"""PDB -> a record for each chain; of its atoms at most one a residue is held.

Sequences are those of SEQRES, the molecule that was studied. A file without, as programs that predict structures
write it, has the residues of its atoms, if these have letters and are numbered without gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.biopython import Unreadable, parse, record_of, without_letters
from turboesm_cli.sequences.chunks import Chunk, Line, lines
from turboesm_cli.sequences.lines import Mend
from turboesm_cli.sequences.records import Record
from turboesm_cli.sequences.sources import Piece

_DECLARING = ("HEADER", "SEQRES", "DBREF")


def records(pieces: Iterable[Piece], label: str) -> Iterator[Record]:
    """The chains of a PDB file, or of several one after another. Raises InputError."""
    numbers = count(1)
    entry = _Entry(label, 1)
    for line in lines(pieces, label):
        ends = line.text.rstrip() == "END"
        if (ends or line.text.startswith("HEADER")) and not entry.empty:
            yield from entry.chains(numbers)
            entry = _Entry(label, line.number)
        if not ends:
            entry.add(line)
    if not entry.empty:
        yield from entry.chains(numbers)


class _Entry:
    """The lines of an entry that tell its sequences."""

    def __init__(self, label: str, line: int) -> None:
        self._label, self._line = label, line
        self._declaring, self._atoms = Chunk(label, line), Chunk(label, line)
        self._lengths: dict[str, int] = {}  # chain → residues, as SEQRES says
        self._declared: dict[str, int] = {}  # chain → its first line of SEQRES
        self._residues: dict[str, dict[str, int]] = {}  # chain → number of each residue of atoms → its line
        self._carbons: set[str] = set()  # chain, number and alternative of each C-alpha
        self._twice: set[str] = set()  # chains with one more than once: several, one after another
        self._code = ""
        self._first_model = True
        self.empty = True

    def add(self, line: Line) -> None:
        text = line.text
        self.empty = self.empty and not text.strip()
        if text.startswith(_DECLARING):
            self._declaring.add(text)
        if text.startswith("HEADER"):
            self._code = text[62:66].strip()
        elif text.startswith("SEQRES"):
            self._note_length(line)
        elif text.startswith("ENDMDL"):
            self._first_model = False
        elif self._first_model and text.startswith(("ATOM  ", "HETATM")) and text[12:16] == " CA ":
            self._atoms.add(text)
            if text[16:17] + text[21:27] in self._carbons:
                self._twice.add(text[21:22])
            self._carbons.add(text[16:17] + text[21:27])
            self._residues.setdefault(text[21:22], {}).setdefault(text[22:27], line.number)

    def _note_length(self, line: Line) -> None:
        chain, length = line.text[11:12], line.text[13:17].strip()
        known = length.isascii() and length.isdigit()
        if not known or self._lengths.setdefault(chain, int(length)) != int(length):
            raise InputError(
                f"{self._label}: line {line.number}: SEQRES of chain {chain!r} with no length, or with another "
                "one than before; mend the file"
            )
        self._declared.setdefault(chain, line.number)

    def chains(self, numbers: Iterator[int]) -> Iterator[Record]:
        """A record for each chain. Raises InputError where there is none."""
        if not self._lengths and not self._residues:
            raise InputError(f"{self._label}: a PDB file without SEQRES and without residues; name a FASTA file")
        try:
            if self._lengths:
                yield from (self._of_seqres(each, next(numbers)) for each in self._read(self._declaring, "seqres"))
            else:
                yield from (self._of_atoms(each, next(numbers)) for each in self._read(self._atoms, "atom"))
        except Unreadable as error:
            raise InputError(f"{self._label}: the PDB entry at line {self._line}: {error}") from error

    def _read(self, chunk: Chunk, what: str) -> list[Any]:
        return parse(chunk.text, f"pdb-{what}")

    def _of_seqres(self, chain: Any, number: int) -> Record:
        name = chain.annotations["chain"]
        record = self._record(chain, number, self._declared[name])
        if not record.reason and len(chain) != self._lengths[name]:
            record.reason = f"{len(chain)} residues, where SEQRES says {self._lengths[name]}: damaged"
        return without_letters(record, chain)

    def _of_atoms(self, chain: Any, number: int) -> Record:
        name = chain.annotations["chain"]
        residues = self._residues[name]
        record = self._record(chain, number, min(residues.values()))
        record.mends[Mend.ATOMS] = record.line
        if not record.reason and name in self._twice:
            record.reason = "no SEQRES, and residues with the same number: several chains of one name"
        if not record.reason and ("X" in str(chain.seq) or len(chain) != len(residues)):
            record.reason = (
                "no SEQRES, and residues of its atoms that are missing, without a letter or out of order"
            )
        return record

    def _record(self, chain: Any, number: int, line: int) -> Record:
        """`CODE:CHAIN`, as Biopython names it where DBREF says the code; else by HEADER's."""
        name = chain.annotations["chain"]
        accession = chain.id if ":" in chain.id and "?" not in chain.id else f"{self._code or 'chain'}:{name}"
        if chain.description == chain.id:
            chain.description = ""
        return record_of(chain, self._label, number, line, accession="_".join(accession.split()))
