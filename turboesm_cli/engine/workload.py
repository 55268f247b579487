"""What there is to decode: counted first, then streamed, so that memory does not grow with the input."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

from turboesm_cli.cache.cache_file import Packfile
from turboesm_cli.codec.header import Known, seen
from turboesm_cli.engine.prompts import Prompt
from turboesm_cli.errors import InputError
from turboesm_cli.models.shapes import check_context
from turboesm_cli.outputs.shards import Shard, part_of
from turboesm_cli.sequences.fasta import Protein


@dataclass(frozen=True)
class Workload:
    """Prompts and what to expect of them; of a shard its own, and what all shards have to agree on of the whole.

    count     proteins; of a shard its own
    cached    tokens of the prompts, all proteins together; of a shard its own
    decoded   tokens that follow the prompts, likewise
    longest   tokens of the longest protein of the whole, control tokens counted
    longest_prompt  of the longest prompt of the whole
    known     proteins of the whole that were in the bundle's calibration set
    sha256    of names, sequences and lengths of prompts of the whole, in their order
    prompt    what of a protein is prompt, in words
    prompts   the proteins, from the first one at each call; InputError, before the last one is given, where they
              are not the same
    first     the first protein's number in the whole, counted from 0
    total     proteins of the whole
    """

    count: int
    cached: int
    decoded: int
    longest: int
    longest_prompt: int
    known: int
    sha256: str
    prompt: str
    prompts: Callable[[], Iterator[Prompt]]
    first: int
    total: int

    @property
    def place(self) -> tuple[int, int, int]:
        """The first protein's number, how many there are, and how many in the whole."""
        return self.first, self.count, self.total


def of_proteins(
    proteins: Callable[[], Iterable[Protein]],
    rule: Callable[[Protein], int],
    bundle: Known,
    prompt: str = "",
    shard: Shard | None = None,
) -> Workload:
    """Proteins, which are gone through more than once; `rule` says how many of a protein's tokens are prompt."""

    def prompts() -> Iterator[Prompt]:
        return (Prompt(protein, rule(protein), bundle.alphabet) for protein in proteins())

    return _counted(prompts, bundle, prompt, shard)


def of_packfile(
    stack: ExitStack, file: Packfile, limit: int | None, bundle: Known, shard: Shard | None = None
) -> Workload:
    """The caches of a file, or the first `limit`; `stack` keeps the file open. Raises InputError for none."""
    stack.enter_context(file)
    if not len(file):
        raise InputError(
            "the file of caches is the output of an empty shard: it holds no proteins; merge it first"
        )

    def prompts() -> Iterator[Prompt]:
        return (
            Prompt(stored.protein, stored.cached, bundle.alphabet, stored.read) for stored in islice(file, limit)
        )

    return _counted(prompts, bundle, "stored", shard)


@dataclass(frozen=True)
class _Notes:
    """What is noted of each protein so that a shard can tell its own, and that they stay the same: 20 bytes."""

    residues: array[int] = field(default_factory=lambda: array("I"))
    cached: array[int] = field(default_factory=lambda: array("I"))
    decoded: array[int] = field(default_factory=lambda: array("I"))
    digests: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, prompt: Prompt, decoded: int, described: bytes) -> None:
        self.residues.append(prompt.protein.residues)
        self.cached.append(prompt.cached)
        self.decoded.append(decoded)
        self.digests.append(_short_digest(described))


def _counted(prompts: Callable[[], Iterator[Prompt]], bundle: Known, words: str, shard: Shard | None) -> Workload:
    count = cached = decoded = longest = longest_prompt = known = 0
    identity, notes = hashlib.sha256(), _Notes()
    for prompt in prompts():
        tokens, described = prompt.length, _described(prompt)
        check_context(prompt.protein, tokens, bundle.shape)
        count, longest, longest_prompt = count + 1, max(longest, tokens), max(longest_prompt, prompt.cached)
        cached += prompt.cached
        decoded += tokens - prompt.cached
        identity.update(described)
        known += len(seen(bundle, [prompt.protein]))
        if shard is not None:
            notes.add(prompt, tokens - prompt.cached, described)
    sha256 = identity.hexdigest()
    same = partial(_unchanged, prompts, count, sha256)
    whole = Workload(count, cached, decoded, longest, longest_prompt, known, sha256, words, same, 0, count)
    return whole if shard is None else _part(whole, prompts, notes, part_of(notes.residues, shard))


def _part(whole: Workload, prompts: Callable[[], Iterator[Prompt]], notes: _Notes, own: range) -> Workload:
    cached, decoded = (sum(each[own.start : own.stop]) for each in (notes.cached, notes.decoded))
    return replace(
        whole,
        count=len(own),
        cached=cached,
        decoded=decoded,
        prompts=lambda: _own(prompts(), notes.digests, own),
        first=own.start,
    )


def _own(prompts: Iterable[Prompt], digests: array[int], own: range) -> Iterator[Prompt]:
    """The prompts of a shard; what comes after them is not read. Raises InputError where they changed."""
    at = 0
    for at, prompt in enumerate(islice(prompts, own.stop if own else 0), 1):
        if at > own.start:
            if _short_digest(_described(prompt)) != digests[at - 1]:
                raise _changed()
            yield prompt
    if own and at < own.stop:
        raise _changed()


def _short_digest(described: bytes) -> int:
    return int.from_bytes(hashlib.sha256(described).digest()[:8], "little")


def _unchanged(prompts: Callable[[], Iterator[Prompt]], count: int, sha256: str) -> Iterator[Prompt]:
    return _same(prompts(), count, sha256)


def _same(prompts: Iterable[Prompt], count: int, sha256: str) -> Iterator[Prompt]:
    """The prompts. Raises InputError where they are not those that were counted.

    That is before the last one is given, since who has as many as were counted may not ask for another.
    """
    identity, given = hashlib.sha256(), 0
    for given, prompt in enumerate(prompts, 1):
        identity.update(_described(prompt))
        if given > count or (given == count and identity.hexdigest() != sha256):
            raise _changed()
        yield prompt
    if given < count:
        raise _changed()


def _changed() -> InputError:
    return InputError("the proteins changed while they were read; run the command again")


def _described(prompt: Prompt) -> bytes:
    protein = prompt.protein
    return f"{protein.accession}\0{protein.sequence}\0{prompt.cached}\0{prompt.alphabet.tags(protein)}".encode()
