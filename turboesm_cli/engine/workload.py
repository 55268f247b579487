"""What there is to decode: counted first, then streamed, so that memory does not grow with the input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

from turboesm_cli.cache.cache_file import Packfile
from turboesm_cli.codec.bundle import Bundle, seen
from turboesm_cli.engine.jobs import Prompt
from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import check_context


@dataclass(frozen=True)
class Workload:
    """Prompts and what to expect of them.

    count     proteins
    decoded   tokens that follow the prompts, all proteins together
    longest   tokens of the longest protein, control tokens counted
    longest_prompt  of the longest prompt
    known     proteins that were in the bundle's calibration set
    sha256    of names, sequences and lengths of prompts, in their order
    prompt    what of a protein is prompt, in words
    prompts   the proteins, from the first one at each call; InputError, before the last one is given, where they
              are not the same
    """

    count: int
    decoded: int
    longest: int
    longest_prompt: int
    known: int
    sha256: str
    prompt: str
    prompts: Callable[[], Iterator[Prompt]]


def of_proteins(
    proteins: Callable[[], Iterable[Protein]], rule: Callable[[Protein], int], bundle: Bundle, prompt: str = ""
) -> Workload:
    """Proteins, which are gone through more than once; `rule` says how many of a protein's tokens are prompt."""

    def prompts() -> Iterator[Prompt]:
        return (Prompt(protein, rule(protein), bundle.alphabet) for protein in proteins())

    return _counted(prompts, bundle, prompt)


def of_packfile(stack: ExitStack, file: Packfile, limit: int | None, bundle: Bundle) -> Workload:
    """The caches of a file, or the first `limit`; `stack` keeps the file open."""
    stack.enter_context(file)

    def prompts() -> Iterator[Prompt]:
        return (
            Prompt(stored.protein, stored.cached, bundle.alphabet, stored.read) for stored in islice(file, limit)
        )

    return _counted(prompts, bundle, "stored")


def _counted(prompts: Callable[[], Iterator[Prompt]], bundle: Bundle, words: str) -> Workload:
    count = decoded = longest = longest_prompt = known = 0
    identity = hashlib.sha256()
    for prompt in prompts():
        tokens = prompt.length
        check_context(prompt.protein, tokens, bundle.shape)
        count, longest, longest_prompt = count + 1, max(longest, tokens), max(longest_prompt, prompt.cached)
        decoded += tokens - prompt.cached
        identity.update(_described(prompt))
        known += len(seen(bundle, [prompt.protein]))
    sha256 = identity.hexdigest()
    return Workload(
        count, decoded, longest, longest_prompt, known, sha256, words, lambda: _same(prompts(), count, sha256)
    )


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
