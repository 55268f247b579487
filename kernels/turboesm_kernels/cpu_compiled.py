"""The cache on a CPU in compiled loops (`cpu_loops`): faster than `cpu_lookup`, and in need of numba.

A call is a job, a list of numbers and addresses that all threads read, and each thread takes some of the heads.
When a cache on a CPU is first used, numba is imported, and the loops are compiled or fetched from its folder on
disk.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.prepared import PreparedSide
from turboesm_kernels.reference import Packed, Rope, Scale
from turboesm_kernels.token_tables import TokenTables

Numbers = ctypes.Array[ctypes.c_int64]
Loop = Callable[[Numbers, int, int, int], None]

LOOPS = ("attend", "attend_tokens", "pack")
"""Functions of `cpu_loops` that are called from here."""

FEW_NUMBERS = 1_500_000
"""Values of keys, for all queries, up to which one thread does it all: waking another saves nothing."""

FEW_PACKED = 20_000
"""The same of values that are packed."""

SCALES: tuple[Scale, ...] = ("none", "norm", "least-squares")
"""As `cpu_loops` numbers them."""


def unsupported_reason(q: Tensor, held: Held, layer: PreparedLayer) -> str | None:
    """Why `attend` cannot run here or on these inputs, or None."""
    if q.dtype == torch.float64:
        return "it computes in float32"
    return no_loops(layer)


def no_loops(layer: PreparedLayer) -> str | None:
    """Why a layer's tokens are neither read nor packed in compiled loops, or None."""
    if layer.k.map.device.type != "cpu":
        return "it serves CPUs"
    if layer.k.loops is None or layer.v.loops is None:
        return "it needs codes on a uniform grid"
    return problem()


@cache
def problem() -> str | None:
    """Why there are no compiled loops on this machine, or None."""
    if find_spec("numba") is None:
        return "numba is not installed (pip install numba)"
    try:
        for name in LOOPS:
            loop_of(name)
    except Exception as error:  # whatever is wrong with numba or LLVM here, there is another backend
        return f"numba does not compile it: {error!r}"[:300]
    return None


def attend(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    """`dispatch.attend` by compiled loops, float32 [B, H, Q, d]."""
    batch, heads, queries, dim = q.shape
    q = q.float().contiguous()
    out = torch.empty_like(q)
    sinks = [None if x is None else x.float().contiguous() for x in (held.sink_k, held.sink_v)]
    lengths = None if held.lengths is None else held.lengths.int().contiguous()
    turns = held.rope.half_rows if layer.k.centred and held.rope is not None else None
    assert layer.k.loops is not None and layer.v.loops is not None
    at = _long_enough(layer.k.loops.at, held.sinks + held.tokens)
    k, v = _dense(held.k, layer.k.spec.lanes), _dense(held.v, 1)
    numbers = (
        heads, queries, dim, layer.k.spec.lanes, held.sinks, held.tokens, q.data_ptr(), out.data_ptr(),
        *map(_address, (lengths, *sinks)), *_rows(turns), *_rows(at), *_places(k), *_places(v),
        *layer.k.loops.reading, *layer.v.loops.reading,
    )  # fmt: skip
    axes = max(layer.k.axes, layer.v.axes)
    threads = _threads(q.numel() * held.tokens, FEW_NUMBERS, batch * heads)
    room = 2 * (dim + axes) + held.sinks + held.tokens
    _run("attend", numbers, batch * heads, room, threads, (q, out, sinks, lengths, turns, at, k, v, layer))
    return out


def attends_tokens(q: Tensor, tables: TokenTables) -> bool:
    """Whether `attend_tokens` can run here, on these."""
    in_float32 = q.dtype != torch.float64 and tables.k.dtype == torch.float32
    return q.device.type == "cpu" and in_float32 and tables.across is None and problem() is None


def attend_tokens(
    q: Tensor, ids: Tensor, tables: TokenTables, unmasked: Tensor, rope: Rope, lengths: Tensor | None
) -> Tensor:
    """`token_layer.attend_tokens` by compiled loops, float32 [B, H, Q, d]. A sequence of length 0 gets 0."""
    batch, heads, queries, dim = q.shape
    q = q.float().contiguous()
    out, kinds = torch.empty_like(q), len(tables.sigma)
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    factors = tables.factors(unmasked.view(-1)).contiguous()
    lengths = None if lengths is None else lengths.int().contiguous()
    parts = [x.contiguous() for x in (rope.cos, rope.sin, tables.k, tables.k_const, tables.v, tables.v_const)]
    numbers = (
        heads, queries, dim, ids.shape[1], kinds, q.data_ptr(), out.data_ptr(), _address(lengths),
        ids.data_ptr(), ids.stride(0) * ids.element_size(), ids.element_size(), *map(_address, parts),
        factors.data_ptr(),
    )  # fmt: skip
    threads = _threads(q.numel() * ids.shape[1], FEW_NUMBERS, batch * heads)
    room = kinds * (dim + 1) + ids.shape[1]
    _run("attend_tokens", numbers, batch * heads, room, threads, (q, out, ids, factors, lengths, parts))
    return out


def packs(layer: PreparedLayer, held: Held) -> bool:
    """Whether `append` can pack a layer's tokens where they belong."""
    if no_loops(layer):
        return False
    return _dense(held.k, layer.k.spec.lanes) is held.k and _dense(held.v, 1) is held.v


def append(k: Tensor, v: Tensor, layer: PreparedLayer, held: Held, start: int | Tensor) -> None:
    """`dispatch.append` by compiled loops. Raises ValueError where tokens do not fit: nothing else would."""
    _check(k, v, layer, held, start)
    starts = None if isinstance(start, int) else start.int().contiguous()
    first = start - held.sinks if isinstance(start, int) else -held.sinks
    for x, side, into in ((k, layer.k, held.k), (v, layer.v, held.v)):
        _pack(x.float().contiguous(), side, into, held, first, starts)


def _check(k: Tensor, v: Tensor, layer: PreparedLayer, held: Held, start: int | Tensor) -> None:
    spec, tokens = layer.k.spec, held.tokens
    batch, count = len(held.v.codes), k.shape[2]
    shape = (batch, spec.heads, count, spec.head_dim)
    if k.shape != shape or v.shape != shape:
        raise ValueError(f"keys and values must be {shape}, not {tuple(k.shape)} and {tuple(v.shape)}")
    for packed, side in ((held.k, layer.k), (held.v, layer.v)):
        if packed.codes.shape != side.spec.codes_shape(batch, tokens) or packed.codes.dtype != torch.uint8:
            raise ValueError(f"there is no room for {side.spec.side} in {tuple(packed.codes.shape)}")
        if (packed.scales is None) != (side.spec.scale == "none"):
            raise ValueError(f"{side.spec.side} scales are missing, or not in this codec")
    last = start if isinstance(start, int) else int(start.max())
    if max(last - held.sinks, 0) + count > tokens or (isinstance(start, Tensor) and start.shape != (batch,)):
        raise ValueError(f"{count} tokens from {last} on do not fit in {held.sinks} and {tokens}")
    if held.rope is None or len(held.rope.cos) < tokens:
        raise ValueError("keys need their positions")


def _pack(x: Tensor, side: PreparedSide, into: Packed, held: Held, first: int, starts: Tensor | None) -> None:
    batch, heads, count, dim = x.shape
    loops, spec, is_key = side.loops, side.spec, side.spec.side == "k"
    assert loops is not None
    angles = (held.rope.cos.contiguous(), held.rope.sin.contiguous()) if is_key and held.rope else (None, None)
    at = _long_enough(loops.at, held.sinks + held.tokens)
    lanes = spec.lanes if is_key else 1
    numbers = (
        heads, count, dim, side.axes, lanes, spec.nbytes // lanes, SCALES.index(spec.scale), x.data_ptr(), first,
        *map(_address, (starts, *angles)), *_rows(at), held.sinks, *_places(into), *loops.writing,
    )  # fmt: skip
    threads = _threads(x.numel(), FEW_PACKED, batch * heads)
    _run("pack", numbers, batch * heads, dim + 2 * side.axes, threads, (x, side, into, starts, angles, at))


def _threads(work: int, few: int, most: int) -> int:
    return 1 if work <= few else min(torch.get_num_threads(), most)


def _run(name: str, numbers: tuple[int, ...], count: int, room: int, threads: int, alive: object) -> None:
    """Do all heads of a job; `alive` is what the addresses point to."""
    loop = loop_of(name)
    job, scratch = (ctypes.c_int64 * len(numbers))(*numbers), torch.empty(threads, room)
    if threads == 1:
        loop(job, 0, count, scratch.data_ptr())
        return
    ends = [count * thread // threads for thread in range(threads + 1)]
    shares = list(zip(ends, ends[1:], scratch, strict=False))
    # What others write to must outlive them, also where this thread is interrupted while it waits.
    others = [_pool().submit(_share, loop, job, *share, alive) for share in shares[1:]]
    _share(loop, job, *shares[0], alive)
    for other in others:
        other.result()


def _share(loop: Loop, job: Numbers, first: int, last: int, scratch: Tensor, alive: object) -> None:
    loop(job, first, last, scratch.data_ptr())


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(table: Tensor | None) -> tuple[int, int]:
    """Where a float32 table [..., n] is, and the bytes of a row."""
    return (0, 0) if table is None else (table.data_ptr(), table.element_size() * table.shape[-1])


def _places(packed: Packed) -> tuple[int, ...]:
    codes, scales = packed.codes, packed.scales
    own = (0, 0, 0) if scales is None else (scales.data_ptr(), *scales.stride()[:2])
    return codes.data_ptr(), *codes.stride()[:3], *own


def _dense(packed: Packed, lanes: int) -> Packed:
    """The same, with tokens side by side."""
    codes, scales = packed.codes, packed.scales
    beside = codes.stride(3) == lanes and codes.stride(-1) == 1 and codes.data_ptr() % lanes == 0
    if beside and (scales is None or scales.stride(2) == 1):
        return packed
    return Packed(codes.contiguous(), None if scales is None else scales.contiguous())


def _long_enough(at: Tensor | None, tokens: int) -> Tensor | None:
    """Centres [H, d, P] of at least as many positions as there are tokens: the last one's from there on."""
    if at is None or at.shape[-1] >= tokens:
        return at
    return torch.cat((at, at[..., -1:].expand(-1, -1, tokens - at.shape[-1])), -1)


@cache
def loop_of(name: str) -> Loop:
    """A function of `cpu_loops`, compiled. Raises what numba does where it cannot."""
    from numba import cfunc

    from turboesm_kernels import cpu_loops

    how = {"error_model": "numpy", "fastmath": cpu_loops.LOOSE}
    function = getattr(cpu_loops, name)
    try:
        found = cfunc(cpu_loops.LOOP, cache=True, **how)(function)
    except Exception:  # no folder to keep it in, or one that is full, or a damaged file there
        found = cfunc(cpu_loops.LOOP, **how)(function)
    number = ctypes.c_int64
    call = ctypes.CFUNCTYPE(None, ctypes.POINTER(number), number, number, number)(found.address)
    _machine_code.append(found)
    return call


_machine_code: list[object] = []
"""What must not be freed, since addresses of it are called."""


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads beside the one that asks; ctypes lets go of Python while they compute."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "turboesm-cpu")


os.register_at_fork(after_in_child=_pool.cache_clear)
