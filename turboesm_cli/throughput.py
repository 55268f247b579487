"""Tokens a second of whole models, and the memory they take, for each kind of cache.

A batch is prefilled with random residues up to the context's last token; that token is then decoded again and
again: one CUDA graph of the whole step, language-model head and sampling included. Sequences are full and of one
length, which spares the dense caches a mask that they would need otherwise.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

from turboesm_cli import __version__, timing
from turboesm_cli.codec import CodecSpec
from turboesm_cli.decode import lm_logits
from turboesm_cli.dense import DenseCache
from turboesm_cli.engine import PREFILL_TOKENS, AnyCache, Graph, Stepper
from turboesm_cli.formats import FORMATS
from turboesm_cli.generation import Sampling, draw, sample
from turboesm_cli.model import EsmModel
from turboesm_cli.plan import RESERVED, sequence_bytes
from turboesm_cli.replay import new_cache
from turboesm_cli.results import ResultRow, commit_of_source

REPEATS = 20
PEER = "fp16"


@dataclass(frozen=True)
class Load:
    """B sequences of `context` tokens."""

    batch: int
    context: int


@dataclass(frozen=True)
class Throughput:
    """What one kind of cache does under a load.

    step         microseconds of a decode step
    first_token  seconds from tokens to the first decoded token of all sequences
    peak         most bytes in use at once
    held         bytes of the cache
    """

    kind: str
    load: Load
    step: timing.Timing
    first_token: float
    peak: int
    held: int

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch."""
        return self.load.batch / self.step.median * 1e6


def sweep(
    model: EsmModel, spec: CodecSpec, kinds: Sequence[str], loads: Sequence[Load], memory: int
) -> Iterator[Throughput]:
    """Measure each kind under each load that fits in `memory` bytes."""
    for load in loads:
        for kind in kinds:
            if load.batch * sequence_bytes(spec, kind, load.context) > memory * (1 - RESERVED):
                continue
            with contextlib.suppress(torch.OutOfMemoryError):
                yield measure(model, spec, kind, load)
            empty_cache(model.device)


@torch.no_grad()
def measure(model: EsmModel, spec: CodecSpec, kind: str, load: Load, repeats: int = REPEATS) -> Throughput:
    """One kind of cache under one load. The prefill is done twice: libraries choose their kernels in the first."""
    device = model.device
    empty_cache(device)
    tokens = torch.randint(4, 24, (load.batch, load.context), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    cache = new_cache(model, spec, kind, load.batch, load.context)
    if isinstance(cache, DenseCache):
        cache.is_full = True
    stepper = Stepper(model, cache)
    chances = draw(0, load.batch).to(device)

    def step() -> None:
        hidden = stepper.step(tokens[:, -1])
        if model.has_lm_head:
            sample(lm_logits(model, hidden).float(), chances, Sampling())

    _prefill(stepper, tokens[: max(1, PREFILL_TOKENS // load.context)])
    _wait(device)
    started = time.perf_counter()
    _prefill(stepper, tokens)
    step()
    _wait(device)
    first_token = time.perf_counter() - started
    cache.rewind()
    graph = Graph(step, cache, 0)
    took = _time(graph, cache, device, repeats)
    return Throughput(kind, load, took, first_token, _peak(device), cache.nbytes)


def _prefill(stepper: Stepper, tokens: Tensor) -> None:
    """All but the last token of each sequence, so many sequences at once as the engine takes."""
    each = max(1, PREFILL_TOKENS // tokens.shape[1])
    for start in range(0, len(tokens), each):
        stepper.prefill(start, list(tokens[start : start + each, :-1]))


def _time(graph: Graph, cache: AnyCache, device: torch.device, repeats: int) -> timing.Timing:
    """Of the step alone, by the device's clock where it has one."""
    samples = []
    for index in range(repeats + 4):
        took = timing.once(graph, device)
        cache.rewind()
        if index >= 4:
            samples.append(took)
    return timing.Timing.of(samples)


def largest_batch(
    model: EsmModel, spec: CodecSpec, kind: str, context: int, memory: int, planned: int
) -> Throughput:
    """The largest batch whose peak stays under `memory` bytes: the planned one, made smaller until it fits."""
    batch = planned
    while True:
        try:
            found = measure(model, spec, kind, Load(batch, context), repeats=5)
            if found.peak <= memory:
                return found
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        empty_cache(model.device)
        batch = max(1, int(batch * 0.97) if batch > 33 else batch - 1)


def rows(
    model: EsmModel, spec: CodecSpec, found: Sequence[Throughput], largest: Sequence[Throughput]
) -> list[ResultRow]:
    """Results of a sweep; ratios are against fp16 under the same load."""
    peers = {item.load: item for item in found if item.kind == PEER}
    made = []
    for item in found:
        figures: list[tuple[str, float, str, timing.Timing | None]] = [
            ("us_per_step", item.step.median, "us", item.step),
            ("tokens_per_second", item.tokens_per_second, "1/s", None),
            ("first_token", item.first_token, "s", None),
            ("peak_bytes", item.peak, "B", None),
            ("cache_bytes", item.held, "B", None),
        ]
        if item.load in peers:
            peer = peers[item.load]
            figures.append(("speed_ratio_fp16", item.tokens_per_second / peer.tokens_per_second, "1", None))
            figures.append(("first_token_ratio_fp16", item.first_token / peer.first_token, "1", None))
        made += [_row(model, spec, item, *figure) for figure in figures]
    made += [_row(model, spec, item, "largest_batch", item.load.batch, "1", None) for item in largest]
    made += [_row(model, spec, item, "largest_batch_peak_bytes", item.peak, "B", None) for item in largest]
    return made


COLUMNS = [
    "cache",
    "batch",
    "context",
    "us a step",
    "tokens/s",
    "first token s",
    "peak GiB",
    "cache GiB",
    "x fp16",
]


def cells(found: Sequence[Throughput]) -> list[list[str]]:
    """A sweep as a table."""
    peers = {item.load: item for item in found if item.kind == PEER}
    return [
        [
            item.kind, f"{item.load.batch:,}", f"{item.load.context:,}", f"{item.step.median:,.0f}",
            f"{item.tokens_per_second:,.0f}", f"{item.first_token:.3f}", f"{item.peak / 2**30:.2f}",
            f"{item.held / 2**30:.2f}",
            f"{item.tokens_per_second / peers[item.load].tokens_per_second:.2f}" if item.load in peers else "",
        ]
        for item in found
    ]  # fmt: skip


def _row(
    model: EsmModel,
    spec: CodecSpec,
    item: Throughput,
    metric: str,
    value: float,
    unit: str,
    spread: timing.Timing | None,
) -> ResultRow:
    recipe = spec.recipe
    packed = item.kind == "packed"
    bits = 8 * FORMATS[item.kind].dtype.itemsize if not packed else 0
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return ResultRow(
        model=f"{model.name} B{item.load.batch}", recipe=recipe.name if packed else item.kind,
        bits_k=recipe.bits_k if packed else bits, bits_v=recipe.bits_v if packed else bits, family="",
        protocol="throughput", metric=metric, value=float(value), unit=unit, n=spread.n if spread else 1,
        device=device, dtype=str(next(model.net.parameters()).dtype).removeprefix("torch."), seed=0,
        version=__version__, commit=commit_of_source(), tokens=item.load.context,
        p20=spread.p20 if spread else None, p80=spread.p80 if spread else None, torch=torch.__version__,
        date=datetime.now(UTC).date().isoformat(),
    )  # fmt: skip


def empty_cache(device: torch.device) -> None:
    """Give freed memory back, so that a peak is that of one measurement."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
