"""Throughputs side by side: ratios to the fp16 cache under the same load, crossovers, rows and table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from turboesm_cli.evaluation import timing
from turboesm_cli.evaluation.rows import Context
from turboesm_cli.evaluation.throughput import AnyKind, Throughput
from turboesm_cli.models.protocol import Model
from turboesm_cli.reporting.results import ResultRow

PEER = "fp16"


@dataclass(frozen=True)
class Crossover:
    """Where `kind` becomes faster than fp16, between measured loads; `along` names what grows, the other is `at`.

    0 where it is faster from the smallest load on, infinite where it never is.
    """

    kind: AnyKind
    along: str
    at: int
    value: float

    @property
    def other(self) -> str:
        """What is `at`."""
        return "context" if self.along == "batch" else "batch"

    @property
    def sentence(self) -> str:
        """For the screen."""
        where = f"{self.kind.name} at {self.other} {self.at:,}"
        if math.isinf(self.value):
            return f"{where}: not faster than fp16 under any load measured"
        if self.value == 0:
            return f"{where}: faster than fp16 under every load measured"
        return f"{where}: faster than fp16 from {self.along} {self.value:,.1f} on"


def crossovers(found: Sequence[Throughput]) -> list[Crossover]:
    """Along the batch at each context, and along the context at each batch, where more than one was measured."""
    made = []
    for along, other in (("batch", "context"), ("context", "batch")):
        for at in sorted({getattr(item.load, other) for item in found}):
            line = [item for item in found if getattr(item.load, other) == at]
            for kind in dict.fromkeys(item.kind for item in line if item.kind.form == "packed"):
                points = sorted(
                    (getattr(item.load, along), ratio)
                    for item in line
                    if item.kind == kind and (ratio := speed_ratio(item, found)) is not None
                )
                if len(points) > 1:
                    made.append(Crossover(kind, along, at, _crossing(points)))
    return made


def _crossing(points: Sequence[tuple[int, float]]) -> float:
    """Where the ratio passes 1 for good, interpolated in the logarithm of the load."""
    if points[-1][1] < 1:
        return math.inf
    below = [index for index, (_, ratio) in enumerate(points) if ratio < 1]
    if not below:
        return 0.0
    (x, low), (y, high) = points[below[-1]], points[below[-1] + 1]
    return math.exp(math.log(x) + (1 - low) / (high - low) * math.log(y / x))


def speed_ratio(item: Throughput, found: Sequence[Throughput]) -> float | None:
    """Tokens per second over those of fp16 under the same load, where that was measured."""
    peer = _peer(item, found)
    return None if peer is None else item.tokens_per_second / peer.tokens_per_second


def _peer(item: Throughput, found: Sequence[Throughput]) -> Throughput | None:
    return next((other for other in found if other.kind.form == PEER and other.load == item.load), None)


def rows(model: Model, found: Sequence[Throughput], largest: Sequence[Throughput]) -> list[ResultRow]:
    """Results as rows; ratios are against fp16 under the same load."""
    context = Context.of(model)

    def row(
        item: Throughput, metric: str, value: float, unit: str, took: timing.Timing | None = None, per: float = 1.0
    ) -> ResultRow:
        spread = (took.p20 / per, took.p80 / per) if took else (None, None)
        made = context.row(
            item.kind.recipe, f"batch {item.load.batch}", "throughput", metric, float(value), unit,
            took.n if took else 1, tokens=item.load.context, p20=spread[0], p80=spread[1],
        )  # fmt: skip
        return made

    made = []
    for item in found:
        made += [
            row(item, "us_per_step", item.step.median, "us", item.step),
            row(item, "tokens_per_second", item.tokens_per_second, "1/s"),
            row(item, "first_token", item.first_token.median / 1e6, "s", item.first_token, 1e6),
            row(item, "prefill_peak_bytes", item.prefill_peak, "B"),
            row(item, "peak_bytes", item.peak, "B"),
            row(item, "cache_bytes_per_sequence", item.held / item.load.batch, "B"),
        ]
        peer = _peer(item, found)
        if peer is not None:
            ratio = item.tokens_per_second / peer.tokens_per_second
            made.append(row(item, "tokens_per_second_over_fp16", ratio, "1"))
            ratio = item.first_token.median / peer.first_token.median
            made.append(row(item, "first_token_over_fp16", ratio, "1"))
    for crossing in filter(lambda crossing: math.isfinite(crossing.value), crossovers(found)):
        own = (item for item in found if item.kind == crossing.kind)
        line = next(item for item in own if getattr(item.load, crossing.other) == crossing.at)
        made.append(row(line, f"crossover_{crossing.along}", crossing.value, "1"))
    for item in largest:
        made.append(row(item, "largest_batch", item.load.batch, "1"))
        made.append(row(item, "largest_batch_peak_bytes", item.peak, "B"))
    return made


COLUMNS = [
    "cache", "batch", "context", "us per step", "tokens/s", "x fp16", "first token s", "x fp16",
    "prefill peak GiB", "peak GiB", "MiB per sequence",
]  # fmt: skip


def cells(item: Throughput, found: Sequence[Throughput]) -> list[str]:
    """A line of the table."""
    peer = _peer(item, found)
    speed, first = "", ""
    if peer is not None:
        speed = f"{item.tokens_per_second / peer.tokens_per_second:.2f}"
        first = f"{item.first_token.median / peer.first_token.median:.3f}"
    return [
        item.kind.name, f"{item.load.batch:,}", f"{item.load.context:,}", f"{item.step.median:,.0f}",
        f"{item.tokens_per_second:,.0f}", speed, f"{item.first_token.median / 1e6:.3f}", first,
        f"{item.prefill_peak / 2**30:.2f}", f"{item.peak / 2**30:.2f}",
        f"{item.held / item.load.batch / 2**20:.2f}",
    ]  # fmt: skip
