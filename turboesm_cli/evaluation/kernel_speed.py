"""How fast the kernels are: decode attention and packing, beside fp16 attention and a paper-style kernel.

Inputs rotate through several caches, so many that the L2 does not hold them; a CUDA graph runs them one after
another, which leaves launch costs of the host out for everyone alike. A row is the median over replays of a
graph, with its p20 and p80. No ratio is given where a result differs from the plain reference by more than
`TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from turboesm_kernels import dispatch, reference
from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.reference import Packed

from turboesm_cli.evaluation.synthetic import (
    Shape,
    copies_for,
    held_bytes,
    make_caches,
    make_layer,
    random_cache,
    rope_of,
)
from turboesm_cli.evaluation.timing import Timing
from turboesm_cli.reporting.results import ResultRow
from turboesm_cli.whereabouts import command

TOLERANCE = 1e-3
REPLAYS = 20
MOST_UNPACKED = 600e6
"""Bytes of a cache that is still unpacked to float32 as a whole."""

PEERS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Call = Callable[[], object]

MARKS = (
    Shape(256, 1024),
    Shape(64, 1024),
    Shape(16, 8192),
    Shape(8, 1024),
    Shape(1, 1024),
    Shape(256, 1024, bits=2),
)
"""Shapes that are also measured against the paper's kernel and against unpacking first."""

OTHERS = (
    Shape(64, 1024, bits=4),
    *(Shape(64, 1024, dim=dim) for dim in (256, 128, 96, 80, 32, 24, 16)),
    *(Shape(64, 4096, heads=8, dim=128, queries=queries) for queries in (1, 2, 4, 8)),
)
MAP = tuple(Shape(batch, tokens) for tokens in (256, 1024, 4096, 16384) for batch in (1, 4, 16, 64, 256))
LARGEST = 6e9
"""Bytes of fp16 keys and values up to which a shape of the map is measured."""

SWEEP = (
    *MARKS,
    *OTHERS,
    *(shape for shape in MAP if shape not in MARKS and shape.fp16_bytes <= LARGEST),
)


def bench(shapes: Sequence[Shape] = SWEEP, version: str = "", commit: str = "") -> Iterator[ResultRow]:
    """Measure each shape on the current CUDA device; rows come shape by shape."""
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device)
    stamp = partial(_row, version=version, commit=commit)
    yield stamp(Shape(1, 0), "device-copy", "bandwidth", bandwidth, "TB/s")
    yield from _bench_pack(Shape(1, 1024), device, stamp)
    for shape in shapes:
        yield from _bench_attend(shape, device, bandwidth, stamp)
        torch.cuda.empty_cache()


def _bench_attend(
    shape: Shape, device: torch.device, bandwidth: float, stamp: Callable[..., ResultRow]
) -> Iterator[ResultRow]:
    layer, caches = make_caches(shape, device)
    q = shape.query(device) / 8
    backend = dispatch.choose(q, caches[0], layer)
    error = _error(q, caches[0], layer)
    ours = measure([partial(dispatch.attend, q, held, layer) for held in caches])
    nbytes = held_bytes(caches[0])
    rate = nbytes / ours.median / 1e6
    yield stamp(shape, backend, "us", ours, "us")
    yield stamp(shape, backend, "relative_error", error, "1")
    yield stamp(shape, backend, "packed_rate", rate, "TB/s")
    yield stamp(shape, backend, "share_of_copy", rate / bandwidth, "1")
    others = {name: _time_peer(name, shape, device) for name in PEERS}
    known = {name: timing for name, timing in others.items() if timing is not None}
    if shape in MARKS:
        if (paper := _time_paper(shape, device)) is not None:
            known["paper"] = paper
        if nbytes < MOST_UNPACKED:
            known["unpack-sdpa"] = measure_eagerly(partial(_unpack_then_sdpa, q, caches[0], layer))
        step = _time_packing(q, caches, layer)
        yield stamp(shape, "pack", "us_one_token", step, "us")
        yield stamp(shape, "pack", "share_of_attention", step.median / ours.median, "1")
    for name, timing in known.items():
        yield stamp(shape, name, "us", timing, "us")
        if error <= TOLERANCE:
            yield stamp(shape, name, f"ratio_{name}", timing.median / ours.median, "1")
    fastest = min((name for name in known if name in PEERS), key=lambda name: known[name].median)
    if error <= TOLERANCE:
        yield stamp(shape, fastest, "ratio_fastest_fp16", known[fastest].median / ours.median, "1")


def _time_packing(q: Tensor, caches: Sequence[Held], layer: PreparedLayer) -> Timing:
    """A decode step's packing: one token of each sequence, the last that there is room for."""
    last = torch.full((len(q),), caches[0].sinks + caches[0].tokens - 1, dtype=torch.int32, device=q.device)
    calls: list[Call] = [partial(dispatch.append, q, -q, layer, held, last) for held in caches]
    return measure(calls)


def _bench_pack(shape: Shape, device: torch.device, stamp: Callable[..., ResultRow]) -> Iterator[ResultRow]:
    """One layer's keys and values of a prefill."""
    layer = make_layer(shape, device)
    k, v = torch.randn(2, shape.batch, shape.heads, shape.tokens, shape.dim, device=device).half()
    held = random_cache(layer, shape, rope_of(shape.tokens, shape.dim, device))
    took = measure([partial(dispatch.append, k, v, layer, held, held.sinks)] * 8)
    yield stamp(shape, "pack", "us", took, "us")
    yield stamp(shape, "pack", "us_33_layers", 33 * took.median, "us")


def measure(calls: Sequence[Call]) -> Timing:
    """Time calls that a CUDA graph runs one after another: microseconds of one of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls[:2], calls[0]):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return Timing.of([_clock(graph.replay) / len(calls) for _ in range(REPLAYS)])


def measure_eagerly(call: Call) -> Timing:
    """The same for a call that no graph can hold."""
    call()
    return Timing.of([_clock(call) for _ in range(6)])


def _clock(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """TB/s at which a kernel moves 2 GB to another place, bytes read and written counted.

    Not `copy_`: in a graph that becomes a memory copy of the driver's, which is slower.
    """
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    timing = measure([partial(torch.neg, source, out=target)])
    return 2 * source.numel() * source.element_size() / timing.median / 1e6


def _error(q: Tensor, held: Held, layer: PreparedLayer) -> float:
    """Relative error of the first and last sequence against the reference in double precision."""
    out = dispatch.attend(q, held, layer)
    found, expected = [], []
    for index in (0, q.shape[0] - 1):
        one = slice(index, index + 1)
        assert held.k.scales is not None and held.v.scales is not None
        assert held.sink_k is not None and held.sink_v is not None
        k, v = Packed(held.k.codes[one], held.k.scales[one]), Packed(held.v.codes[one], held.v.scales[one])
        part = Held(k, v, held.rope, None, held.sink_k[one], held.sink_v[one])
        expected.append(dispatch.plain_attend(q[one].double(), part, layer))
        found.append(out[one].double())
    difference = torch.cat(found) - torch.cat(expected)
    return (difference.norm() / torch.cat(expected).norm()).item()


def _time_peer(name: str, shape: Shape, device: torch.device) -> Timing | None:
    """An fp16 backend of torch's attention on keys and values of the same shape; None where it does not run.

    Queries of one key/value head are rows of one attention: it reads keys and values once for all of them."""
    size = shape.batch * shape.heads * shape.tokens * shape.dim * 4
    copies = copies_for(size)
    full = (2, shape.batch, shape.heads, shape.tokens, shape.dim)
    pairs = [torch.randn(full, dtype=torch.float16, device=device) for _ in range(copies)]
    q = shape.query(device)
    only: AbstractContextManager[None] = sdpa_kernel(PEERS[name])
    try:
        with only:
            return measure([partial(scaled_dot_product_attention, q, k, v) for k, v in pairs])
    except RuntimeError:
        return None


def _time_paper(shape: Shape, device: torch.device) -> Timing | None:
    if shape.dim % 32:
        return None
    from turboesm_cli.evaluation.paper_kernel import PaperCache

    size = shape.batch * shape.heads * shape.tokens * shape.dim * 9 // 8
    copies = copies_for(size)
    caches = [PaperCache.random(shape.batch, shape.heads, shape.tokens, shape.dim, device) for _ in range(copies)]
    q = torch.randn(shape.batch, shape.heads, 1, shape.dim, dtype=torch.float16, device=device) / 8
    rotation = torch.eye(shape.dim, device=device).expand(shape.heads, -1, -1).contiguous()
    small = PaperCache.random(1, shape.heads, 100, shape.dim, device)
    expected = small.plain(q[:1], rotation)
    if (small.attend(q[:1], rotation) - expected).norm() > TOLERANCE * expected.norm():
        return None
    return measure([partial(cache.attend, q, rotation) for cache in caches])


def _unpack_then_sdpa(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    k = reference.expand(held.k, layer.k.spec, held.rope).half()
    v = reference.expand(held.v, layer.v.spec).half()
    return scaled_dot_product_attention(q, k, v, scale=1.0)


def _row(
    shape: Shape, what: str, metric: str, value: float | Timing, unit: str, version: str, commit: str
) -> ResultRow:
    timing = value if isinstance(value, Timing) else None
    return ResultRow(
        model=str(shape), recipe=what, bits_k=shape.bits, bits_v=shape.bits, family="", protocol="kernel",
        metric=metric, value=timing.median if timing else float(value), unit=unit,  # type: ignore[arg-type]
        n=timing.n if timing else 1, device=torch.cuda.get_device_name(), dtype="float16", seed=0,
        version=version, commit=commit, tokens=shape.tokens, p20=timing.p20 if timing else None,
        p80=timing.p80 if timing else None, torch=torch.__version__, command=command(),
        date=datetime.now(UTC).date().isoformat(),
    )  # fmt: skip


def map_cells(rows: Sequence[ResultRow]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the map: the fastest fp16 over ours at 3 bits, batch down, tokens across."""
    ratios = {
        (row.model, row.tokens): row for row in rows if row.metric == "ratio_fastest_fp16" and row.bits_k == 3
    }
    lengths = sorted({shape.tokens for shape in MAP})
    lines = []
    for batch in sorted({shape.batch for shape in MAP}):
        found = [ratios.get((str(Shape(batch, tokens)), tokens)) for tokens in lengths]
        lines.append([str(batch), *("" if row is None else f"{row.value:.2f} ({row.recipe})" for row in found)])
    return ["batch", *(f"{tokens:,} tokens" for tokens in lengths)], lines
