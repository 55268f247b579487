"""FASTA reading against its table of policies, with Biopython and fair-esm as oracles."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import io
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import given, settings
from hypothesis import strategies as st

from turboesm_cli.errors import InputError
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.sequences import fasta, sources
from turboesm_cli.sequences.fasta import (
    LongPolicy,
    Protein,
    ReadPolicy,
    ReadReport,
    digest,
    read_fasta,
    write_fasta,
)
from turboesm_cli.sequences.identifiers import Seen
from turboesm_cli.sequences.lines import Mend
from turboesm_cli.sequences.lookalikes import is_nucleotides, no_residues

DATA = Path(__file__).parents[1] / "data"
RESIDUES = "ACDEFGHIKLMNPQRSTVWYUZBXO"
GOOD = ">ok fine\nMKWVTFISLL\n"
TEN = "MKWVTFISLL"


def read(data: bytes | str, **policy: Any) -> tuple[list[Protein], ReadReport]:
    """Read `data` as standard input."""
    stream = io.BytesIO(data if isinstance(data, bytes) else data.encode())
    report = ReadReport()
    with mock.patch.object(sys, "stdin", SimpleNamespace(buffer=stream)):
        return list(read_fasta("-", ReadPolicy(**policy), report)), report


def message(data: bytes | str, **policy: Any) -> str:
    """Return the message of the InputError that reading `data` raises."""
    with pytest.raises(InputError) as caught:
        read(data, **policy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pairs(proteins: list[Protein]) -> list[tuple[str, str]]:
    return [(protein.accession, protein.sequence) for protein in proteins]


@dataclass(frozen=True)
class Accepted:
    """Text that yields these records, after these mends."""

    name: str
    text: str | bytes
    expected: list[tuple[str, str]]
    mended: list[Mend] = field(default_factory=list)
    policy: dict[str, Any] = field(default_factory=dict)


ACCEPTED = [
    Accepted("plain", ">a one\nMKW\nVTF\n", [("a", "MKWVTF")]),
    Accepted("no final newline", ">a\nMKW", [("a", "MKW")]),
    Accepted("CRLF", ">a\r\nMKW\r\nVTF\r\n", [("a", "MKWVTF")]),
    Accepted("old-Mac CR", ">a\rMKW\rVTF\r", [("a", "MKWVTF")]),
    Accepted("CRLF across buffers", ">" + "a" * 8190 + "\r\nMK\r\n", [("a" * 200, "MK")], [Mend.LONG_HEADER]),
    Accepted("byte-order mark", b"\xef\xbb\xbf>a\nMKW\n", [("a", "MKW")]),
    Accepted("blank lines", "\n \n>a\n\nMKW\n \t\nVTF\n\n", [("a", "MKWVTF")]),
    Accepted("UZBXO", ">a\nMUZBXO\n", [("a", "MUZBXO")]),
    Accepted("mask", ">a\n<mask>MK<mask>\n", [("a", "<mask>MK<mask>")]),
    Accepted("blank after >", "> a b\nMKW\n", [("a", "MKW")]),
    Accepted("non-ASCII description", ">a Prot\u00e9ine\nMKW\n", [("a", "MKW")]),
    Accepted("short nucleotides", ">a\n" + "ACGT" * 7 + "A\n", [("a", "ACGT" * 7 + "A")]),
    Accepted("lower case", ">a\nMkw\nvtf\n", [("a", "MKWVTF")], [Mend.LOWER_CASE]),
    Accepted("lower case by a mask", ">a\nmk<mask>w\n", [("a", "MK<mask>W")], [Mend.LOWER_CASE]),
    Accepted("numbered", f">a\n  1 {TEN} {TEN}\n 21 {TEN} SLL\n", [("a", TEN * 3 + "SLL")], [Mend.BLANKS]),
    Accepted("gaps", ">a\nMK--W-\n", [("a", "MKW")], [Mend.GAPS]),
    Accepted("final stop", ">a\nMKW*\n\n", [("a", "MKW")], [Mend.STOP]),
    Accepted("final stop on its own line", ">a\nMKW\n*\n--\n", [("a", "MKW")], [Mend.STOP, Mend.GAPS]),
    Accepted("J", ">a\nMJW\n", [("a", "MXW")], [Mend.J]),
    Accepted("lower-case J", ">a\nMjW\n", [("a", "MXW")], [Mend.J, Mend.LOWER_CASE]),
    Accepted("empty header", ">a\nM\n>\nMKW\n", [("a", "M"), ("record-2", "MKW")], [Mend.UNNAMED]),
    Accepted("control characters", ">a\x1b[31m\x01b\nMKW\n", [("a", "MKW")], [Mend.CONTROL]),
    Accepted(
        "duplicates", ">a\nM\n>a\nK\n>a\nW\n", [("a", "M"), ("a.2", "K"), ("a.3", "W")], [Mend.DUPLICATE] * 2
    ),
    Accepted(
        "taken suffix", ">a\nM\n>a.2\nK\n>a\nW\n", [("a", "M"), ("a.2", "K"), ("a.3", "W")], [Mend.DUPLICATE]
    ),
    Accepted(
        "suffix given, then met",
        ">a\nM\n>a\nK\n>a.2\nW\n",
        [("a", "M"), ("a.2", "K"), ("a.2.2", "W")],
        [Mend.DUPLICATE] * 2,
    ),
    Accepted("megabyte header", ">a " + "x" * 1_000_000 + "\nMKW\n", [("a", "MKW")], [Mend.LONG_HEADER]),
    Accepted("header of blanks, then text", ">a" + " " * 200_000 + "b\nMKW\n", [("a", "MKW")], [Mend.LONG_HEADER]),
    Accepted("1,022 residues", ">a\n" + "M" * 1022, [("a", "M" * 1022)]),
    Accepted("masks count one", ">a\n" + "<mask>" * 1022, [("a", "<mask>" * 1022)]),
    Accepted("truncate", ">a\nMKWVT\n", [("a", "MKW")], [Mend.TRUNCATED], {"long": "truncate", "max_residues": 3}),
    Accepted(
        "truncate at a mask",
        ">a\n<mask><mask>K\n",
        [("a", "<mask><mask>")],
        [Mend.TRUNCATED],
        {"long": LongPolicy.TRUNCATE, "max_residues": 2},
    ),
    Accepted(
        "window",
        ">a\n" + "M" * 2045,
        [("a/1-1022", "M" * 1022), ("a/1023-2044", "M" * 1022), ("a/2045-2045", "M")],
        [],
        {"long": LongPolicy.WINDOW},
    ),
    Accepted("window not needed", ">a\nMKW\n", [("a", "MKW")], [], {"long": LongPolicy.WINDOW}),
    Accepted(
        "window's name taken",
        ">a/1-2\nW\n>a\nMKV\n",
        [("a/1-2", "W"), ("a/1-2.2", "MK"), ("a/3-3", "V")],
        [Mend.DUPLICATE],
        {"long": LongPolicy.WINDOW, "max_residues": 2},
    ),
]


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_accepts_or_mends(case: Accepted) -> None:
    proteins, report = read(case.text, **case.policy)
    assert pairs(proteins) == case.expected
    assert sorted(report.mended.elements()) == sorted(case.mended)
    assert not report.rejects


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_strict_stops_at_what_would_be_mended(case: Accepted) -> None:
    if case.mended:
        assert any(mend in message(case.text, strict=True, **case.policy) for mend in case.mended)
    else:
        assert pairs(read(case.text, strict=True, **case.policy)[0]) == case.expected


REJECTED = {
    "symbol": (">bad\nMKW\nMK!W\n", "unknown letter '!' at line 5, column 3"),
    "two symbols": (">bad\nMKW\nMK!W\nM?\n", "unknown letter '!' at line 5, column 3"),
    "symbol after a mask": (">bad\n<mask>K\u00e9\n", "unknown letter '\u00e9' at line 4, column 8"),
    "arrow within a line": (">bad\nMKW> next\n", "unknown letter '>' at line 4, column 4"),
    "upper-case mask": (">bad\nM<ESM2_ALPHABET.mask>\n", "unknown letter '<' at line 4, column 2"),
    "far column": (">bad\n" + "M" * 200_000 + "!\n", "unknown letter '!' at line 4, column 200001"),
    "stop inside a line": (">bad\nMK*W\n", "stop '*' inside the sequence at line 4, column 3"),
    "stop inside the record": (">bad\nMK*\nW\n", "stop '*' inside the sequence at line 4, column 3"),
    "two stops": (">bad\nMK**\n", "stop '*' inside the sequence at line 4, column 3"),
    "header alone": (">bad\n", "no residues after the header"),
    "only gaps": (">bad\n---\n", "no residues after the header"),
    "only a stop": (">bad\n*\n", "no residues after the header"),
    "nucleotides": (">bad\n" + "acgtun" * 10 + "\n", "looks like nucleotides"),
}


@pytest.mark.parametrize("text, reason", REJECTED.values(), ids=REJECTED.keys())
def test_rejects_the_record_alone(text: str, reason: str) -> None:
    proteins, report = read(GOOD + text + ">last\nMKW\n")
    assert pairs(proteins) == [("ok", "MKWVTFISLL"), ("last", "MKW")]
    (reject,) = report.rejects
    assert (reject.source, reject.record, reject.line, reject.accession) == ("-", 2, 3, "bad")
    assert reject.reason.startswith(reason)
    assert report.accepted == 2 and not report.mended
    assert f"standard input: record 2 (bad), line 3: {reject.reason}" in message(GOOD + text, strict=True)
    assert reason.replace("line 4", "line 2").replace("line 5", "line 3") in message(text)


STOPPED = {
    "empty": ("", {}, "holds no record"),
    "blank": ("\n \n", {}, "holds no record"),
    "text before the first header": ("\nHELLO\n>a\nMKW\n", {}, "does not look like FASTA: line 2 is 'HELLO'"),
    "NUL": (b">a\nMK\0W\n", {}, "NUL byte at line 2"),
    "UTF-16": (">a\nMKW\n".encode("utf-16"), {}, "UTF-8"),
    "Latin-1": (b">a\nMKW\n>b Prot\xe9ine\nMKW\n", {}, "line 3 is not UTF-8"),
    "Latin-1 in a sequence": (b">a\nMK\xe9\n", {}, "line 2 is not UTF-8"),
    "too long": (
        ">a\nM\n>b\n" + "M" * 1023,
        {},
        "record 2 (b), line 3: 1,023 residues, over the limit of 1,022",
    ),
    "too long by policy": (">a\nMKW", {"max_residues": 2}, "--long truncate or --long window"),
    "a million and one": (">a\n" + "M" * 1_000_001, {"long": LongPolicy.TRUNCATE}, "over 1,000,000 residues"),
    "a chromosome": (">a\n" + "ACGT" * 250_001, {"long": LongPolicy.WINDOW}, "looks like nucleotides"),
    "reads": (">r\nACGTACGTAC\n" * 20, {}, "looks like nucleotides (20 of its first 20 records)"),
    "genes": (">r\n" + "ACGT" * 20 + "\n", {}, "looks like nucleotides"),
    "none good": (">a\nM!\n>b\n\n", {}, "record 1 (a), line 1: unknown letter '!' at line 2, column 2"),
}


@pytest.mark.parametrize("data, policy, text", STOPPED.values(), ids=STOPPED.keys())
def test_stops(data: bytes | str, policy: dict[str, Any], text: str) -> None:
    assert text in message(data, **policy)


def test_nucleotides_are_told_by_a_vote() -> None:
    assert len(read(">r\nACGTACG\n" * 4)[0]) == 4, "under 30 residues together"
    assert len(read(">r\nGA\n" * 40)[0]) == 40, "no C, no T"
    assert len(read((GOOD + ">r\nACGTACGTAC\n") * 20)[0]) == 40, "as many proteins"
    assert "(15 of its first 20 records)" in message(GOOD * 5 + ">r\nACGTACGTAC\n" * 40)
    assert "(21 of its 41 records)" in message(GOOD * 20 + ">r\nACGTACGTAC\n" * 21), "told at the end"


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        ReadPolicy(max_residues=0)


def test_header_is_capped_and_split() -> None:
    (protein,), _ = read(">" + "a" * 300 + "  two  words " + "d" * 3000 + "\nMKW\n")
    assert protein.accession == "a" * 200
    assert protein.description == ("two  words " + "d" * 3000)[:2000]


def test_where_a_protein_stands(tmp_path: Path) -> None:
    path = tmp_path / "two.fasta"
    path.write_text("\n>a first\nMKW\n\n>b\nMK<mask>\n")
    first, second = read_fasta(path)
    assert first == Protein("a", "first", "MKW", "two.fasta", 1, 2)
    assert second == Protein("b", "", "MK<mask>", "two.fasta", 2, 5)
    assert second.residues == 3


def test_one_report_serves_several_files() -> None:
    report = ReadReport()
    for text in (b">a\nmkw\n>b\n!\n", b">a\nmkw\n"):
        with mock.patch.object(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text))):
            list(read_fasta("-", report=report))
    assert (report.accepted, report.mended, len(report.rejects)) == (2, {Mend.LOWER_CASE: 2}, 1)


@pytest.mark.parametrize("offset", range(-7, 8))
def test_a_mask_on_the_border_of_two_pieces(offset: int) -> None:
    sequence = "M" * (sources.PIECE + offset) + "<mask>" + "K" * 10
    (protein,), _ = read(">a\n" + sequence, max_residues=100_000)
    assert protein.sequence == sequence


def zstd_compress(data: bytes) -> bytes:
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return bytes(importlib.import_module(module).compress(data))
        except ImportError:
            continue
    pytest.skip("neither Python 3.14 nor backports.zstd")


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd_compress,
}


@pytest.mark.parametrize("name", COMPRESS)
def test_compression_is_told_by_content(name: str, tmp_path: Path) -> None:
    path = tmp_path / "plain.fasta"
    path.write_bytes(COMPRESS[name](GOOD.encode()) + COMPRESS[name](b">b\nMKW\n"))
    assert pairs(list(read_fasta(path))) == [("ok", "MKWVTFISLL"), ("b", "MKW")]
    assert pairs(read(path.read_bytes())[0]) == [("ok", "MKWVTFISLL"), ("b", "MKW")]


@pytest.mark.parametrize("name", COMPRESS)
def test_cut_off_compression_is_an_error(name: str) -> None:
    data = COMPRESS[name]("".join(f">p{n}\nMKWVTF{'ACDEFGHIK'[n % 9]}\n" for n in range(999)).encode())
    assert f"{name} data damaged or cut off" in message(data[: len(data) // 2])
    assert f"{name} data damaged or cut off" in message(data[:-2])
    assert message(data[:20] + bytes(20) + data[40:])


def test_zstd_without_a_module_names_the_package() -> None:
    with mock.patch.dict(sys.modules, {"compression.zstd": None, "backports.zstd": None}):
        assert "pip install backports.zstd" in message(b"\x28\xb5\x2f\xfd\x04\x00")


def stop_at(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_fasta(path))
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    assert stop_at(tmp_path / "none.fasta") == f"{tmp_path / 'none.fasta'}: no such file; check the path"


def test_folder(tmp_path: Path) -> None:
    assert f"{tmp_path}: is a folder" in stop_at(tmp_path)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_unreadable_file(error: OSError, tmp_path: Path) -> None:
    with mock.patch.object(Path, "open", side_effect=error):
        assert str(tmp_path / "a.fasta") in stop_at(tmp_path / "a.fasta")


def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "no permission" in stop_at(path)


class Failing(io.RawIOBase):
    """A disk that fails after the first 20 bytes."""

    def __init__(self) -> None:
        self._left = b">a\nMKW\n>b\nMKW\n>c\nMK"

    def read(self, size: int = -1) -> bytes:
        if not self._left:
            raise OSError(5, "Input/output error")
        data, self._left = self._left[:size], self._left[size:]
        return data


def test_failing_disk_and_closed_stdin() -> None:
    with mock.patch.object(sys, "stdin", SimpleNamespace(buffer=Failing())):
        assert "cannot be read beyond line" in stop_at(Path("-"))
    with mock.patch.object(sys, "stdin", None):
        assert "standard input is closed" in stop_at(Path("-"))


def test_the_file_is_closed_when_the_reader_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(GOOD * 3)
    opened: list[Any] = []

    def spy(self: Path, mode: str) -> Any:
        opened.append(io.BufferedReader(io.FileIO(self, "r")))
        return opened[-1]

    with mock.patch.object(Path, "open", spy):
        reader = read_fasta(path)
        next(reader)
        assert not opened[0].closed
        reader.close()  # type: ignore[attr-defined]
    assert opened[0].closed


@pytest.mark.parametrize("path", sorted(DATA.glob("*/*.fasta")), ids=lambda path: path.stem)
def test_bundled_files_read_as_by_biopython(path: Path) -> None:
    with path.open() as stream:
        expected = [(title, sequence.upper().replace("J", "X")) for title, sequence in SimpleFastaParser(stream)]
    proteins = list(read_fasta(path, ReadPolicy(long=LongPolicy.TRUNCATE, max_residues=10**6)))
    assert [(f"{p.accession} {p.description}".strip(), p.sequence) for p in proteins] == expected


class Endless(io.RawIOBase):
    """A stream that starts with `head` and then repeats `block` until `size` bytes have been read."""

    def __init__(self, head: bytes, block: bytes, size: int) -> None:
        self._head = head
        self._block = block
        self._left = size

    def read(self, size: int = -1) -> bytes:
        if self._left <= 0:
            return b""
        data = self._head or self._block
        data, self._head = data[:size], data[size:]
        self._left -= len(data)
        return data


RECORDS = b">p\n" + (b"MKWVTFISLL" * 100 + b"\n") * 60
STREAMS = {
    "many records": (b"", RECORDS * 2, 50, ""),
    "one line of residues": (b">a\n", b"MKWV" * 20_000, 50, "over 1,000,000 residues"),
    "one line of gaps": (b">a\n", b"-" * 100_000, 50, "no residues"),
    "one header": (b">", b"a" * 100_000, 50, "no residues"),
    "one line of symbols": (b">a\n", b"!" * 100_000, 50, "unknown letter"),
    "short lines": (b">a\n", b"MKWVT\n" * 15_000, 50, "over 1,000,000 residues"),
    "blank lines": (b"", b"\n" * 100_000, 1, "holds no record"),
    "no FASTA": (b"", b"a" * 100_000, 50, "does not look like FASTA"),
}


@pytest.mark.slow
@pytest.mark.parametrize("head, block, megabytes, text", STREAMS.values(), ids=STREAMS.keys())
def test_memory_stays_bounded(head: bytes, block: bytes, megabytes: int, text: str) -> None:
    stream = SimpleNamespace(buffer=Endless(head, block, megabytes * 1_000_000))
    tracemalloc.start()
    try:
        with mock.patch.object(sys, "stdin", stream):
            outcome = drain(read_fasta("-", ReadPolicy(long=LongPolicy.TRUNCATE)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert text in outcome
    # A million residues in lines of five are 200,000 strings of some 54 bytes, and their list.
    assert peak < (20_000_000 if block.startswith(b"MKWVT\n") else 4_000_000)


def drain(proteins: Iterator[Protein]) -> str:
    try:
        for _ in proteins:
            pass
    except InputError as error:
        return str(error)
    return ""


def looks_like_protein(sequence: str) -> bool:
    return not is_nucleotides(sequence) and not no_residues([sequence], [len(sequence)])


residue_texts = (
    st.lists(st.sampled_from([*RESIDUES, "<mask>"]), min_size=1, max_size=200)
    .map("".join)
    .filter(looks_like_protein)
)
words = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=">"), min_size=1, max_size=12
)
proteins_lists = st.lists(
    st.builds(Protein, words, st.lists(words, max_size=3).map(" ".join), residue_texts),
    min_size=1,
    max_size=8,
    unique_by=lambda protein: protein.accession,
).filter(lambda proteins: not is_nucleotides("".join(protein.sequence for protein in proteins)))


line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
compressions = st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress])


@given(proteins_lists, st.integers(1, 100), line_ends, compressions)
@settings(deadline=None, max_examples=150)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    proteins: list[Protein],
    width: int,
    end: bytes,
    compress: Callable[[bytes], bytes],
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.fasta"
    write_fasta(path, proteins, width)
    written = path.read_bytes()
    found, report = read(compress(written.replace(b"\n", end)))
    assert [(p.accession, p.description, p.sequence) for p in found] == [
        (p.accession, p.description, p.sequence) for p in proteins
    ]
    assert (report.accepted, report.mended, report.rejects) == (len(proteins), {}, [])
    assert digest(found) == digest(proteins)


@given(st.binary(max_size=200), st.sampled_from([b"", b">", b">a\nMKW\n", b"\xef\xbb\xbf>a\n"]), compressions)
@settings(deadline=None, max_examples=300)
def test_bytes_raise_nothing_but_input_errors(
    data: bytes, head: bytes, compress: Callable[[bytes], bytes]
) -> None:
    check_proteins(compress(head + data))


@given(compressions, st.integers(0, 200), st.binary(max_size=8))
@settings(deadline=None, max_examples=300)
def test_damage_raises_nothing_but_input_errors(
    compress: Callable[[bytes], bytes], position: int, damage: bytes
) -> None:
    data = compress(GOOD.encode() * 20)
    check_proteins(data[:position] + damage + data[position + len(damage) :])


@given(st.text(st.sampled_from(">\n\rAaMKj*-. 7!\t<mask>\0\u00e9"), max_size=60))
@settings(deadline=None, max_examples=500)
def test_near_fasta_raises_nothing_but_input_errors(text: str) -> None:
    check_proteins(text.encode())
    check_proteins(text.encode(), long=LongPolicy.WINDOW, max_residues=2)


def check_proteins(data: bytes, **policy: Any) -> None:
    """Read `data`; whatever passes must be of ESM-2's alphabet, within the limit, with names of its own."""
    try:
        proteins, report = read(data, **policy)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert report.accepted == len({protein.record for protein in proteins}) > 0
    assert len({protein.accession for protein in proteins}) == len(proteins)
    for protein in proteins:
        assert not set(protein.sequence.replace("<mask>", "")) - set(RESIDUES)
        assert 1 <= protein.residues == len(ESM2_ALPHABET.tokenize(protein)) - 2
        assert protein.residues <= policy.get("max_residues", fasta.MAX_RESIDUES)


@given(residue_texts, st.integers(1, 40))
def test_windows_cover_the_sequence(sequence: str, size: int) -> None:
    proteins, _ = read(f">a\n{sequence}K\nK\n".encode(), long=LongPolicy.WINDOW, max_residues=size)
    assert "".join(protein.sequence for protein in proteins) == sequence + "KK"
    assert all(protein.residues == size for protein in proteins[:-1])


@pytest.fixture(scope="module")
def alphabet() -> Any:
    return pytest.importorskip("esm").Alphabet.from_architecture("ESM-1b")


def test_vocabulary_is_that_of_fair_esm(alphabet: Any) -> None:
    own = ESM2_ALPHABET
    assert list(own.vocabulary) == alphabet.all_toks
    ids = (alphabet.cls_idx, alphabet.padding_idx, alphabet.eos_idx, alphabet.unk_idx, alphabet.mask_idx)
    assert ids == (own.start, own.padding, own.end, own.vocabulary.index("<unk>"), own.mask)


def tokenized(sequence: str) -> list[int]:
    return ESM2_ALPHABET.tokenize(Protein("", "", sequence))


@given(sequence=st.lists(st.sampled_from([*RESIDUES, "-", ".", "<mask>"]), max_size=60).map("".join))
@settings(deadline=None)
def test_tokens_are_those_of_fair_esm(alphabet: Any, sequence: str) -> None:
    _, _, expected = alphabet.get_batch_converter()([("a", sequence)])
    assert tokenized(sequence) == expected[0].tolist()


def test_known_tokens() -> None:
    assert tokenized("MK<mask>X") == [0, 20, 15, 32, 24, 2]
    assert ESM2_ALPHABET.detokenize([0, 20, 15, 32, 24, 2, 1, 1]) == "MK<mask>X"
    assert tokenized("") == [0, 2]


@given(st.lists(st.integers(3, 32)))
def test_detokenize_is_the_inverse(residues: list[int]) -> None:
    assert tokenized(ESM2_ALPHABET.detokenize([0, *residues, 2, 1])) == [0, *residues, 2]


@pytest.mark.parametrize("sequence", ["MJK", "mk", "M<mask", "M<cls>", "M K", "M\n"])
def test_what_is_no_token_is_refused(sequence: str) -> None:
    with pytest.raises(InputError, match="is no token of ESM-2"):
        tokenized(sequence)


def test_digest_is_of_the_multiset_of_sequences() -> None:
    one, two = Protein("a", "", "MK"), Protein("b", "", "W")
    assert digest([one, two]) == digest([two, Protein("other", "name", "MK")])
    assert len({digest([]), digest([one]), digest([one, one]), digest([Protein("c", "", "MKW")])}) == 4
    assert digest([one]) == hashlib.sha256(hashlib.sha256(b"MK").digest()).hexdigest()


@given(st.lists(st.text(max_size=3)), st.lists(st.text(max_size=3)))
def test_what_was_seen_is_known(added: list[str], others: list[str]) -> None:
    seen = Seen()
    for text in added:
        seen.add(text)
    assert {text for text in [*added, *others] if text in seen} == set(added)


def test_many_are_seen_in_little_memory() -> None:
    seen = Seen()
    tracemalloc.start()
    for index in range(20_000):
        seen.add(f"sp|A{index:08d}|NAME")
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 24 * 20_000 + 20_000
    assert all(f"sp|A{index:08d}|NAME" in seen for index in range(0, 20_000, 7))
    assert not any(f"sp|B{index:08d}|NAME" in seen for index in range(5_000))


def test_written_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.fasta"
    write_fasta(path, [Protein("a", "b c", "MK<mask>W"), Protein("d", "", "MK")], width=3)
    assert path.read_bytes() == b">a b c\nMK<mask>\nW\n>d\nMK\n"


def test_nothing_is_written_when_reading_stops(tmp_path: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_text(GOOD + ">b\n" + "M" * 2000)
    with pytest.raises(InputError):
        write_fasta(tmp_path / "out.fasta", read_fasta(path))
    assert list(tmp_path.iterdir()) == [path]


def test_import_is_light() -> None:
    code = "import sys, turboesm_cli.sequences; print({'torch', 'esm', 'Bio', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
