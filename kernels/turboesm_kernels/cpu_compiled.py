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
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from turboesm_kernels.operands import IN_TILES, Held, PreparedLayer
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
    return IN_TILES if held.v.tiled else no_loops(layer)


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


class Reading:
    """Attention over what a layer's cache holds. Made once where the cache's buffers stay where they are.

    `at` as `_centres` gives it.
    """

    def __init__(self, layer: PreparedLayer, held: Held, at: Tensor | None) -> None:
        spec, loops, values = layer.k.spec, layer.k.loops, layer.v.loops
        assert loops is not None and values is not None
        k, v = _dense(held.k, spec.lanes), _dense(held.v, 1)
        turns = held.rope.half_rows if layer.k.centred and held.rope is not None else None
        self._held, self._alive = held, (layer, k, v, turns, at)
        self._shape = (len(k.codes), spec.heads, layer.k.head_dim)
        self._job = _job(
            *(0,) * 6, spec.heads, layer.k.head_dim, spec.lanes, held.sinks, held.tokens,
            *_rows(turns), *_rows(at), *_places(k), *_places(v), *loops.reading, *values.reading,
        )  # fmt: skip
        self._room = 2 * (layer.k.head_dim + max(layer.k.axes, layer.v.axes)) + held.sinks + held.tokens

    def attend(self, q: Tensor, lengths: Tensor | None, longest: int) -> Tensor:
        """`dispatch.attend`, float32 [B, H, Q, d]; lengths int [B], of which `longest` is the greatest.

        Raises ValueError where queries are not of this shape, or not on a CPU.
        """
        batch, heads, queries, dim = q.shape
        if (batch, heads, dim) != self._shape or not q.is_cpu or not q.is_floating_point():
            raise ValueError(f"{q.dtype} queries {list(q.shape)} on {q.device} for {list(self._shape)} here")
        if lengths is not None:
            lengths = lengths.int().contiguous()
            if lengths.shape != (batch,):
                raise ValueError(f"{list(lengths.shape)} lengths of {batch} sequences")
        q = _plain(q)
        out = torch.empty_like(q)
        held = self._held
        sinks = None if held.sink_k is None or held.sink_v is None else (_plain(held.sink_k), _plain(held.sink_v))
        numbers = queries, q.data_ptr(), out.data_ptr(), _address(lengths), *map(_address, sinks or (None, None))
        threads = _threads(q.numel() * longest, FEW_NUMBERS, batch * heads)
        _run("attend", self._job, numbers, batch * heads, self._room, threads, (self, q, out, lengths, sinks))
        return out


def attend(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    """`dispatch.attend` by compiled loops, float32 [B, H, Q, d]."""
    return Reading(layer, held, _centres(layer, held)).attend(q, held.lengths, held.sinks + held.tokens)


def attends_tokens(q: Tensor, tables: TokenTables) -> bool:
    """Whether `attend_tokens` can run here, on these."""
    in_float32 = q.dtype != torch.float64 and tables.k.dtype == torch.float32
    return q.device.type == "cpu" and in_float32 and tables.across is None and problem() is None


def attend_tokens(
    q: Tensor, ids: Tensor, tables: TokenTables, unmasked: Tensor, rope: Rope, lengths: Tensor | None
) -> Tensor:
    """`token_layer.attend_tokens` by compiled loops, float32 [B, H, Q, d]. A sequence of length 0 gets 0."""
    batch, heads, queries, dim = q.shape
    q = _plain(q)
    out, kinds = torch.empty_like(q), len(tables.sigma)
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    factors = tables.factors(unmasked.view(-1)).contiguous()
    lengths = None if lengths is None else lengths.int().contiguous()
    parts = [x.contiguous() for x in (rope.cos, rope.sin, tables.k, tables.k_const, tables.v, tables.v_const)]
    numbers = (
        queries, q.data_ptr(), out.data_ptr(), _address(lengths), factors.data_ptr(),
        ids.data_ptr(), ids.stride(0) * ids.element_size(), ids.element_size(), ids.shape[1],
    )  # fmt: skip
    job = _job(*numbers, heads, dim, kinds, *map(_address, parts))
    threads = _threads(q.numel() * ids.shape[1], FEW_NUMBERS, batch * heads)
    room = kinds * (dim + 1) + ids.shape[1]
    _run("attend_tokens", job, numbers, batch * heads, room, threads, (q, out, ids, factors, lengths, parts))
    return out


def packs(layer: PreparedLayer, held: Held) -> bool:
    """Whether `append` can pack a layer's tokens where they belong."""
    if no_loops(layer):
        return False
    return _dense(held.k, layer.k.spec.lanes) is held.k and _dense(held.v, 1) is held.v


class Writing:
    """Packing into a layer's cache (`packs`). Made once where the cache's buffers stay where they are.

    Raises ValueError where the cache is not one of the layer's codec.
    """

    def __init__(self, layer: PreparedLayer, held: Held, at: Tensor | None) -> None:
        _check(layer, held)
        self._shape = (len(held.v.codes), layer.k.spec.heads, layer.k.head_dim)
        self._sinks, self._tokens = held.sinks, held.tokens
        self._sides = [_Side(layer.k, held.k, held, at), _Side(layer.v, held.v, held, None)]

    def append(self, k: Tensor, v: Tensor, start: int | Tensor) -> None:
        """`dispatch.append`. Raises ValueError where tokens do not fit: nothing else would."""
        batch, heads, count, dim = k.shape
        if k.shape != v.shape or (batch, heads, dim) != self._shape or not (k.is_cpu and v.is_cpu):
            raise ValueError(f"keys {list(k.shape)} and values {list(v.shape)} for {list(self._shape)} here")
        starts = None if isinstance(start, int) else start.int().contiguous()
        last = start if isinstance(start, int) else int(start.max())
        wrong = starts is not None and starts.shape != (batch,)
        if max(last - self._sinks, 0) + count > self._tokens or wrong:
            raise ValueError(f"{count} tokens from {last} on do not fit in {self._sinks} and {self._tokens}")
        first = (0 if isinstance(start, Tensor) else start) - self._sinks
        for x, side in zip((k, v), self._sides, strict=True):
            side.pack(x, first, starts)


class _Side:
    def __init__(self, side: PreparedSide, into: Packed, held: Held, at: Tensor | None) -> None:
        loops, spec, is_key = side.loops, side.spec, side.spec.side == "k"
        assert loops is not None
        angles = (held.rope.cos.contiguous(), held.rope.sin.contiguous()) if is_key and held.rope else (None, None)
        lanes = spec.lanes if is_key else 1
        self._alive = (side, into, angles, at)
        self._job = _job(
            *(0,) * 4, spec.heads, side.head_dim, side.axes, lanes, spec.nbytes // lanes, SCALES.index(spec.scale),
            *map(_address, angles), *_rows(at), held.sinks, *_places(into), *loops.writing,
        )  # fmt: skip
        self._room = side.head_dim + 2 * side.axes

    def pack(self, x: Tensor, first: int, starts: Tensor | None) -> None:
        batch, heads, count, _ = x.shape
        x = _plain(x)
        threads = _threads(x.numel(), FEW_PACKED, batch * heads)
        numbers = count, x.data_ptr(), first, _address(starts)
        _run("pack", self._job, numbers, batch * heads, self._room, threads, (self, x, starts))


def append(k: Tensor, v: Tensor, layer: PreparedLayer, held: Held, start: int | Tensor) -> None:
    """`dispatch.append` by compiled loops. Raises ValueError where tokens do not fit."""
    Writing(layer, held, _centres(layer, held)).append(k, v, start)


@dataclass(frozen=True)
class Step:
    """What steps do with one layer's cache, whose buffers stay where they are."""

    reading: Reading
    writing: Writing
    buffers: list[Tensor]
    addresses: list[int]

    @classmethod
    def of(cls, layer: PreparedLayer, held: Held) -> Step | None:
        """Of all that a cache has room for, or None where there are no loops for it."""
        if not packs(layer, held):
            return None
        at, every = _centres(layer, held), (held.k.codes, held.k.scales, held.v.codes, held.v.scales)
        buffers = [x for x in every if x is not None]
        return cls(Reading(layer, held, at), Writing(layer, held, at), buffers, [x.data_ptr() for x in buffers])

    @property
    def is_stale(self) -> bool:
        """Whether a buffer was moved after all, as `share_memory_` does."""
        return [x.data_ptr() for x in self.buffers] != self.addresses


def _check(layer: PreparedLayer, held: Held) -> None:
    """Raise ValueError where a cache has no room for what its codec makes."""
    batch, tokens = len(held.v.codes), held.tokens
    for packed, side in ((held.k, layer.k), (held.v, layer.v)):
        if packed.codes.shape != side.spec.codes_shape(batch, tokens) or packed.codes.dtype != torch.uint8:
            raise ValueError(f"there is no room for {side.spec.side} in {tuple(packed.codes.shape)}")
        if (packed.scales is None) != (side.spec.scale == "none"):
            raise ValueError(f"{side.spec.side} scales are missing, or not in this codec")
    if held.rope is None or len(held.rope.cos) < tokens:
        raise ValueError("keys need their positions")


def _threads(work: int, few: int, most: int) -> int:
    return 1 if work <= few else min(torch.get_num_threads(), most)


def _job(*numbers: int) -> Numbers:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _run(
    name: str, prepared: Numbers, numbers: tuple[int, ...], count: int, room: int, threads: int, alive: object
) -> None:
    """Do all heads of a job whose first numbers are these; `alive` is what the addresses point to."""
    loop, job = loop_of(name), type(prepared).from_buffer_copy(prepared)
    job[: len(numbers)] = list(numbers)
    scratch = torch.empty(threads, room, dtype=torch.float32, device="cpu")
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


def _plain(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


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


def _centres(layer: PreparedLayer, held: Held) -> Tensor | None:
    """Of the keys' positions, for all that a cache has room for."""
    assert layer.k.loops is not None
    return _long_enough(layer.k.loops.at, held.sinks + held.tokens)


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
