"""Formats other than FASTA: told by content, read as Biopython reads them, refused with a reason."""

from __future__ import annotations

import gzip
import re
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from Bio import SeqIO
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from turboesm_cli.errors import InputError
from turboesm_cli.sequences import chunks
from turboesm_cli.sequences.fasta import Protein, ReadPolicy, ReadReport, read_fasta
from turboesm_cli.sequences.lines import Mend

ONE, TWO = "MKWVTFISLLFLFSSAYSRGVFRRDAHKSE", "MKWVTF-SLLFLFSSAYSRG----DAHKQE"
GENE = "ACGTTGCA" * 20


def written(name: str, *sequences: str, molecule: str = "protein") -> str:
    """Records P1, P2, ... as Biopython writes them."""
    stream = StringIO()
    SeqIO.write(
        [
            SeqRecord(
                Seq(letters), f"P{number}", f"P{number}", "a protein", annotations={"molecule_type": molecule}
            )
            for number, letters in enumerate(sequences, 1)
        ],
        stream,
        name,
    )
    return stream.getvalue()


UNIPROT = f"""ID   ALBU_TEST               Reviewed;          30 AA.
AC   P02768; Q8IUK7;
DT   21-JUL-1986, integrated into UniProtKB/Swiss-Prot.
DE   RecName: Full=Albumin;
OS   Homo sapiens (Human).
OC   Eukaryota.
OX   NCBI_TaxID=9606;
SQ   SEQUENCE   30 AA;  3511 MW;  F88FF61DD242E818 CRC64;
     {ONE[:10]} {ONE[10:20]} {ONE[20:]}
//
"""
XML = f"""<?xml version="1.0" encoding="UTF-8"?>
<uniprot xmlns="http://uniprot.org/uniprot">
<entry dataset="Swiss-Prot" created="1986-07-21" modified="2026-01-01" version="1">
  <accession>P02768</accession><name>ALBU_TEST</name>
  <protein><recommendedName><fullName>Albumin</fullName></recommendedName></protein>
  <sequence length="30" mass="3511" checksum="F8" modified="1986-07-21" version="1">{ONE}</sequence>
</entry>
</uniprot>
"""
CODES = {"M": "MET", "K": "LYS", "W": "TRP", "V": "VAL", "T": "THR", "F": "PHE"}
SEQRES = f"SEQRES   1 A    6  {' '.join(CODES[letter] for letter in 'MKWVTF')}\n"
HEADER = f"{'HEADER    TRANSPORT':<50}01-JAN-26   1ABC              \n"
DNA = "SEQRES   1 B    4   DA  DC  DG  DT\n"
DBREF = "DBREF  1ABC A    1     6  UNP    P02768   ALBU_HUMAN       1      6\n"


def atoms(*numbers: int) -> str:
    """A PDB file of lysines with these numbers, and no SEQRES."""
    return "".join(
        f"ATOM  {serial:5}  CA  LYS A{number:4}    {serial:8.3f}{0:8.3f}{0:8.3f}  1.00 90.00           C  \n"
        for serial, number in enumerate(numbers, 1)
    )


CIF = """data_1ABC
#
loop_
_entity_poly.entity_id
_entity_poly.type
_entity_poly.pdbx_seq_one_letter_code_can
_entity_poly.pdbx_strand_id
1 'polypeptide(L)' MKWVTF A,B
2 polydeoxyribonucleotide ACGT C
#
loop_
_atom_site.group_PDB
_atom_site.id
ATOM 1
_this_is_an_atom 2
#
"""
SCHEME = "loop_\n_pdbx_poly_seq_scheme.asym_id\n_pdbx_poly_seq_scheme.mon_id\nA MET\nA MSE\nA LYS\n#\n"
BLOCKS = f" 2 30\nFirstName  {ONE[:15]}\nSecond     {TWO[:15]}\n\n           {ONE[15:]}\n           {TWO[15:]}\n"
ROWS = f" 2 30\nFirstName {ONE[:15]}\n          {ONE[15:]}\nSecond    {TWO[:15]}\n          {TWO[15:]}\n"
STOCKHOLM = f"# STOCKHOLM 1.0\n#=GF ID TEST\nP1/1-30 {ONE}\nP2 {TWO.replace('-', '.')}\n//\n"

ORIGIN = re.compile("(?s)ORIGIN.*").sub

PLAIN = {
    "GenBank": (written("genbank", ONE), "genbank"),
    "GenBank of a release": ("GBPRI1.SEQ   Genetic Sequence Data Bank\n\n" + written("genbank", ONE), "genbank"),
    "EMBL": (written("embl", ONE), "embl"),
    "UniProt text": (UNIPROT * 2, "swiss"),
    "UniProt XML": (XML, "uniprot-xml"),
    "PDB": (HEADER + DBREF + SEQRES, "pdb-seqres"),
    "mmCIF": ("data_1ABC\n" + SCHEME, "cif-seqres"),
    "Clustal": (written("clustal", ONE, TWO), "clustal"),
    "Stockholm": (STOCKHOLM * 2, "stockholm"),
    "Phylip": (written("phylip", ONE, TWO), "phylip"),
    "Phylip, long names": (written("phylip-relaxed", ONE, TWO), "phylip-relaxed"),
    "Phylip in blocks": (BLOCKS, "phylip-relaxed"),
    "Phylip row by row": (ROWS, "phylip-sequential"),
}


def read(text: str | bytes, folder: Path, **policy: Any) -> tuple[list[Protein], ReadReport]:
    path, report = folder / "in.txt", ReadReport()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_fasta(path, ReadPolicy(**policy), report)), report


def message(text: str, folder: Path, **policy: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(text, folder, **policy)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "")


@pytest.mark.parametrize("name", PLAIN)
def test_read_as_by_biopython(name: str, tmp_path: Path) -> None:
    text, parser = PLAIN[name]
    handle = BytesIO(text.encode()) if parser == "uniprot-xml" else StringIO(text)
    expected = [str(record.seq) for record in SeqIO.parse(handle, parser)]
    found, report = read(text, tmp_path)
    assert expected and [each.sequence for each in found] == [
        letters.replace("-", "").replace(".", "") for letters in expected
    ]
    assert not report.rejects
    assert set(report.mended) <= {Mend.GAPS, Mend.DUPLICATE}
    assert [each.sequence for each in read(gzip.compress(text.encode()), tmp_path)[0]] == [
        each.sequence for each in found
    ]


def test_names_and_lines_are_those_of_the_format(tmp_path: Path) -> None:
    first, second = read(UNIPROT * 2, tmp_path)[0]
    assert (first.accession, first.description, first.record, first.line) == (
        "P02768",
        "RecName: Full=Albumin;",
        1,
        1,
    )
    assert (second.accession, second.record, second.line) == ("P02768.2", 2, 11)
    assert [(each.accession, each.line) for each in read(XML, tmp_path)[0]] == [("P02768", 3)]
    assert [(each.accession, each.line) for each in read(STOCKHOLM, tmp_path)[0]] == [("P1/1-30", 3), ("P2", 4)]
    assert [(each.accession, each.line) for each in read(HEADER + DBREF + SEQRES, tmp_path)[0]] == [("1ABC:A", 3)]
    assert [each.accession for each in read(HEADER + SEQRES, tmp_path)[0]] == ["1ABC:A"]


def test_chains(tmp_path: Path) -> None:
    found, report = read(HEADER + SEQRES + DNA, tmp_path)
    assert [each.sequence for each in found] == ["MKWVTF"]
    assert [(each.accession, each.line) for each in report.rejects] == [("1ABC:B", 3)]
    assert "nucleic acid" in report.rejects[0].reason
    found, report = read(CIF, tmp_path)
    assert [(each.accession, each.sequence) for each in found] == [("1ABC:A", "MKWVTF"), ("1ABC:B", "MKWVTF")]
    assert [each.accession for each in report.rejects] == ["1ABC:C"]
    two = HEADER + SEQRES + HEADER.replace("1ABC", "2XYZ") + SEQRES
    assert [each.accession for each in read(two, tmp_path)[0]] == ["1ABC:A", "2XYZ:A"]


def test_residues_of_atoms_are_told_and_must_have_no_gaps(tmp_path: Path) -> None:
    found, report = read(atoms(1, 2, 3) + "ENDMDL\n" + atoms(1, 2, 3), tmp_path)
    assert [each.sequence for each in found] == ["KKK"] and report.mended == {Mend.ATOMS: 1}
    assert "missing, without a letter or out of order" in message(atoms(1, 2, 5), tmp_path)
    assert "missing, without a letter or out of order" in message(atoms(5, 6, 1, 2), tmp_path)
    assert "would be mended" in message(atoms(1, 2, 3), tmp_path, strict=True)
    found, _ = read(atoms(1, 2, 3) + "END\n" + atoms(1, 2), tmp_path)
    assert [(each.accession, each.sequence) for each in found] == [("chain:A", "KKK"), ("chain:A.2", "KK")]
    assert "several chains of one name" in message(atoms(1, 2, 3) + "TER\n" + atoms(1, 2, 3, 4), tmp_path)


def test_a3m_begins_with_a_comment(tmp_path: Path) -> None:
    found, _ = read(f"#30\t1\n>query\n{ONE}\n>hit\n{TWO.lower()}\n", tmp_path)
    assert [each.sequence for each in found] == [ONE, TWO.replace("-", "")]
    assert "several chains joined" in message(f"#30,40\t1,1\n>101\t102\n{ONE}\n", tmp_path)


REFUSED = {
    "GenBank of nucleotides": (
        written("genbank", GENE, molecule="DNA"),
        "record 1 (P1), line 1: a record of nucl",
    ),
    "EMBL of nucleotides": (written("embl", GENE, molecule="DNA"), "record 1 (P1), line 1: a record of nucl"),
    "Clustal of nucleotides": (written("clustal", GENE, GENE), "looks like nucleotides"),
    "FASTQ": ("@a\nACGT\n+\nIIII\n", "like FASTQ or SAM, reads of nucleotides"),
    "GenBank, cut off": (written("genbank", ONE)[:-4], "record 1 (P1), line 1, does not end with '//'"),
    "GenBank, text between": (written("genbank", ONE) + "some text\n", "begins no record of GenBank"),
    "GenBank without a sequence": (
        ORIGIN("CONTIG      join(A1:1..30)\n//\n", written("genbank", ONE)),
        "not in the file",
    ),
    "UniProt, shorter than it says": (UNIPROT.replace(ONE[20:], ""), "20 residues, where its first line says 30"),
    "UniProt, damaged": (UNIPROT.replace("OC   ", "Q!   "), "Biopython cannot read it"),
    "a database without sequences": (
        "ID   KINASE; PATTERN.\nAC   PS1;\n//\n",
        "a database that holds no sequences",
    ),
    "XML, cut off": (XML[:-20], "cannot be read as UniProt XML, near line 6"),
    "XML with entities": (XML.replace("<uniprot ", "<!DOCTYPE x>\n<uniprot "), "like HTML or XML"),
    "XML of something else": ("<?xml version='1.0'?>\n<svg/>\n", "like HTML or XML"),
    "PDB without residues": (HEADER, "without SEQRES and without residues"),
    "PDB, shorter than it says": (SEQRES.replace(" 6 ", " 7 "), "6 residues, where SEQRES says 7"),
    "PDB, two lengths": (SEQRES + SEQRES.replace(" 6 ", " 7 "), "line 2: SEQRES of chain 'A'"),
    "mmCIF without polymers": ("data_1ABC\n_cell.length_a 3\n", "has no table of polymers"),
    "Clustal's title": ("CLUSTAL W\n\n", "a Clustal title without an alignment"),
    "Clustal, rows of two lengths": (written("clustal", ONE, ONE)[:-9] + "\n", "Biopython cannot read it"),
    "Stockholm, cut off": (STOCKHOLM[:-3], "the alignment at line 1 does not end with '//'"),
    "Phylip, fewer rows": (ROWS.replace(" 2 30", " 3 30"), "not as many, or not as long, as line 1 says"),
    "an unknown letter": (written("clustal", ONE[:5] + "?" + ONE[6:]), "line 4: unknown letter '?' at letter 6"),
    "over the limit": (
        STOCKHOLM.replace(ONE, "MKWVT" * 300).replace(TWO.replace("-", "."), "MKWVT" * 300),
        "1,500",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    text, said = REFUSED[name]
    assert said in message(text, tmp_path)


def test_size_is_limited_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MOST_TEXT", 1000)
    assert "over 0 MiB of text" in message(UNIPROT.replace("OC ", "OC   Eukaryota.\n" * 100 + "OC "), tmp_path)
    assert "line 3 is over 0 MiB long" in message(STOCKHOLM.replace(ONE, ONE * 100), tmp_path)
    gene = written("genbank", GENE * 9, molecule="DNA")
    assert len(gene) > 1000 and "a record of nucleotides" in message(gene, tmp_path)  # skipped, never held
