"""Proteins decoded from a cache after their prompts, and what that is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import PackedCache
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.engine.batch import AnyCache, Batch, Job, Shared, TaskT
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.work import Tensors, Work
from turboesm_cli.sequences.fasta import Protein


@dataclass(frozen=True)
class Prompt:
    """A protein, how many of its tokens are prompt, and what gives the tensors of a cache of them, or None.

    `alphabet` is that of the model that decodes it.
    """

    protein: Protein
    cached: int
    alphabet: Alphabet
    held: Callable[[], Mapping[str, Tensor]] | None = None

    @property
    def tokens(self) -> Tensor:
        """Ids int64 [T] of the whole protein."""
        return torch.tensor(self.alphabet.tokenize(self.protein))

    @property
    def length(self) -> int:
        """Tokens of the whole protein."""
        return self.alphabet.length(self.protein)

    @property
    def text(self) -> str:
        """The residues that are prompt, as they were read where that is all."""
        if self.cached >= self.alphabet.prompt_length(self.protein):
            return self.protein.sequence
        return self.alphabet.detokenize(self.tokens[: self.cached].tolist())

    def job(self) -> Job:
        """Decode the rest of the protein."""
        prompt, rest = self.tokens.tensor_split([self.cached])
        return Job(prompt, len(rest), rest, self.held)

    def samples(self, number: int, steps: int, count: int, causal: bool) -> Iterator[Job]:
        """Sample up to `steps` tokens after it, `count` times; `number`: its own among the prompts."""
        prompt, feed = self.tokens[: self.cached], None
        if causal:  # the last token of the prompt is decoded, so that the first one to sample is predicted
            prompt, feed = prompt[:-1], int(prompt[-1])
        shared = Shared() if count > 1 else None
        for sample in range(count):
            yield Job(prompt, steps, None, self.held, shared, feed, number, sample)


def new_cache(model: Model, spec: CodecSpec, kv: str, slots: int, capacity: int) -> AnyCache:
    """An empty cache: packed, or a kind of `FORMATS`."""
    if kv == "packed":
        return PackedCache(model, spec, slots, capacity)
    return DenseCache(model, slots, capacity, FORMATS[kv])


Jobs = Callable[[], Iterable[tuple[Prompt, Job]]]
"""The same jobs, each with its prompt, at each call."""


def rest_of(prompts: Callable[[], Iterable[Prompt]]) -> Jobs:
    """Decode the rest of each protein."""
    return lambda: ((prompt, prompt.job()) for prompt in prompts())


def samples_of(
    prompts: Callable[[], Iterable[Prompt]], steps: int, count: int, causal: bool, first: int = 0
) -> Jobs:
    """Sample up to `steps` tokens after each prompt, `count` times: all samples of a prompt, then of the next.

    first  the number of the first prompt, which random numbers follow from
    """

    def jobs() -> Iterator[tuple[Prompt, Job]]:
        for number, prompt in enumerate(prompts(), first):
            for job in prompt.samples(number, steps, count, causal):
                yield prompt, job

    return jobs


def run(
    batch: Batch[TaskT], todo: Jobs, finish: Callable[[Prompt, Tensors], Tensors], work: Work
) -> Iterator[tuple[Prompt, Job, Tensors]]:
    """Each job with its prompt and what `finish` makes of its result, in the order of the jobs.

    What overtakes a slower one waits as `finish` leaves it. What `work` has is not decoded again.
    """
    started: dict[int, Prompt] = {}

    def jobs() -> Iterator[tuple[int, Job]]:
        for number, (prompt, job) in enumerate(todo()):
            if str(number) not in work:
                started[number] = prompt
                yield number, job

    fresh = batch.run(jobs())
    early: dict[int, Tensors] = {}
    for expected, (prompt, job) in enumerate(todo()):
        while expected not in early and str(expected) not in work:
            number, found = next(fresh)
            early[number] = work.unit(str(number), partial(finish, started.pop(number), found))
        held = early.pop(expected) if expected in early else work.unit(str(expected), dict)
        yield prompt, job, held
