"""Text that is not FASTA of proteins, or nearly: what commands make of it, and that no residue is made up.

Each case goes through `quantize`, which does not look at what it packs, and through Biopython: where both accept a
record, its sequence is the same.
"""

from __future__ import annotations

import csv
import gzip
import io
import pickle
import random
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from test_inputs import Place, bundle, check_stopped, place  # noqa: F401  (fixtures)

from turboesm_cli.console import counted
from turboesm_cli.sequences.fasta import LongPolicy, ReadPolicy, ReadReport, read_fasta

DATA = Path(__file__).parents[1] / "data"
ONE = "MKWVTFISLLFLFSSAYSRGVFRRDAHKSEVAHRFKDLGEENFKALVLIAFAQYLQQCPF"
TWO = "MTEYKLVVVGAGGVGKSALTIQLIQNHFVDEYDPTIEDSYRKQVVIDGETCLLDILDTAG"
PLAIN = f">ok fine\n{TWO}\n"
TMAFP = "QCTGGADCTSCTGACTGCGNCPNAVTCTNSQHCVKANTCTGSTDCNTAQTCTNSKDCFEANTCTDSTNCYKATACTNSSGCPGH"
STATES = "C" * 10 + "H" * 20 + "C" * 5 + "E" * 15 + "C" * 10


def gene(number: int, code: str = "R") -> str:
    draw = random.Random(number)
    half = ["".join(draw.choice("ACGT") for _ in range(150)) for _ in range(2)]
    return f">gene{number}\n{half[0]}{code}{half[1]}\n"


def groups(sequence: str, number: bool = True, size: int = 10) -> str:
    """Lines of 60 as GenBank writes them."""
    lines = []
    for start in range(0, len(sequence), 60):
        line = sequence[start : start + 60]
        parted = " ".join(line[at : at + size] for at in range(0, len(line), size))
        lines.append(f"{start + 1:9d} {parted}" if number else f"     {parted}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Odd:
    """A text: what it holds, what is said of it, and which records are skipped."""

    name: str
    text: str
    proteins: dict[str, str] = field(default_factory=dict)
    said: str = ""
    rejects: tuple[str, ...] = ()


def skipped(name: str, text: str, said: str, accession: str = "bad") -> Odd:
    """A record that is skipped, after one that is not."""
    return Odd(
        name, PLAIN + (text if text.startswith(">") else f">bad\n{text}\n"), {"ok": TWO}, said, (accession,)
    )


PROSE = [
    skipped(
        "the end of UniProt's stream",
        f"{ONE}\nError messages\nError encountered when streaming data. Please try again later.",
        "line 5 is 'Error messages': blanks that do not part groups of 10",
    ),
    skipped(
        "one line of it", f"{ONE}\nError encountered when streaming data. Please try again later.", "line 5 is"
    ),
    skipped("a word", f"{ONE}\nError", "line 5 is 'Error', which looks like a word"),
    skipped("a word in lower case", f"{ONE}\nkilled", "which looks like a word"),
    skipped("a word that no list knows", f"{ONE}\nPlease", "which looks like a word"),
    skipped("END", f"{ONE}\n{ONE[:9]}\nEND", "which looks like a word"),
    skipped("null", "null", "which looks like a word"),
    skipped("NaN", "NaN", "which looks like a word"),
    skipped("(null)", "(null)", "unknown letter '('"),
    skipped("words of ten letters", "connection lost\nMKW", "do not part groups of 10"),
    skipped("ten letters after a line", f"{ONE}\nconnection lost", "do not part groups of 10"),
    skipped("after groups", groups(ONE[:35]) + "please", "do not part groups of 10"),
    skipped("mixed case in groups", "Connection lost", "do not part groups of 10"),
    skipped("HTML", f"{ONE}\n<html><body>Not Found</body></html>", "unknown letter '<'"),
    skipped("the end of a GenBank record", f"{ONE}\n//", "unknown letter '/'"),
    skipped("a comment", f"; note\n{ONE}", "unknown letter ';'"),
    skipped("an arrow", "A -> B", "unknown letter '>'"),
    skipped("PDB", f"{ONE}\nATOM      1  N   MET A   1      27.340  24.430   2.614", "digit at line 5"),
    skipped("FASTQ's plus", f"{ONE}\n+\n{'I' * 60}", "unknown letter '+'"),
    skipped("CLUSTAL's consensus", f"{ONE}\n   ** *", "line 5 is '** *'"),
    skipped("quality scores", "40 40 38 40 30 20", "digit at line 4"),
    skipped("SMILES", "CC(=O)N", "unknown letter '('"),
]
PEPTIDES = [
    skipped("modified ends", "ac-MKWV-NH2", "line 4 looks like a peptide with modified ends"),
    skipped("an acetylated start", "Ac-MKWVTF", "modified ends"),
    skipped("a free acid", "H-MKWVTF-OH", "modified ends"),
    skipped(
        "three letters", "Met Lys Trp Val Thr Phe Ile Ser\n  1               5", "three-letter codes at line 4"
    ),
    skipped("three letters, joined", "MetLysTrpValThr", "three-letter codes"),
    skipped("three letters, upper case", "MET LYS TRP", "three-letter codes"),
    skipped("three letters, hyphens", "H-Met-Lys-Trp-OH", "three-letter codes"),
    skipped("PIR", f">P1;HBB\nhemoglobin beta human\n{ONE}*\n", "a PIR (NBRF) record", "P1;HBB"),
]
BLANKS = [
    Odd(
        "GenBank",
        ">a\n" + groups(f"{ONE}{TWO}{ONE[:37]}".lower()),
        {"a": f"{ONE}{TWO}{ONE[:37]}"},
        "blanks or digits",
    ),
    Odd("UniProt", ">a\n" + groups(f"{ONE}{TWO[:11]}", number=False), {"a": ONE + TWO[:11]}, "blanks or digits"),
    Odd("numbers at the right", f">a\n{ONE} 60\n{TWO[:20]} 80\n", {"a": ONE + TWO[:20]}, "blanks or digits"),
    skipped("a number that counts nothing", f"{ONE} 61", "does not count residues"),
    skipped("a number of 5,000 digits", f"{'1' * 5000} {ONE}", "digit at line 4, column 1"),
    skipped("a digit inside", "MKW2VTF", "digit at line 4, column 4"),
    skipped("groups of 9", groups(ONE, size=9), "do not part groups of 10"),
    skipped("one blank", "MKWVT FISLLF", "do not part groups of 10"),
    skipped("letters apart", "M K W V T F", "do not part groups of 10"),
    skipped("a blank in a very long line", "M" * 70_000 + " " * 70_000 + "K", "blanks or digits in line 4"),
]
DOTS = [
    skipped(
        "gffread's stops", "MASLKDERSSAEHIRV.LETEAGEYDKLNEKLTDKGN.", "'.' inside the sequence at line 4, column 17"
    ),
    Odd(
        "gffread's last stops",
        f">a\n{ONE}.\n>b\n{TWO[:30]}.\n",
        {"a": ONE, "b": TWO[:30]},
        "final stop '.' dropped: 2",
    ),
    Odd(
        "twins of gffread",
        f">a\n{ONE[:9]}.{ONE}.\n>b\n{ONE[:9]}.{ONE}.\n>c\n{TWO}.\n",
        {"c": TWO},
        "a stop",
        ("a", "b"),
    ),
    Odd(
        "an alignment",
        f">a\n{ONE}....\n>b\n..{TWO}..\n>c\n..--{ONE[:-1]}-\n",
        {"a": ONE, "b": TWO, "c": ONE[:-1]},
        "gaps dropped: 3",
    ),
    Odd(
        "match dots",
        f">a\n{ONE}\n>b\n{'.' * 20}A{'.' * 39}\n>c\n{ONE[:59]}.\n",
        {"a": ONE},
        "'.' inside",
        ("b", "c"),
    ),
    Odd(
        "A3M",
        f">a\n{ONE}\n>b\nmk{ONE[:30]}---{ONE[33:]}\n",
        {"a": ONE, "b": f"MK{ONE[:30]}{ONE[33:]}"},
        "gaps dropped: 1",
    ),
]
STRINGS = [
    Odd(
        "HHblits",
        f">ss_pred PSIPRED\n{STATES}\n>ss_conf PSIPRED\n{'9' * 60}\n>query\n{ONE}\n",
        {"query": ONE},
        "a record of secondary structure",
        ("ss_pred", "ss_conf"),
    ),
    Odd(
        "RCSB",
        f">1ABC:A:sequence\n{ONE}\n>1ABC:A:secstr\n  HHHHH  EEE\n",
        {"1ABC:A:sequence": ONE},
        "a record of secondary structure",
        ("1ABC:A:secstr",),
    ),
    skipped("three states", STATES, "looks like secondary structure"),
    skipped("eight states", "CCSTTHHHHHHHHHHGGGCEEEEETTEEEEECSSC", "looks like secondary structure"),
    skipped("SignalP", f"{ONE}\n{'S' * 20}{'O' * 40}", "a line of topology"),
    skipped("SignalP, lipoprotein", f"{ONE}\n{'L' * 20}C{'OOO'}{'I' * 36}", "its latter lines"),
    skipped("DeepTMHMM", f"{ONE}\n{'I' * 20}{'M' * 20}{'I' * 20}", "its latter lines"),
    skipped("DeepTMHMM, globular", f"{ONE}\n{'I' * 60}", "its latter lines"),
    skipped("folded", f"{ONE}\n{TWO[:30]}\n{STATES}\n{STATES[:30]}", "its latter lines"),
]
SEAMS = [
    Odd(
        "no last line end",
        f">a\n{ONE}>b\n{TWO}\n",
        {"a": ONE, "b": TWO},
        "read as the next record's header: 2 records",
    ),
    Odd("gaps at the seam", f">a\n{ONE}-->b\n{TWO}\n", {"a": ONE, "b": TWO}, "next record's header: 2 records"),
    Odd("byte-order mark", f">a\n{ONE}\n\ufeff>b\n{TWO}\n", {"a": ONE, "b": TWO}, "mark dropped: 1 record"),
    Odd("both", f">a\n{ONE}\ufeff>b\n{TWO}\n", {"a": ONE, "b": TWO}, "next record's header: 2 records"),
    Odd(
        "an empty line with a mark",
        f">a\n{ONE}\n\ufeff\n>b\n{TWO}\n",
        {"a": ONE, "b": TWO},
        "mark dropped: 1 record",
    ),
    Odd("^Z", f">a\n{ONE}\n\x1a", {"a": ONE}, "DOS end-of-file mark dropped: 1 record"),
    Odd("^Z at a seam", f">a\n{ONE}\n\x1a>b\n{TWO}\x1a", {"a": ONE, "b": TWO}, "mark dropped: 1 record"),
    Odd("after a bad line", f">a\nMK!\n{ONE}>b\n{TWO}\n", {"b": TWO}, "unknown letter '!'", ("a",)),
    Odd("after a mask", f">a\n<mask>{ONE}<mask>>b\n{TWO}\n", {"a": f"<mask>{ONE}<mask>", "b": TWO}, "2 records"),
]
BASES = [
    Odd(
        "genes with a code", "".join(map(gene, range(4))), {}, "looks like nucleotides (4 of its first 4 records)"
    ),
    skipped("a gene with a code", gene(0, "Y"), "looks like nucleotides", "gene0"),
    skipped("a gene, half unknown", f"{'ACGT' * 20}{'N' * 80}", "looks like nucleotides"),
    Odd("RNA", ">r\n" + "ACGU" * 20 + "\n", {}, "looks like nucleotides"),
    Odd("primers", "".join(f">p{n}\nACGTTGCAAC\n" for n in range(5)), {}, "(5 of its first 5 records)"),
    Odd("antifreeze protein", f">tmafp\n{TMAFP}\n", {"tmafp": TMAFP}),
    Odd("fibroin", f">silk\n{'GAGAGS' * 9}GAGAGY\n", {"silk": "GAGAGS" * 9 + "GAGAGY"}),
    Odd("antifreeze glycoprotein", f">afgp\n{'AAT' * 20}PA\n", {"afgp": "AAT" * 20 + "PA"}),
    Odd(
        "peptides of low complexity",
        f">a\n{'A' * 80}\n>g\n{'GGGGS' * 8}\n>t\n{'T' * 40}\n>h\nHHHHHHHHHH\n>q\n{'Q' * 60}\n>s\nGATTACA\n",
        {"a": "A" * 80, "g": "GGGGS" * 8, "t": "T" * 40, "h": "H" * 10, "q": "Q" * 60, "s": "GATTACA"},
    ),
    Odd(
        "soft-masked", f">a\n{ONE[:20]}{'gagagsgags' * 4}\n", {"a": ONE[:20] + "GAGAGSGAGS" * 4}, "upper-cased: 1"
    ),
    Odd("a protein that ends in END", f">a\n{ONE}\n{TWO}\nEND\n", {"a": f"{ONE}{TWO}END"}),
]
HEADERS = [
    Odd(
        "soft hyphen",
        f">sp|P1\xad23|A x\n{ONE}\n",
        {"sp|P123|A": ONE},
        "invisible characters in the header dropped",
    ),
    Odd("zero-width space", f">a\u200bb\u2060c\ufeff x\n{ONE}\n", {"abc": ONE}, "invisible characters"),
    Odd("no-break space", f">a\xa0b\n{ONE}\n", {"a": ONE}, "replaced by spaces"),
]
FORMATS = [
    Odd("GenBank's format", f"LOCUS       X 60 aa\nORIGIN\n{groups(ONE)}//\n", {"X": ONE}),
    Odd("Stockholm", f"# STOCKHOLM 1.0\na {ONE}\n//\n", {"a": ONE}),
    Odd("CLUSTAL", f"CLUSTAL W\n\na {ONE}\n", {"a": ONE}),
    Odd("GFF", f"##gff-version 3\n##FASTA\n>a\n{ONE}\n", {}, "but like GFF"),
    Odd("JSON", '{"a": "MKW"}\n', {}, "but like JSON"),
    Odd("an error page", "<!DOCTYPE html>\n", {}, "but like HTML or XML"),
    Odd("Git LFS", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n", {}, "git lfs pull"),
]
CASES = PROSE + PEPTIDES + BLANKS + DOTS + STRINGS + SEAMS + BASES + HEADERS + FORMATS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_odd_text(case: Odd, place: Place) -> None:  # noqa: F811
    path = place.folder / "in.fasta"
    path.write_text(case.text, encoding="utf-8")
    result = place.run("quantize", "in.fasta", "--rejects", "r.tsv")
    if not case.proteins:
        check_stopped(result, place, 3, case.said, "r.tsv")
        return
    assert result.exit_code == 0, result.stderr
    assert case.said in result.stderr and f"of {counted(len(case.proteins), 'protein')} in" in result.stderr
    with (place.folder / "r.tsv").open() as stream:
        assert tuple(row["accession"] for row in csv.DictReader(stream, delimiter="\t")) == case.rejects
    assert {protein.accession: protein.sequence for protein in read_fasta(path)} == case.proteins


@pytest.mark.parametrize("case", [case for case in CASES if case.proteins], ids=lambda case: case.name)
def test_biopython_reads_no_other_sequence(case: Odd, tmp_path: Path) -> None:
    """But for what it takes as it comes: case, gaps, stops, J and marks; its other letters are no residues."""
    path = tmp_path / "in.fasta"
    path.write_text(case.text, encoding="utf-8")
    with path.open(encoding="utf-8") as stream:
        found = {title.split()[0]: text.upper().strip("\x1a\ufeff") for title, text in SimpleFastaParser(stream)}
    found = {name: text.rstrip("*").replace("-", "").replace("J", "X") for name, text in found.items()}
    both = {name for name, text in found.items() if text.isalpha() and name in case.proteins}
    assert {name: found[name] for name in both} == {name: case.proteins[name] for name in both}


@pytest.mark.parametrize("path", sorted(DATA.glob("*/*.fasta")), ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", ["as it is", "lower case", "CRLF"])
def test_bundled_proteins_are_all_read(path: Path, kind: str, tmp_path: Path) -> None:
    with path.open(encoding="utf-8") as stream:
        expected = [(title.split()[0], text) for title, text in SimpleFastaParser(stream)]
    text = path.read_text(encoding="utf-8")
    if kind == "lower case":
        text = "\n".join(line if line.startswith(">") else line.lower() for line in text.split("\n"))
    copy = tmp_path / "copy.fasta"
    copy.write_text(text, encoding="utf-8", newline="\r\n" if kind == "CRLF" else "\n")
    report = ReadReport()
    proteins = list(read_fasta(copy, ReadPolicy(long=LongPolicy.TRUNCATE), report))
    assert [(protein.accession, protein.sequence) for protein in proteins] == expected and not report.rejects


def zipped() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("ncbi_dataset/data/protein.faa", PLAIN)
    return made.getvalue()


def tarred() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        entry = tarfile.TarInfo("p.fa")
        entry.size = len(PLAIN)
        archive.addfile(entry, io.BytesIO(PLAIN.encode()))
    return made.getvalue()


NO_TEXT = {
    "zip": (zipped, "is a zip file"),
    "tar.gz": (
        tarred,
        "is a tar file: an archive, not FASTA; unpack it and name the FASTA file in it (`tar -xf`)",
    ),
    "gz.gz": (lambda: gzip.compress(gzip.compress(PLAIN.encode())), "is gzip within gzip; decompress it once"),
    "pickle": (lambda: pickle.dumps([PLAIN]), "is a pickled Python object"),
    "PDF": (lambda: b"%PDF-1.7\n", "is a PDF document"),
}


@pytest.mark.parametrize("command", ["calibrate", "quantize", "decode", "bench"])
@pytest.mark.parametrize("kind", NO_TEXT)
def test_what_is_no_text_is_named(kind: str, command: str, place: Place) -> None:  # noqa: F811
    make, said = NO_TEXT[kind]
    (place.folder / "in.fasta").write_bytes(make())
    check_stopped(place.run(command, "in.fasta"), place, 3, said)
