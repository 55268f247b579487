"""How commands read FASTA: as their options say, telling what was mended and what was skipped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from turboesm_cli import console
from turboesm_cli.commands.checks import listed
from turboesm_cli.errors import BundleError, InputError
from turboesm_cli.sequences.fasta import MAX_RESIDUES, LongPolicy, Protein, ReadPolicy, ReadReport, read_fasta
from turboesm_cli.sequences.inputs import Input
from turboesm_cli.sequences.rejects import Reject, check_rejects, write_rejects
from turboesm_cli.sequences.tags import parse_tags, with_tags

if TYPE_CHECKING:
    from turboesm_cli.codec.bundle import Bundle
    from turboesm_cli.models.alphabet import Alphabet

SHOWN = 20
Found = TypeVar("Found")


@dataclass(frozen=True)
class Reading:
    """What the options say.

    limit    use the first so many proteins
    rejects  write a row for each skipped record of all files here
    tags      added to each header, whose own come first
    alphabet  of the model, where it is known: records with letters that it lacks are skipped
    """

    strict: bool = False
    long: LongPolicy = LongPolicy.ERROR
    limit: int | None = None
    rejects: Path | None = None
    max_residues: int = MAX_RESIDUES
    tags: str = ""
    alphabet: Alphabet | None = None
    _rejected: list[Reject] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rejects is not None:
            check_rejects(self.rejects)
        if self.alphabet is not None:
            self._check_tags(self.alphabet)

    def _check_tags(self, alphabet: Alphabet) -> None:
        """Raise InputError for a tag that the model is not told: it would change nothing."""
        for name in parse_tags(self.tags):
            if name not in alphabet.takes:
                told = " and ".join(alphabet.takes) or "nothing beside the sequence"
                raise InputError(f"--tags {name}=...: {alphabet.family} is told {told}; leave it out")

    def proteins(self, source: str) -> list[Protein]:
        """All proteins of a file, or the first `limit`. Raises InputError, also where it changes meanwhile."""
        with console.busy(f"reading {source}"), self._told(source) as found, Input(source) as opened:
            return list(self._watched(opened, found, links=True))

    def stream(self, source: str) -> Callable[[], Iterator[Protein]]:
        """As `proteins`, but read anew at each call; what cannot be read twice is held in memory.

        What was mended and skipped is told by the first one.
        """
        with self._told(source) as found:
            opened = Input(source)
            if not opened.rereadable:
                proteins = list(self._watched(opened, found))
                return lambda: iter(proteins)
        calls = count()

        def read() -> Iterator[Protein]:
            if next(calls):
                yield from self._watched(opened, ReadReport())
            else:
                with self._told(source) as found:
                    yield from self._watched(opened, found, links=True)

        return read

    def _watched(self, opened: Input, found: ReadReport, links: bool = False) -> Iterator[Protein]:
        """Proteins as long as what they are read from does not change; see `Input.require_unchanged`."""
        try:
            for protein in self._read(opened, found):
                opened.require_unchanged()
                yield protein
        except InputError:
            opened.require_unchanged(links)  # else what is wrong is not what the user's file holds
            raise
        opened.require_unchanged(links)

    def _read(self, opened: Input, found: ReadReport) -> Iterator[Protein]:
        policy = ReadPolicy(strict=self.strict, long=self.long, max_residues=self.max_residues)
        read = read_fasta(opened, policy, found)
        known = read if self.alphabet is None else self._known(read, self.alphabet, found)
        few = islice(known, None if self.limit is None else min(self.limit, sys.maxsize))
        tags = parse_tags(self.tags)
        return (with_tags(each, tags) for each in few) if tags else few

    def known(self, source: str, proteins: list[Protein], alphabet: Alphabet) -> list[Protein]:
        """Those of some proteins, read before the model was known, that have no letter which it lacks.

        Raises InputError where there is none.
        """
        self._check_tags(alphabet)
        with self._told(source) as found:
            kept = list(self._known(proteins, alphabet, found))
        if not kept:
            raise InputError(f"{source}: no record without letters that {alphabet.family} lacks")
        return kept

    def _known(self, proteins: Iterable[Protein], alphabet: Alphabet, found: ReadReport) -> Iterator[Protein]:
        for each in proteins:
            letter = alphabet.unknown(each.sequence)
            if letter is None:
                yield each
                continue
            reason = f"{letter} is no token of {alphabet.family}"
            if self.strict:
                raise InputError(
                    f"{each.source}: record {each.record} ({each.accession}), line {each.line}: {reason}; mend it "
                    "or skip it by reading without --strict"
                )
            found.rejects.append(Reject(each.source, each.record, each.line, each.accession, reason))

    @contextmanager
    def _told(self, source: str) -> Iterator[ReadReport]:
        """A report to fill; then, also where reading was stopped, what was mended and skipped is told."""
        found = ReadReport()
        try:
            yield found
        finally:
            self._rejected.extend(found.rejects)
            if self.rejects is not None:
                write_rejects(self.rejects, self._rejected)
            _say(source, found)


def _say(source: str, found: ReadReport) -> None:
    for what, times in sorted(found.mended.items()):
        console.warn(f"{source}: {what}: {console.counted(times, 'record')}")
    for reject in found.rejects[:SHOWN]:
        console.warn(
            f"{source}: skipped record {reject.record} ({reject.accession}), line {reject.line}: {reject.reason}"
        )
    if len(found.rejects) > SHOWN:
        console.warn(f"{source}: skipped {len(found.rejects) - SHOWN} more records; --rejects FILE lists all")


def hashed_bundle(path: Path) -> tuple[Bundle, str]:
    """A bundle, and the sha256 of the bytes that it was read from. Raises BundleError."""
    from turboesm_cli.codec.bundle import read_bundle

    return hashed(path, read_bundle)


def hashed(path: Path, read: Callable[[Path], Found]) -> tuple[Found, str]:
    """What `read` makes of a bundle, and the sha256 of the bytes that it was read from. Raises BundleError."""
    from turboesm_cli.outputs.files import file_sha256

    try:
        before = file_sha256(path)
    except OSError:  # which reading it tells of
        before = ""
    found = read(path)
    if file_sha256(path) != before:
        raise BundleError(f"{path} changed while it was read; run the command again")
    return found, before


def digest_of(sets: list[list[Protein]]) -> str:
    """sha256 of the proteins of several sets, in their order."""
    from turboesm_cli.sequences.fasta import digest_in_order

    return digest_in_order(protein for proteins in sets for protein in proteins)


def families_of(reading: Reading, names: str, limit: int | None, max_residues: int) -> dict[str, list[Protein]]:
    """Evaluation proteins by family: the first `limit` of each, without those that are too long."""
    from turboesm_cli.sequences.datasets import family_label, family_path

    sets = {}
    for name in listed(names):
        label = family_label(name)
        if label in sets or label == "all":
            raise InputError(f"two families are called {label!r}, or one 'all'; rename a file")
        proteins = reading.proteins(str(family_path(name)))
        short = [protein for protein in proteins if protein.residues <= min(max_residues, MAX_RESIDUES)]
        sets[label] = short[:limit]
        some = "" if limit is None or limit >= len(short) else f"the first {limit} of "
        which = f"{some}{len(short)} of {console.counted(len(proteins), 'protein')}"
        console.say(f"{label}: {which}, up to {max_residues} residues")
    if not sets or not all(sets.values()):
        raise InputError("no proteins to evaluate on; name families with --families, or raise --max-residues")
    return sets
