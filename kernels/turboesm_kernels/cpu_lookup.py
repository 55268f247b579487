"""The cache on a CPU: attend to packed bytes by table lookup, and pack a token in a few operations.

On a uniform grid a level is linear in the bits of its code, whichever bytes they lie in. So each bit of a packed
vector has a weight of its own for a query, and each byte a table of 256 sums of such weights:

    score_j = n_j sum_b table_b[byte_bj]        table_b[x] = sum_s weight_bs bit_s(x)

The weighted sum of values goes the other way: add up the softmax's weights by the value of each byte, then by
bit. A byte is looked up once and never unpacked: for `B` bytes per vector that is B operations, not head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from turboesm_kernels.bits import Bits
from turboesm_kernels.layout import BYTE
from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.prepared import PreparedSide
from turboesm_kernels.reference import (
    SCALE_STEPS_PER_OCTAVE,
    SCALE_ZERO,
    Packed,
    Rope,
    at_positions,
    scale_to_byte,
)

VALUES = 1 << BYTE
INDICES = 1 << 17
"""Bytes looked up at once: their indices, 8 bytes each, stay in a core's cache."""

FEW_LOOKUPS = 220_000
"""Bytes looked up in a layer up to which one thread does it all: measured with two on a shared machine."""


FEW_VECTORS = 256
"""Queries that one thread multiplies, and keys that it packs, alone."""


def attend(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    """`dispatch.attend` by lookup; both sides have `bits`. q float32 or float64."""
    lookups = max(held.k.codes.numel(), held.v.codes.numel()) * q.shape[2]
    with _one_thread(lookups <= FEW_LOOKUPS):
        return _attend(q, held, layer)


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Where `wanted`, for work so small that waking other threads costs more than they do."""
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _attend(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    weights = _scores(q, held, layer).softmax(-1)
    if held.lengths is not None:
        weights = weights.masked_fill((held.lengths == 0)[:, None, None, None], 0.0)
    packed = weights[..., held.sinks :]
    out = _values(packed, held.v, layer.v)
    out += packed.sum(-1, keepdim=True) * layer.v.centre[:, None].to(q.dtype)
    if held.sink_v is not None:
        out += weights[..., : held.sinks] @ held.sink_v.to(q.dtype)
    return out


def _scores(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    """Scores [B, H, Q, s + T], -inf where there is no token."""
    bits, nbits = layer.k.bits, layer.k.spec.nbytes * BYTE
    assert bits is not None
    with _one_thread(q.shape[:3].numel() <= FEW_VECTORS):
        weights, offset, phases = (q @ bits.map.to(q.dtype)).tensor_split((nbits, nbits + 1), -1)
        table = weights.unflatten(-1, (-1, BYTE)) @ _bit_values(q)
    parts = []
    for part in _parts(held.k.codes):
        index = _for_queries(_key_bytes(held.k.codes[:, :, :, part]), q)
        parts.append(table.gather(-1, index).sum(-2))
    found = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    found += offset
    if held.k.scales is not None:
        found *= _scales(held.k.scales, q)
    if layer.k.centred and held.rope is not None:
        found += phases @ held.rope.half[:, : held.tokens].to(q.dtype)
    if bits.centre_at is not None:
        at = torch.arange(held.sinks, held.sinks + held.tokens).clamp(max=bits.centre_at.shape[1] - 1)
        found += q @ bits.centre_at[:, at].to(q.dtype).mT
    if held.sink_k is not None:
        found = torch.cat((q @ held.sink_k.to(q.dtype).mT, found), -1)
    if held.lengths is not None:
        beyond = torch.arange(found.shape[-1], device=q.device) >= held.lengths[:, None, None, None]
        found = found.masked_fill(beyond, -torch.inf).masked_fill((held.lengths == 0)[:, None, None, None], 0.0)
    return found


def _scales(scales: Tensor, like: Tensor) -> Tensor:
    """[B, H, T] bytes -> factors [B, H, 1, T]."""
    octaves = scales[:, :, None].to(like.dtype) / SCALE_STEPS_PER_OCTAVE
    return torch.exp2(octaves - SCALE_ZERO / SCALE_STEPS_PER_OCTAVE)


def _values(weights: Tensor, packed: Packed, side: PreparedSide) -> Tensor:
    """sum_j weights_j n_j levels_j in head_dim, [B, H, Q, d]; weights [B, H, Q, T]."""
    bits = side.bits
    assert bits is not None
    if packed.scales is not None:
        weights = weights * _scales(packed.scales, weights)
    sums = weights.new_zeros((*weights.shape[:3], packed.codes.shape[2], VALUES))
    for part in _parts(packed.codes):
        index = _for_queries(packed.codes[..., part].long(), weights)
        sums.scatter_add_(-1, index, weights[..., None, part].expand(index.shape))
    with _one_thread(weights.shape[:3].numel() <= FEW_VECTORS):
        by_bit = (sums @ _bit_values(weights).mT).flatten(-2)
        return torch.cat((by_bit, weights.sum(-1, keepdim=True)), -1) @ bits.map.to(weights.dtype)


def _parts(codes: Tensor) -> list[slice]:
    """Ranges of tokens, of which `INDICES` bytes are looked up at once."""
    tokens = codes.shape[3]
    each = max(64, INDICES * tokens // max(1, codes.numel()))
    return [slice(start, min(tokens, start + each)) for start in range(0, max(1, tokens), each)]


def _key_bytes(codes: Tensor) -> Tensor:
    """[B, H, words, T, lanes] -> indices int64 [B, H, nbytes, T]."""
    index = codes.movedim(-1, 3).to(torch.int64, memory_format=torch.contiguous_format)
    return index.flatten(2, 3)


def _for_queries(index: Tensor, like: Tensor) -> Tensor:
    """Indices [B, H, nbytes, T] for each of the Q queries of `like` [B, H, Q, ...]: a view."""
    return index[:, :, None].expand(-1, -1, like.shape[2], -1, -1)


def _bit_values(like: Tensor) -> Tensor:
    """bit_s(x) for each s and each byte x, [8, 256]."""
    return _bit_table(like.device, like.dtype)


@cache
def _bit_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    values = torch.arange(VALUES, device=device)
    return ((values >> torch.arange(BYTE, device=device)[:, None]) & 1).to(dtype)


def compress(x: Tensor, side: PreparedSide, rope: Rope | None = None) -> Packed:
    """`reference.compress` of x float [B, H, n, d] for a uniform grid, in few operations; `side` has `bits`."""
    bits = side.bits
    assert bits is not None
    found, scales = _coded(x.float() - _centre(side, bits, rope), bits, side.spec.scale)
    return Packed(_in_memory_order(found, side), scales)


@dataclass(frozen=True)
class Pair:
    """A layer's two sides with their `Bits` stacked, so that a token's key and value are packed together.

    bits  of both: tensors [2, 1, H, ...], the bits of the shorter code padded with unused ones
    """

    k: PreparedSide
    v: PreparedSide
    bits: Bits

    @classmethod
    def of(cls, k: PreparedSide, v: PreparedSide) -> Pair | None:
        """None where a side is not on a uniform grid, or their scales are of different kinds."""
        if k.bits is None or v.bits is None or k.spec.scale != v.spec.scale:
            return None
        most = max(k.bits.axis.shape[1], v.bits.axis.shape[1])
        by_bit = {
            name: [torch.nn.functional.pad(x, (0, most - x.shape[1])) for x in _both(k.bits, v.bits, name)]
            for name in ("axis", "place", "used")
        }
        names = ("analysis", "per_step", "half", "top", "level", "zero", "deviation", "norm")
        alike = {name: _both(k.bits, v.bits, name) for name in names}
        stacked = {name: torch.stack(tensors)[:, None] for name, tensors in (by_bit | alike).items()}
        return cls(k, v, replace(k.bits, **stacked))

    def compress(self, k: Tensor, v: Tensor, rope: Rope) -> tuple[Packed, Packed]:
        """`compress` of keys and values float [B, H, n, d] at the positions of `rope`."""
        with _one_thread(k.shape[:3].numel() <= FEW_VECTORS):
            return self._compress(k, v, rope)

    def _compress(self, k: Tensor, v: Tensor, rope: Rope) -> tuple[Packed, Packed]:
        assert self.k.bits is not None and self.v.bits is not None
        keys = k.float() - _centre(self.k, self.k.bits, rope)
        values = v.float() - _centre(self.v, self.v.bits, None)
        found, scales = _coded(torch.stack((keys, values)), self.bits, self.k.spec.scale)
        own = (None, None) if scales is None else scales
        parts = (
            Packed(_in_memory_order(codes[..., : side.spec.nbytes], side), scale)
            for codes, side, scale in zip(found, (self.k, self.v), own, strict=True)
        )
        keys_packed, values_packed = parts
        return keys_packed, values_packed


def _both(k: Bits, v: Bits, name: str) -> list[Tensor]:
    return [getattr(k, name), getattr(v, name)]


def _centre(side: PreparedSide, bits: Bits, rope: Rope | None) -> Tensor:
    centre = side.centre[:, None]
    if side.spec.side == "v":
        return centre
    if rope is None:
        raise ValueError("keys need their positions")
    turned = torch.addcmul(centre * rope.cos, bits.turned, rope.sin)
    return turned if bits.centre_at is None else turned + at_positions(bits.centre_at, rope)


def _coded(x: Tensor, bits: Bits, scale: str) -> tuple[Tensor, Tensor | None]:
    """Bytes uint8 [..., H, n, nbytes] and scale bytes [..., H, n] of centred vectors [..., H, n, d]."""
    y = x.float() @ bits.analysis
    norm = None
    if scale != "none":
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True) * bits.norm
        if scale == "least-squares":
            norm = norm.add_(y.abs().amax(-1, keepdim=True), alpha=0.25)
        norm = norm.clamp_min_(1e-12)
    code = torch.addcmul(bits.half, y if norm is None else y / norm, bits.per_step).floor_()
    code = torch.minimum(code, bits.top).clamp_min_(0)
    index = bits.axis[..., None, :].expand(*code.shape[:-1], -1)
    found = code.to(torch.uint8).gather(-1, index).bitwise_right_shift_(bits.place[..., None, :])
    found = found.bitwise_and_(bits.used[..., None, :])
    packed = (found.unflatten(-1, (-1, BYTE)).float() @ _powers(code.device)).to(torch.uint8)
    return packed, _scale_bytes(y, code, norm, bits, scale)


def _scale_bytes(y: Tensor, code: Tensor, norm: Tensor | None, bits: Bits, scale: str) -> Tensor | None:
    if norm is None:
        return None
    if scale == "norm":
        return scale_to_byte(norm[..., 0])
    guess = code * bits.level - bits.zero
    return scale_to_byte((y * bits.deviation * guess).sum(-1) / guess.square().sum(-1).clamp_min(1e-30))


def _in_memory_order(packed: Tensor, side: PreparedSide) -> Tensor:
    """Bytes [B, H, n, nbytes] -> `Packed.codes`."""
    if side.spec.side == "v":
        return packed.transpose(2, 3)
    return packed.unflatten(-1, (-1, side.spec.lanes)).transpose(2, 3)


@cache
def _powers(device: torch.device) -> Tensor:
    return (1 << torch.arange(BYTE, device=device)).float()
