"""Proteins decoded from a cache after their prompts: jobs for a batch, in the order of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import PackedCache
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.engine.batch import AnyCache, Batch, Job, Shared, TaskT
from turboesm_cli.engine.prompts import Prompt
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.work import Tensors, Work


def job_of(prompt: Prompt) -> Job:
    """Decode the rest of a protein."""
    tokens, rest = prompt.tokens.tensor_split([prompt.cached])
    return Job(tokens, len(rest), rest, prompt.held)


def _samples(prompt: Prompt, number: int, steps: int, count: int, causal: bool) -> Iterator[Job]:
    """Sample up to `steps` tokens after a prompt, `count` times; `number`: its own among the prompts."""
    tokens, feed = prompt.tokens[: prompt.cached], None
    if causal:  # the last token of the prompt is decoded, so that the first one to sample is predicted
        tokens, feed = tokens[:-1], int(tokens[-1])
    shared = Shared() if count > 1 else None
    for sample in range(count):
        yield Job(tokens, steps, None, prompt.held, shared, feed, number, sample)


def new_cache(model: Model, spec: CodecSpec, kv: str, slots: int, capacity: int) -> AnyCache:
    """An empty cache: packed, or a kind of `FORMATS`."""
    if kv == "packed":
        return PackedCache(model, spec, slots, capacity)
    return DenseCache(model, slots, capacity, FORMATS[kv])


Jobs = Callable[[], Iterable[tuple[Prompt, Job]]]
"""The same jobs, each with its prompt, at each call."""


def rest_of(prompts: Callable[[], Iterable[Prompt]]) -> Jobs:
    """Decode the rest of each protein."""
    return lambda: ((prompt, job_of(prompt)) for prompt in prompts())


def samples_of(
    prompts: Callable[[], Iterable[Prompt]], steps: int, count: int, causal: bool, first: int = 0
) -> Jobs:
    """Sample up to `steps` tokens after each prompt, `count` times: all samples of a prompt, then of the next.

    first  the number of the first prompt, which random numbers follow from
    """

    def jobs() -> Iterator[tuple[Prompt, Job]]:
        for number, prompt in enumerate(prompts(), first):
            for job in _samples(prompt, number, steps, count, causal):
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
