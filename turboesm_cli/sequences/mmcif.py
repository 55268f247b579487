"""mmCIF -> a record for each chain of a polymer. Tables of atoms, which are most of a file, are not held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import count
from types import SimpleNamespace
from typing import Any

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.biopython import Unreadable, parse, reason_of, record_of, without_letters
from turboesm_cli.sequences.chunks import Chunk, Line, lines
from turboesm_cli.sequences.records import Record
from turboesm_cli.sequences.sources import Piece

_ATOMS = "_atom_site"


def records(pieces: Iterable[Piece], label: str) -> Iterator[Record]:
    """The chains of all blocks of a file. Raises InputError where a block has none."""
    numbers = count(1)
    held: Chunk | None = None
    for line in _without_atoms(lines(pieces, label)):
        if line.text.startswith("data_"):
            if held is not None:
                yield from _chains(held, label, numbers)
            held = Chunk(label, line.number)
        if held is not None:
            held.add(line.text)
    if held is not None:
        yield from _chains(held, label, numbers)


def _without_atoms(found: Iterable[Line]) -> Iterator[Line]:
    """The lines but for loops over atoms."""
    loop: Line | None = None
    dropping = False
    for line in found:
        if dropping and not _ends_loop(line.text):
            continue
        dropping = loop is not None and line.text.startswith(_ATOMS)
        if loop is not None and not dropping:
            yield loop
        loop = line if line.text.rstrip() == "loop_" else None
        if loop is None and not dropping:
            yield line


def _ends_loop(text: str) -> bool:
    return text.startswith(("#", "loop_", "data_")) or (text.startswith("_") and not text.startswith(_ATOMS))


def _chains(held: Chunk, label: str, numbers: Iterator[int]) -> Iterator[Record]:
    try:
        chains = parse(held.text, "cif-seqres") or _polymers(held.text)
    except Unreadable as error:
        raise InputError(f"{label}: the mmCIF block at line {held.line}: {error}; mend the file") from error
    if not chains:
        raise InputError(
            f"{label}: the mmCIF block at line {held.line} has no table of polymers, which tells sequences; "
            "name a FASTA file"
        )
    code = held.text.split(None, 1)[0].removeprefix("data_")
    for chain in chains:
        accession = chain.id if ":" in chain.id else f"{code}:{chain.id}"
        record = record_of(chain, label, next(numbers), held.line, accession="_".join(accession.split()))
        yield without_letters(record, chain)


def _polymers(text: str) -> list[Any]:
    """What `_entity_poly` says, of a file without a table of each chain's residues. Raises Unreadable."""
    from Bio.PDB.MMCIF2Dict import MMCIF2Dict

    try:
        found = MMCIF2Dict(StringIO(text))
    except Exception as error:  # as in `biopython.parse`
        raise Unreadable(reason_of(error)) from error
    columns = ("type", "pdbx_seq_one_letter_code_can", "pdbx_strand_id")
    kinds, letters, strands = (found.get(f"_entity_poly.{column}", []) for column in columns)
    if not len(letters) == len(kinds) == len(strands):
        raise Unreadable("its polymers lack a type, a sequence or a chain")
    return [
        _chain(name.strip(), word if "peptide" in kind else "X")
        for kind, word, names in zip(kinds, letters, strands, strict=True)
        for name in names.split(",")
    ]


def _chain(name: str, letters: str) -> SimpleNamespace:
    """What `record_of` needs of a SeqRecord."""
    return SimpleNamespace(id=name, description="", seq="".join(letters.split()))
