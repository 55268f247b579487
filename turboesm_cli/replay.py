"""Proteins decoded from a cache after their prompts, and what that is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from turboesm_cli import decode, metrics
from turboesm_cli.cache import PackedCache
from turboesm_cli.codec import CodecSpec
from turboesm_cli.dense import DenseCache
from turboesm_cli.engine import AnyCache, Batch, Job, TaskT, in_order
from turboesm_cli.evaluation import ProteinResult, compare_predictions
from turboesm_cli.formats import FORMATS
from turboesm_cli.model import EsmModel
from turboesm_cli.sequences import Protein
from turboesm_cli.stats import to_tokens


@dataclass(frozen=True)
class Prompt:
    """A protein, how many of its tokens are prompt, and a cache that holds them already, or None."""

    protein: Protein
    cached: int
    cache: PackedCache | None = None

    @property
    def tokens(self) -> Tensor:
        """Ids int64 [T] of the whole protein."""
        return to_tokens([self.protein], torch.device("cpu"))[0]

    def job(self, steps: int | None = None) -> Job:
        """Decode the rest of the protein, or `steps` tokens that are not known yet."""
        tokens = self.tokens
        rest = tokens[self.cached :] if steps is None else None
        return Job(
            tokens[: self.cached], len(tokens) - self.cached if rest is not None else steps or 0, rest, self.cache
        )


def new_cache(model: EsmModel, spec: CodecSpec, kv: str, slots: int, capacity: int) -> AnyCache:
    """An empty cache: packed, or a kind of `FORMATS`."""
    if kv == "packed":
        return PackedCache(model, spec, slots, capacity)
    return DenseCache(model, slots, capacity, FORMATS[kv])


def run(
    batch: Batch[TaskT], prompts: Iterable[Prompt], steps: int | None = None
) -> Iterator[tuple[Prompt, Tensor]]:
    """Each prompt with what its job gives, in the order of the prompts."""
    started: dict[int, Prompt] = {}

    def jobs() -> Iterator[Job]:
        for number, prompt in enumerate(prompts):
            started[number] = prompt
            yield prompt.job(steps)

    yield from in_order((number, (started.pop(number), found)) for number, found in batch.run(jobs()))


@torch.no_grad()
def compare(model: EsmModel, prompt: Prompt, found: Tensor) -> tuple[ProteinResult, ProteinResult]:
    """Hidden states [n, E] decoded after a prompt: against an fp32 cache, and (drift) fp32 against ESM-2."""
    tokens, cached = prompt.tokens[None].to(model.device), prompt.cached
    exact = decode.teacher_forced(model, tokens, [cached], None)[0, cached:]
    encoded = decode.encode(model, tokens)[0, cached:]
    targets = tokens[0, cached:]
    quantization = ProteinResult(
        prompt.protein,
        metrics.cosines(exact, found).cpu(),
        compare_predictions(model, targets, exact, found),
    )
    drift = ProteinResult(
        prompt.protein,
        metrics.cosines(encoded, exact).cpu(),
        compare_predictions(model, targets, encoded, exact),
    )
    return quantization, drift
