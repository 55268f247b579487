"""Whether the Triton kernels do on this device what the plain reference does.

Compilers err: Triton 3.6 on an H200 once dropped half of a sum in `pack`, for some shapes alone. So some of a
codec's layers are packed and asked with random numbers before a cache on a GPU is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from turboesm_kernels import ops, reference
from turboesm_kernels.ops import Held, PreparedLayer
from turboesm_kernels.prepared import PreparedSide
from turboesm_kernels.reference import Packed, Rope

SEQUENCES, TOKENS, SINKS = 3, 64, 2
TIES = 5e-3
"""Share of codes and scales that may differ: a number on the edge of two codes goes either way."""

TOLERANCE = 1e-2
"""Relative error of attention, the query's and the result's rounding to 16 bits included."""


def problem(layers: Sequence[PreparedLayer]) -> str | None:
    """What is wrong, or None; of a layer for each number of pieces that codes are in, where Triton serves it."""
    kinds = {
        (layer.k.piece_bits.shape[3], layer.v.piece_bits.shape[3]): layer
        for layer in layers
        if not (layer.k.spec.residual_axes or layer.v.spec.residual_axes)
    }
    try:
        return next(filter(None, map(_problem, kinds.values())), None)
    except Exception as error:  # Triton and its compilers raise anything
        return f"a kernel does not compile or start ({type(error).__name__}: {error})"


def _problem(layer: PreparedLayer) -> str | None:
    held, differing = _pack(layer)
    if differing > TIES:
        return f"the kernel that packs gives other codes than the plain reference for {differing:.1%} of values"
    q = _random((SEQUENCES, layer.k.spec.heads, 1, layer.k.head_dim), layer) / math.sqrt(layer.k.head_dim)
    expected = ops.plain_attend(q.double(), held, layer)
    error = ((ops.attend(q, held, layer).double() - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        return f"the attention kernel is off by {error:.2g} of the plain reference's result"
    return None


def _pack(layer: PreparedLayer) -> tuple[Held, float]:
    """A cache that the kernel filled, and the share of its codes or scales that differ.

    In three calls, since Triton compiles each otherwise: a multiple of 16 tokens, some more, one each sequence.
    """
    from turboesm_kernels.pack import pack

    dim, device = layer.k.head_dim, layer.k.centre.device
    shape = (SEQUENCES, layer.k.spec.heads, TOKENS, dim)
    k, v = _random(shape, layer), _random(shape, layer)
    rope = Rope.at(torch.arange(TOKENS, device=device) + SINKS, _frequencies(dim, device))
    wanted = reference.compress(k, layer.k.spec, rope), reference.compress(v, layer.v.spec)
    sinks = _random((2, *shape[:2], SINKS, dim), layer)
    blank = [
        Packed(own.codes.new_full(own.codes.shape, 0xA5), None if own.scales is None else own.scales * 0)
        for own in wanted
    ]
    held = Held(blank[0], blank[1], rope, None, sinks[0], sinks[1])
    for begin, end in ((0, 48), (48, TOKENS - 1)):
        pack(k[:, :, begin:end], v[:, :, begin:end], layer, held, SINKS + begin)
    last = torch.full((SEQUENCES,), SINKS + TOKENS - 1, dtype=torch.int32, device=device)
    pack(k[:, :, -1:], v[:, :, -1:], layer, held, last)
    sides = ((layer.k, held.k, wanted[0]), (layer.v, held.v, wanted[1]))
    return held, max(_differing(side, found, own) for side, found, own in sides)


def _differing(side: PreparedSide, found: Packed, wanted: Packed) -> float:
    codes = reference.unpack(found.codes, side.spec) != reference.unpack(wanted.codes, side.spec)
    share = codes.float().mean().item()
    if found.scales is None or wanted.scales is None:
        return share
    apart = (found.scales.int() - wanted.scales.int()).abs() > 1
    return max(share, apart.float().mean().item())


def _random(shape: tuple[int, ...], layer: PreparedLayer) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return numbers.to(layer.k.centre.device)


def _frequencies(dim: int, device: torch.device) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
