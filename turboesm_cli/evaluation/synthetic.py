"""A made-up codec and caches of random codes: what the kernels are timed on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from turboesm_kernels import dispatch
from turboesm_kernels.layout import BYTE, ROOM, wide_lanes
from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.reference import Packed, Rope, Side, SideSpec, rope_frequencies, table_size, table_slice

from turboesm_cli.codec.bit_allocation import waterfill
from turboesm_cli.statistics.sensitivity import SIDES

ROTATED_BYTES = 400e6
"""Caches are made until they hold this much, several times an H200's L2."""

MOST_COPIES = 12
FALL = 4.0
"""Octaves by which the deviation of a head's axes falls from first to last, give or take one per head."""


@dataclass(frozen=True)
class Shape:
    """One layer's decode step: B sequences of T tokens, H key/value heads of head_dim d, payload bits per value,
    Q queries of each head."""

    batch: int
    tokens: int
    heads: int = 20
    dim: int = 64
    bits: float = 3
    queries: int = 1

    def __str__(self) -> str:
        return f"B{self.batch}xH{self.heads}xd{self.dim}" + f"xQ{self.queries}" * (self.queries > 1)

    def query(self, device: torch.device) -> Tensor:
        """A random one of every sequence and head, float16 [B, H, Q, d]."""
        return torch.randn(self.batch, self.heads, self.queries, self.dim, device=device).half()

    @property
    def fp16_bytes(self) -> int:
        """Of fp16 keys and values."""
        return self.batch * self.tokens * self.heads * self.dim * 4


def copies_for(nbytes: float) -> int:
    """How many caches of `nbytes` to rotate through."""
    return max(2, min(MOST_COPIES, math.ceil(ROTATED_BYTES / nbytes)))


def make_layer(shape: Shape, device: torch.device) -> PreparedLayer:
    """A codec with two water-filled profiles on a uniform grid."""
    return PreparedLayer.of(*(_spec(side, shape).to(device) for side in SIDES))


def make_caches(shape: Shape, device: torch.device) -> tuple[PreparedLayer, list[Held]]:
    """A codec, and random caches of it to rotate through."""
    layer = make_layer(shape, device)
    nbytes = shape.batch * shape.heads * shape.tokens * (layer.k.spec.nbytes + layer.v.spec.nbytes + 2)
    rope = rope_of(shape.tokens, shape.dim, device)
    return layer, [random_cache(layer, shape, rope) for _ in range(copies_for(nbytes))]


def random_cache(layer: PreparedLayer, shape: Shape, rope: Rope) -> Held:
    """Random codes, scales and a sink for each sequence."""
    sinks = torch.randn(2, shape.batch, shape.heads, 1, shape.dim, device=layer.k.map.device).half()
    k = _random_packed(layer.k.spec, shape, False)
    v = _random_packed(layer.v.spec, shape, dispatch.keeps_tiles(layer) and shape.tokens % ROOM == 0)
    return Held(k, v, rope, None, sinks[0], sinks[1])


def _random_packed(spec: SideSpec, shape: Shape, tiled: bool) -> Packed:
    device, batch, tokens = spec.centre.device, shape.batch, shape.tokens
    codes = torch.randint(0, 256, spec.codes_shape(batch, tokens, tiled), dtype=torch.uint8, device=device)
    scales = torch.randint(100, 150, (batch, spec.heads, tokens), dtype=torch.uint8, device=device)
    return Packed(codes, scales)


def rope_of(tokens: int, dim: int, device: torch.device) -> Rope:
    """ESM-2's angles from position 1 on."""
    return Rope.at(torch.arange(tokens, device=device) + 1, rope_frequencies(dim, device))


def _spec(side: Side, shape: Shape) -> SideSpec:
    heads, dim = shape.heads, shape.dim
    generator = torch.Generator().manual_seed(0 if side == "k" else 1)
    falls = (FALL - 1, FALL + 1)
    deviations = [torch.exp2(-fall * torch.arange(dim) / dim) for fall in falls]
    lanes = wide_lanes(dim)
    nbytes = math.ceil(dim * shape.bits / (BYTE * lanes)) * lanes
    profiles = [waterfill(d.square().tolist(), nbytes, lanes) for d in deviations]
    of_head = tuple(head % 2 for head in range(heads))
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0].contiguous()
    widest = max(profile.widths[0] for profile in profiles)
    levels = torch.zeros(heads, table_size(widest))
    thresholds = torch.full((heads, table_size(widest)), torch.inf)
    for width in range(1, widest + 1):
        table = 5.0 / 2**width * (torch.arange(2**width) - (2**width - 1) / 2)
        levels[:, table_slice(width)] = table
        thresholds[:, table_slice(width)][:, :-1] = (table[1:] + table[:-1]) / 2
    return SideSpec(
        side, tuple(profiles), of_head, torch.randn(heads, dim, generator=generator), basis,
        torch.stack([deviations[index] for index in of_head]), basis.mT.contiguous(), levels, thresholds,
        "least-squares",
    )  # fmt: skip


def held_bytes(held: Held) -> int:
    """Bytes of codes, scales and sinks."""
    tensors = (held.k.codes, held.k.scales, held.v.codes, held.v.scales, held.sink_k, held.sink_v)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
