"""How fast attention over packed caches is on a CPU, and packing, beside torch's attention over fp32 caches.

What is compared takes turns, call by call, so that what else the machine does meets all alike. A row is the median
of a call, with its p20 and p80; a ratio is that of medians.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from turboesm_kernels import cpu_compiled, dispatch
from turboesm_kernels.dispatch import Backend
from turboesm_kernels.operands import Held, PreparedLayer

from turboesm_cli.evaluation.rows import device_name
from turboesm_cli.evaluation.synthetic import Shape, make_layer, random_cache, rope_of
from turboesm_cli.evaluation.timing import Timing, once
from turboesm_cli.reporting.results import ResultRow
from turboesm_cli.whereabouts import command

CPU = torch.device("cpu")
BACKENDS: tuple[Backend, ...] = ("compiled", "lookup")
FP32 = "fp32-sdpa"
THREADS = (1, 2)
SHAPES = tuple(
    Shape(batch, tokens, dim=dim) for dim in (16, 64) for batch in (1, 8) for tokens in (256, 1024, 4096)
)
LAYERS = 3
"""Caches that calls rotate through, as a step goes from layer to layer."""

WARM_UP, ROUNDS = 2, 21

Call = Callable[[int], object]


def bench(
    shapes: Sequence[Shape] = SHAPES, threads: Sequence[int] = THREADS, version: str = "", commit: str = ""
) -> Iterator[ResultRow]:
    """Measure each shape with each number of threads; rows come shape by shape."""
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for shape in shapes:
                yield from _bench_shape(shape, partial(_row, version=version, commit=commit))
    finally:
        torch.set_num_threads(before)


def _bench_shape(shape: Shape, stamp: Callable[..., ResultRow]) -> Iterator[ResultRow]:
    layer, rope = make_layer(shape, CPU), rope_of(shape.tokens, shape.dim, CPU)
    caches = [random_cache(layer, shape, rope) for _ in range(LAYERS)]
    q = torch.randn(shape.batch, shape.heads, 1, shape.dim) / 8
    backends = [name for name in BACKENDS if _runs(name, q, caches[0], layer)]
    attending = {name: _attending(q, caches, layer, name) for name in backends} | {FP32: _fp32(q, shape)}
    took = _in_turn(attending)
    for name, timing in took.items():
        yield stamp(shape, name, "us", timing, "us")
    for backend in backends:
        yield stamp(shape, backend, "ratio_fp32_sdpa", took[FP32].median / took[backend].median, "1")
        yield stamp(shape, backend, "relative_error", _error(q, caches[0], layer, backend), "1")
    for name, timing in _in_turn({name: _appending(q, caches, layer, name) for name in backends}).items():
        yield stamp(shape, f"{name}-pack", "us_one_token", timing, "us")


def _runs(name: Backend, q: Tensor, held: Held, layer: PreparedLayer) -> bool:
    try:
        return dispatch.choose(q, held, layer, name) == name
    except dispatch.BackendError:
        return False


def _attending(q: Tensor, caches: Sequence[Held], layer: PreparedLayer, name: Backend) -> Call:
    """As decoding calls it."""
    steps = [cpu_compiled.Step.of(layer, held) for held in caches]

    def attend(turn: int) -> Tensor:
        held, step = caches[turn % LAYERS], steps[turn % LAYERS]
        if name == "compiled" and step is not None:
            return step.reading.attend(q, held.lengths, held.sinks + held.tokens)
        return dispatch.attend(q, held, layer, name)

    return attend


def _appending(q: Tensor, caches: Sequence[Held], layer: PreparedLayer, name: Backend) -> Call:
    steps = [cpu_compiled.Step.of(layer, held) for held in caches]
    last = torch.full((len(q),), caches[0].sinks + caches[0].tokens - 1, dtype=torch.int32)

    def append(turn: int) -> None:
        if name == "compiled" and (step := steps[turn % LAYERS]) is not None:
            step.writing.append(q, -q, last)
        else:
            dispatch.append(q, -q, layer, caches[turn % LAYERS], last, name)

    return append


def _fp32(q: Tensor, shape: Shape) -> Call:
    """Attention over as many tokens, the sink counted."""
    full = (2, shape.batch, shape.heads, shape.tokens + 1, shape.dim)
    pairs = [torch.randn(full).unbind() for _ in range(LAYERS)]

    def attend(turn: int) -> Tensor:
        k, v = pairs[turn % LAYERS]
        return scaled_dot_product_attention(q, k, v, scale=1.0)

    return attend


def _in_turn(calls: dict[str, Call]) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            took = once(partial(call, turn), CPU)
            samples[name] += [took] if turn >= WARM_UP else []
    return {name: Timing.of(found) for name, found in samples.items()}


def _error(q: Tensor, held: Held, layer: PreparedLayer, name: Backend) -> float:
    """Relative error against the reference in double precision."""
    expected = dispatch.plain_attend(q.double(), held, layer)
    return ((dispatch.attend(q, held, layer, name) - expected).norm() / expected.norm()).item()


def _row(
    shape: Shape, what: str, metric: str, value: float | Timing, unit: str, version: str, commit: str
) -> ResultRow:
    timing = value if isinstance(value, Timing) else Timing(value, value, value, 1)
    spread = (timing.p20, timing.p80) if isinstance(value, Timing) else (None, None)
    return ResultRow(
        model=str(shape), recipe=what, bits_k=shape.bits, bits_v=shape.bits, family="", protocol="kernel",
        metric=metric, value=timing.median, unit=unit, n=timing.n, device=device_name(CPU), dtype="float32",
        seed=0, version=version, commit=commit, tokens=shape.tokens, p20=spread[0], p80=spread[1],
        torch=torch.__version__, command=command(), date=datetime.now(UTC).date().isoformat(),
    )  # fmt: skip


def table(rows: Sequence[ResultRow]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: a line for each shape and number of threads; in brackets how much longer fp32 takes."""
    names = [*BACKENDS, FP32]
    found = {(row.device, row.model, row.tokens, row.recipe, row.metric): row.value for row in rows}
    lines = []
    for device, model, tokens in dict.fromkeys((row.device, row.model, row.tokens) for row in rows):
        cells = []
        for name in names:
            took = found.get((device, model, tokens, name, "us"))
            ratio = found.get((device, model, tokens, name, "ratio_fp32_sdpa"))
            cells.append("" if took is None else f"{took:,.0f}" + ("" if ratio is None else f" ({ratio:.2f})"))
        lines.append([model, f"{tokens:,}", device.split(", ")[-1], *cells])
    return ["shape", "tokens", "", *(f"{name}, µs" for name in names)], lines
