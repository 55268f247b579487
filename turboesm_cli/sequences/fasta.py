"""FASTA → checked protein records → tokens of ESM-2.

Other formats are told by how they begin (`formats`); what Biopython reads in them goes through the same rules.

`read_fasta` streams: it holds one piece of a line and one record at a time, and beyond that only hashes of the
identifiers (24 bytes each at most) and the report. What it meets, and what it then does:

| met                                                      | done                                          |
|----------------------------------------------------------|-----------------------------------------------|
| gzip, bzip2, xz (told by content, not by name)           | accept                                        |
| zstd                                                     | accept with Python 3.14 or `backports.zstd`   |
| `-`, a pipe, `/dev/stdin`, `<(command)`                  | accept: read once                             |
| CRLF or CR line ends, UTF-8 byte-order mark, blank lines | accept                                        |
| lines that begin with `#`, before the first record (A3M) | accept: comments; of several chains: stop     |
| U Z B X O, and the literal `<mask>` on one line          | accept: tokens of ESM-2                       |
| lower case (soft-masking)                                | mend: upper-cased                             |
| blanks around groups of 10 letters (the last may be      | mend: dropped, if all lines of the record are |
| shorter), numbers at a line's edge that count residues   | such, else reject                             |
| gaps `-`                                                 | mend: dropped, for they are no residues       |
| `.` in a file that is plainly aligned (see below)        | mend: dropped, a gap                          |
| one `*`, or else one `.`, at the end                     | mend: dropped, a stop                         |
| J (leucine or isoleucine)                                | mend: read as X, for ESM-2 has no J           |
| `>` inside a line, before a letter                       | mend: both records are read, and told         |
| byte-order mark before `>` or at a line's end            | mend: dropped                                 |
| end-of-file mark of DOS (^Z), likewise                   | mend: dropped                                 |
| empty header                                             | mend: named `record-N`                        |
| control characters, tabs and other blanks in a header    | mend: replaced by spaces, which part words    |
| characters without width in a header (soft hyphen, BOM)  | mend: dropped; they part no identifier        |
| accession over 200 or description over 2,000 characters  | mend: shortened                               |
| identifier seen before                                   | mend: renamed `ID.2`, `ID.3`, ...             |
| over `max_residues`, policy `truncate`                   | mend: cut to the first `max_residues`         |
| over `max_residues`, policy `window`                     | accept: windows `ID/1-1022`, `ID/1023-2044`.. |
| `*` or `.` elsewhere, any other letter or symbol         | reject                                        |
| other blanks or digits; prose; words such as `null`      | reject: cannot be sequence                    |
| `MetLysTrp`, `ac-MKWV-NH2`                               | reject: write one letter per residue, no more   |
| PIR (`>P1;`), `>ss_pred`, `>ID:secstr`                   | reject by name                                |
| structure or topology in place of residues, or in the    | reject: such strings are made of H, E, C, of  |
| latter half of a record's lines (SignalP's third line)   | S, I, M, O, in runs                           |
| no residues after the header                             | reject                                        |
| 60 residues, nine of ten of them ACGTUN, the others of   | reject: looks like nucleotides; of 30, where  |
| IUPAC's codes, each base among them                      | there are ACGTUN only                         |
| more than half of the records, or of the first 20, such, | stop: looks like nucleotides                  |
| short ones counted                                       |                                               |
| over `max_residues`, policy `error`                      | stop                                          |
| over 1,000,000 residues in a record                      | stop, whatever the policy                     |
| no file, a folder, no permission, damaged compression    | stop                                          |
| compressed twice, an archive, a pickle, HDF5, PDF ..     | stop: what it is, and how to unpack it        |
| NUL bytes, bytes that are not UTF-8                      | stop: no text                                 |
| text before the first `>`, no record, no good record     | stop                                          |
| written to while it is read (see `inputs`)               | stop                                          |

A `.` may be a gap, a stop codon (gffread) or mean "as in the first record". It is taken for a gap where the first
records (20, or as many as there are) have the same length, gaps counted, at least two have a `.`, the others
lower-case letters (inserts of A2M), not all in the same columns, and not all end in one; then in each record of
that length.

A mend is counted in the report, a reject skips the record and leaves a row there, a stop raises
InputError. With `strict` the first mend or reject is a stop, truncation included. Records before a stop
have been yielded by then: what is made of them should be published only once the iterator is exhausted.

Not done: PIR; `;` comments; a `<mask>` that is folded over two lines, which is
rejected. Prose of one word in upper case that no list knows, and oligonucleotides of under 30 letters in a file of
their own, pass for peptides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from pathlib import Path

from turboesm_cli.console import counted
from turboesm_cli.errors import InputError
from turboesm_cli.outputs.files import atomic_output
from turboesm_cli.outputs.shard_records import Seal
from turboesm_cli.sequences.formats import FASTA, format_of
from turboesm_cli.sequences.identifiers import Seen
from turboesm_cli.sequences.inputs import Input
from turboesm_cli.sequences.lines import Mend
from turboesm_cli.sequences.lookalikes import is_nucleotides, nearly_bases, no_residues
from turboesm_cli.sequences.records import Record
from turboesm_cli.sequences.rejects import Reject
from turboesm_cli.sequences.residues import count, slices
from turboesm_cli.sequences.sources import opened, pieces

MAX_RESIDUES = 1022  # ESM-2 was trained with crops of 1024 tokens, <cls> and <eos> included
OPENING = 20  # records that tell what a file holds, fewer where they are long
OPENING_RESIDUES = 100_000
SAMPLE = 200  # residues of a record, and records, that tell whether short ones together are nucleotides


class LongPolicy(StrEnum):
    """What to do with a record of more than `max_residues` residues."""

    ERROR = "error"
    TRUNCATE = "truncate"
    WINDOW = "window"


@dataclass(frozen=True)
class Protein:
    """One sequence to be tokenized, and where it was read."""

    accession: str  # first word of the header
    description: str  # rest of the header
    sequence: str  # upper-case letters of ESM-2's alphabet; the literal "<mask>" may occur
    source: str = ""  # name of the file, or "-"
    record: int = 0  # counted from 1
    line: int = 0  # line of the header, counted from 1

    @property
    def residues(self) -> int:
        """Length in tokens, without <cls> and <eos>; a <mask> counts one."""
        return count(self.sequence)


@dataclass(frozen=True)
class ReadPolicy:
    """How `read_fasta` treats what it could mend or skip, and long records."""

    strict: bool = False  # stop at the first thing that would be mended or skipped
    long: LongPolicy = LongPolicy.ERROR
    max_residues: int = MAX_RESIDUES

    def __post_init__(self) -> None:
        if self.max_residues < 1:
            raise InputError(f"max_residues is {self.max_residues}; give at least 1")


@dataclass
class ReadReport:
    """What `read_fasta` did, filled while it runs; one report may serve several files."""

    accepted: int = 0  # records, not windows of them
    mended: Counter[str] = field(default_factory=Counter)  # what was mended → in how many accepted records
    rejects: list[Reject] = field(default_factory=list)


def read_fasta(
    source: str | Path | Input, policy: ReadPolicy = ReadPolicy(), report: ReadReport | None = None
) -> Iterator[Protein]:
    """Yield the proteins of a file, compressed or not, of standard input (`-`), or of an open input.

    FASTA, or one of `formats.FORMATS`.
    The table above says what is accepted, mended, rejected and refused; `report` is filled along the way.
    Raises InputError while iterating, also where the file cannot be opened.
    """
    with opened(source) as text:
        name = Path(source.source if isinstance(source, Input) else source).name
        sieve = _Sieve(text.label, name, policy, ReadReport() if report is None else report)
        kind = format_of(text)
        found = kind.read(pieces(text), text.label)
        first, stop = _opening(found)
        sieve.weigh(first, whole=stop is None)
        for record in chain(first, found):
            yield from sieve.sift(record)
        if stop is not None:
            raise stop
        sieve.finish("FASTA starts with a '>' header" if kind is FASTA else f"its first line is {kind.name}'s")


def _opening(found: Iterator[Record]) -> tuple[list[Record], InputError | None]:
    """The first records, which are weighed together, and what stopped reading among them."""
    first: list[Record] = []
    try:
        for record in found:
            first.append(record)
            if len(first) == OPENING or sum(each.residues for each in first) > OPENING_RESIDUES:
                break
    except InputError as error:
        return first, error
    return first, None


def digest(proteins: Iterable[Protein]) -> str:
    """Return the SHA-256, in hex, of the sorted SHA-256s of the sequences.

    Order and names do not count; how often a sequence occurs does.
    """
    each = sorted(hashlib.sha256(protein.sequence.encode()).digest() for protein in proteins)
    return hashlib.sha256(b"".join(each)).hexdigest()


def digest_in_order(proteins: Iterable[Protein]) -> str:
    """Return the SHA-256, in hex, of headers and sequences: names and order count."""
    found = hashlib.sha256()
    for protein in proteins:
        found.update(f"{protein.accession}\0{protein.description}\0{protein.sequence}\0".encode())
    return found.hexdigest()


def write_fasta(path: Path, proteins: Iterable[Protein], width: int = 80, seal: Seal | None = None) -> None:
    """Write `proteins` to `path`, `width` residues per line, whole or not at all. Raises OutputError.

    `seal`: of a shard.
    """
    with atomic_output(path, seal) as partial, partial.open("w", encoding="utf-8", newline="\n") as stream:
        for protein in proteins:
            stream.write(f">{protein.accession} {protein.description}".rstrip() + "\n")
            stream.writelines(line + "\n" for line in slices(protein.sequence, width))


def _are_aligned_by_dots(first: list[Record]) -> bool:
    """Whether the first records are the rows of an alignment, with dots for gaps; see the table."""
    dotted = [record.dots for record in first if record.dots.count]
    alike = {record.width for record in first} == {first[0].width}
    has_gaps = len(dotted) > 1 and len({record.dots.columns for record in first}) > 1
    # A row of upper-case letters alone is what dots of other rows stand for; where all end in one, they are stops.
    of_gaps = all(record.dots.count or Mend.LOWER_CASE in record.mends for record in first)
    return alike and has_gaps and of_gaps and not all(dots.last for dots in dotted)


class _Sieve:
    """Turns the records of one source into proteins, by the policy, and reports on them."""

    def __init__(self, label: str, source: str, policy: ReadPolicy, report: ReadReport) -> None:
        self._label = label
        self._source = source
        self._policy = policy
        self._report = report
        self._given = Seen()  # identifiers
        self._suffixes: dict[str, int] = {}  # identifiers met more than once → the last suffix given to it
        self._records = self._bases = 0  # all, and those of which nearly all letters are bases
        self._sample: list[str] = []  # of the latter
        self._first_width = self._aligned_width = 0  # letters, gaps counted; 0 where `.` is no gap
        self._accepted = False
        self._first_reject = ""

    def weigh(self, first: list[Record], whole: bool) -> None:
        """Tell from the first records what the source holds. Raises InputError for nucleotides."""
        if not first:
            return
        self._first_width = first[0].width if not first[0].dots.count else 0
        if _are_aligned_by_dots(first):
            self._aligned_width = first[0].width
        sequences = [sequence for record in first if (sequence := "".join(record.parts)) and not record.reason]
        bases = [sequence[:SAMPLE] for sequence in sequences if nearly_bases(sequence)]
        if whole:
            self._require_protein(
                len(bases), len(first), bases, f"{len(bases)} of its first {counted(len(first), 'record')}"
            )

    def sift(self, record: Record) -> Iterator[Protein]:
        """Yield what the policy makes of `record`: nothing, a protein, or its windows."""
        sequence = "".join(record.parts)
        self._count_bases(sequence)
        reason = record.reason or self._objection(record, sequence)
        if reason:
            self._reject(record, reason)
            return
        proteins = self._proteins(record, sequence)
        self._accept(record)
        yield from proteins

    def finish(self, hint: str) -> None:
        """Raise InputError where no record was accepted, or most were nucleotides."""
        found = f"{self._bases:,} of its {counted(self._records, 'record')}"
        self._require_protein(self._bases, self._records, self._sample, found)
        if self._first_reject and not self._accepted:
            raise InputError(f"{self._first_reject}; every other record was rejected, too: mend the file")
        if not self._accepted:
            raise InputError(f"{self._label}: holds no record; {hint}")

    def _count_bases(self, sequence: str) -> None:
        self._records += 1
        if nearly_bases(sequence):
            self._bases += 1
            if len(self._sample) < SAMPLE:
                self._sample.append(sequence[:SAMPLE])

    def _require_protein(self, bases: int, records: int, sample: list[str], found: str) -> None:
        if 2 * bases > records and is_nucleotides("".join(sample)):
            raise InputError(f"{self._label}: looks like nucleotides ({found}); translate it to protein first")

    def _objection(self, record: Record, sequence: str) -> str:
        if record.dots.count and not self._mends_dots(record):
            return f"'.' inside the sequence at {record.dots.first}: a stop, or a gap of records that do not align"
        if not sequence:
            return "no residues after the header"
        if is_nucleotides(sequence):
            return "looks like nucleotides; translate it to protein first"
        return no_residues(record.parts, record.lines.widths)

    def _mends_dots(self, record: Record) -> bool:
        """Whether the dots of a record are gaps of an alignment, or the one at its end a stop."""
        if record.width == self._aligned_width:
            record.mends.setdefault(Mend.GAPS, record.line)
            return True
        if record.dots.count == 1 and record.dots.last and record.width != self._first_width and not record.stop:
            record.mends.setdefault(Mend.DOT, record.line)
            return True
        return False

    def _reject(self, record: Record, reason: str) -> None:
        if self._policy.strict:
            raise InputError(f"{record.where}: {reason}; mend the record, or skip it by reading without --strict")
        self._first_reject = self._first_reject or f"{record.where}: {reason}"
        self._report.rejects.append(Reject(self._source, record.record, record.line, record.accession, reason))

    def _accept(self, record: Record) -> None:
        if self._policy.strict and record.mends:
            mend, line = next(iter(record.mends.items()))
            raise InputError(
                f"{self._label}: record {record.record} ({record.accession}), line {line or record.line}: would "
                f"be mended: {mend}; mend the file, or read it without --strict"
            )
        self._accepted = True
        self._report.accepted += 1
        self._report.mended.update(mend.value for mend in record.mends)

    def _proteins(self, record: Record, sequence: str) -> list[Protein]:
        accession = self._unique(record, record.accession)
        limit = self._policy.max_residues
        if record.residues <= limit:
            return [self._protein(record, accession, sequence)]
        if self._policy.long == LongPolicy.WINDOW:
            return self._windows(record, accession, sequence)
        if self._policy.long == LongPolicy.TRUNCATE:
            record.mends[Mend.TRUNCATED] = record.line
            return [self._protein(record, accession, next(slices(sequence, limit)))]
        raise InputError(
            f"{record.where}: {record.residues:,} residues, over the limit of {limit:,}; remove the record, "
            "or choose --long truncate or --long window"
        )

    def _windows(self, record: Record, accession: str, sequence: str) -> list[Protein]:
        windows, first = [], 1
        for part in slices(sequence, self._policy.max_residues):
            last = first + count(part) - 1
            name = self._unique(record, f"{accession}/{first}-{last}")
            windows.append(self._protein(record, name, part))
            first = last + 1
        return windows

    def _protein(self, record: Record, accession: str, sequence: str) -> Protein:
        return Protein(accession, record.description, sequence, self._source, record.record, record.line)

    def _unique(self, record: Record, accession: str) -> str:
        """Return `accession`, or where it was given before the first `accession.N` that was not."""
        if accession not in self._given:
            self._given.add(accession)
            return accession
        record.mends.setdefault(Mend.DUPLICATE, record.line)
        suffix = self._suffixes.get(accession, 1) + 1
        while f"{accession}.{suffix}" in self._given:
            suffix += 1
        self._suffixes[accession] = suffix
        self._given.add(f"{accession}.{suffix}")
        return f"{accession}.{suffix}"
