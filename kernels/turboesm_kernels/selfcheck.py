"""Whether the Triton kernels do on this device what the plain reference does.

Compilers err: Triton 3.6 on an H200 once dropped half of a sum in `pack`, for some shapes alone. So a layer of
each shape that a codec has is packed and asked with random numbers before a cache on a GPU is used. That compiles
the kernels, too, many at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from turboesm_kernels import ops, reference
from turboesm_kernels.ops import Held, PreparedLayer
from turboesm_kernels.prepared import PreparedSide
from turboesm_kernels.reference import TURN, Packed, Rope

SEQUENCES, TOKENS = 3, 3 * TURN
TIES = 5e-3
"""Share of codes and scales that may differ: a number on the edge of two codes goes either way."""

TOLERANCE = 1e-2
"""Relative error of attention, the query's and the result's rounding to 16 bits included."""

MOST_THREADS = 16


def problem(layers: Sequence[PreparedLayer], dtype: torch.dtype = torch.float32, sinks: int = 1) -> str | None:
    """What is wrong, or None, with keys, values and queries of `dtype` and so many tokens kept whole.

    Of a layer of each shape for which other kernels are compiled, where Triton serves it.
    """
    served = (layer for layer in layers if not (layer.k.spec.residual_axes or layer.v.spec.residual_axes))
    kinds = list({(_kind(layer.k), _kind(layer.v)): layer for layer in served}.values())
    check = partial(_problem, dtype=dtype, sinks=sinks)
    try:
        return next(filter(None, map(check, kinds[:1])), None) or _first_of_many(check, kinds[1:])
    except Exception as error:  # Triton and its compilers raise anything
        return f"a kernel does not compile or start ({type(error).__name__}: {error})"


def _first_of_many(check: Callable[[PreparedLayer], str | None], kinds: Sequence[PreparedLayer]) -> str | None:
    """The first problem. On a GPU in threads; what one of them raises counts if it does so alone, too.

    A kernel that another thread is still loading cannot be launched (Triton 3.6 to 3.9).
    """
    if kinds and kinds[0].k.map.is_cuda:
        try:
            with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
                return next(filter(None, pool.map(check, kinds)), None)
        except Exception:
            pass
    return next(filter(None, map(check, kinds)), None)


def _kind(side: PreparedSide) -> Hashable:
    """What decides which kernels are compiled for a side."""
    spec = side.spec
    fields = None if side.fields is None else side.fields.shape
    widest = max(profile.widths[0] for profile in spec.profiles)
    return (
        side.picks.shape, fields, side.pieces.shape, side.table.shape, widest, side.grid is None, side.centred,
        spec.scale,
    )  # fmt: skip


@torch.no_grad()
def _problem(layer: PreparedLayer, dtype: torch.dtype, sinks: int) -> str | None:
    if layer.k.map.is_cuda:
        torch.cuda.set_device(layer.k.map.device)  # of this thread
    held, differing = _pack(layer, dtype, sinks)
    if differing > TIES:
        return f"the kernel that packs gives other codes than the plain reference for {differing:.1%} of values"
    shape = (SEQUENCES, layer.k.spec.heads, 1, layer.k.head_dim)
    q = _as_projected(shape, layer, dtype) / math.sqrt(layer.k.head_dim)
    expected = ops.plain_attend(q.double(), held, layer)
    for found in _attend(q, held, layer):
        error = ((found.double() - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE:
            return f"the attention kernel is off by {error:.2g} of the plain reference's result"
    return None


def _attend(q: torch.Tensor, held: Held, layer: PreparedLayer) -> list[torch.Tensor]:
    """Attention as each kernel does it that may serve the layer: the fast path has one for ranges of one block."""
    results = [ops.attend(q, held, layer)]
    if ops.choose(q, held, layer) == "ptx":
        from turboesm_kernels import fast

        results += [fast.attend(q, held, layer, chunk) for chunk in (TURN, TOKENS)]
    return results


def _pack(layer: PreparedLayer, dtype: torch.dtype, sinks: int) -> tuple[Held, float]:
    """A cache that the kernel filled, and the share of its codes or scales that differ.

    In two calls, since Triton compiles each otherwise: many tokens, one of each sequence.
    """
    from turboesm_kernels.pack import pack

    dim, device = layer.k.head_dim, layer.k.centre.device
    shape = (SEQUENCES, layer.k.spec.heads, TOKENS, dim)
    k, v = (_as_projected(shape, layer, dtype) for _ in range(2))
    rope = Rope.at(torch.arange(TOKENS, device=device) + sinks, _frequencies(dim, device))
    if k.is_cuda:  # kernels read these before they wait for earlier work
        _ = rope.turns, rope.block_turn
        torch.cuda.synchronize(device)
    wanted = reference.compress(k, layer.k.spec, rope), reference.compress(v, layer.v.spec)
    whole = _random((2, *shape[:2], sinks, dim), layer).half()
    blank = [
        Packed(own.codes.new_full(own.codes.shape, 0xA5), None if own.scales is None else own.scales * 0)
        for own in wanted
    ]
    lengths = torch.full((SEQUENCES,), sinks + TOKENS, dtype=torch.int32, device=device)
    held = Held(blank[0], blank[1], rope, lengths, *(whole if sinks else (None, None)))
    pack(k[:, :, :-1], v[:, :, :-1], layer, held, sinks)
    pack(k[:, :, -1:], v[:, :, -1:], layer, held, lengths - 1)
    sides = ((layer.k, held.k, wanted[0]), (layer.v, held.v, wanted[1]))
    return held, max(_differing(side, found, own) for side, found, own in sides)


def _differing(side: PreparedSide, found: Packed, wanted: Packed) -> float:
    codes = reference.unpack(found.codes, side.spec) != reference.unpack(wanted.codes, side.spec)
    share = codes.float().mean().item()
    if found.scales is None or wanted.scales is None:
        return share
    apart = (found.scales.int() - wanted.scales.int()).abs() > 1
    return max(share, apart.float().mean().item())


def _as_projected(shape: tuple[int, int, int, int], layer: PreparedLayer, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers [B, H, T, d] as a projection leaves them, tokens before heads: Triton compiles by strides."""
    batch, heads, tokens, dim = shape
    return _random((batch, tokens, heads, dim), layer).to(dtype).transpose(1, 2)


def _random(shape: tuple[int, ...], layer: PreparedLayer) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return numbers.to(layer.k.centre.device)


def _frequencies(dim: int, device: torch.device) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
