"""Formats of sequences other than FASTA, told by how a text begins; each is read in a module of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from turboesm_cli.sequences import alignments, flat_files, mmcif, pdb, records, uniprot_xml
from turboesm_cli.sequences.records import Record
from turboesm_cli.sequences.sources import Piece, Text


@dataclass(frozen=True)
class SequenceFormat:
    """A format: what messages call it, how its text begins, and what makes records of its lines."""

    name: str
    begins: re.Pattern[str]
    read: Callable[[Iterable[Piece], str], Iterator[Record]]


_CLUSTAL = "|".join(alignments.CLUSTAL_BEGINS)
_PDB = "HEADER|OBSLTE|TITLE |COMPND|SOURCE|REMARK|CRYST1|DBREF |SEQRES|EXPDTA|AUTHOR|NUMMDL|MODEL |ATOM  |HETATM"

FASTA = SequenceFormat("FASTA", re.compile(""), records.records)
FORMATS = (
    SequenceFormat(
        "GenBank",
        re.compile(r"LOCUS {2,}|[A-Z0-9.]+ +Genetic Sequence Data Bank"),
        flat_files.GENBANK.records,
    ),
    SequenceFormat(
        "EMBL", re.compile(r"ID   (?:[^\n]*\nXX|[^\n]*\d BP\.|[^\n]*; UNC; +\d+ AA\.)"), flat_files.EMBL.records
    ),
    SequenceFormat(
        "UniProt text",
        re.compile(r"ID   \S+ +[A-Za-z]+; +(?:PRT; +)?\d+ AA\."),
        flat_files.UNIPROT.records,
    ),
    SequenceFormat(
        "UniProt XML", re.compile(r"(?s)(?:<\?xml.*?\?>)?\s*(?:<!--.*?-->\s*)*<uniprot\b"), uniprot_xml.records
    ),
    SequenceFormat("Stockholm", re.compile(r"# STOCKHOLM\b"), alignments.stockholm),
    SequenceFormat("Clustal", re.compile(rf"(?:{_CLUSTAL})\b"), alignments.clustal),
    SequenceFormat("Phylip", re.compile(r"\d{1,9}[ \t]+\d{1,9}[ \t]*\n"), alignments.phylip),
    SequenceFormat("PDB", re.compile(rf"(?:{_PDB})(?:[ \d]|\s*\n)"), pdb.records),
    SequenceFormat("mmCIF", re.compile(r"(?:#[^\n]*\n\s*)*data_\S"), mmcif.records),
)
"""In the order in which they are tried; what is none of them is read as FASTA."""


def format_of(text: Text) -> SequenceFormat:
    """The format of a text, as its first line that is not blank tells it."""
    head = text.head.lstrip()
    return next((each for each in FORMATS if each.begins.match(head)), FASTA)
