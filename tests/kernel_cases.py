"""Random codecs and caches for the kernels' tests: every kind of profile that the codec can produce."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from turboesm_kernels import reference
from turboesm_kernels.layout import ROOM, TILE, Profile, bytes_for, lanes_for, uniform, wide_lanes
from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.reference import Packed, Rope, Scale, Side, SideSpec, table_size, table_slice


@dataclass(frozen=True)
class Case:
    """One kernel input: shapes, and how the codec is made."""

    dim: int = 64
    tokens: int = 33
    batch: int = 2
    heads: int = 2
    queries: int = 1
    kind: str = "uniform"  # uniform: water-filled widths on a uniform grid; table: Lloyd-like; flat: one width
    bits: float = 3
    scale: Scale = "least-squares"
    centred: bool = True
    sinks: int = 1
    ragged: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    positions: int = 0  # learned ones, each with a centre of its own
    wide: bool = False  # in words where a recipe that shares out a budget may have them

    def __str__(self) -> str:
        parts = [f"d{self.dim}", f"T{self.tokens}", f"Q{self.queries}", f"{self.kind}{self.bits:g}"]
        parts += ["ragged"] * self.ragged + [f"s{self.sinks}"] + [str(self.dtype)[6:]] + [self.scale]
        parts += [f"P{self.positions}"] * bool(self.positions) + ["wide"] * self.wide
        return "-".join(parts)


def waterfilled(dim: int, bits: float, seed: int, wide: bool = False) -> Profile:
    """A profile of descending widths, different for each seed, that fills its bytes."""
    lanes, nbytes = lanes_for(dim), bytes_for(dim, bits)
    if wide:
        lanes = wide_lanes(dim)
        nbytes = nbytes // lanes * lanes
    generator = torch.Generator().manual_seed(seed)
    decay = 0.5 + 1.5 * torch.rand(1, generator=generator).item()
    groups = dim // lanes
    wanted = [math.exp2(-decay * 4 * i / groups) for i in range(groups)]
    widths = [0] * groups
    for _ in range(nbytes * 8 // lanes):
        gains = [w / 4**own if own < 8 else 0.0 for w, own in zip(wanted, widths, strict=True)]
        widths[gains.index(max(gains))] += 1
    return Profile(tuple(sorted((w for w in widths for _ in range(lanes)), reverse=True)), nbytes, lanes)


def make_spec(side: Side, case: Case, device: str = "cpu") -> SideSpec:
    """A random codec of one layer: random rotation, falling deviations, tables of the case's kind."""
    g = torch.Generator().manual_seed(case.seed * 2 + (side == "k"))
    heads, dim = case.heads, case.dim
    if case.kind.startswith("flat"):
        profiles: tuple[Profile, ...] = (uniform(dim, int(case.bits)),)
        of_head = (0,) * heads
    else:
        seeds = range(case.seed, case.seed + 2)
        profiles = tuple(dict.fromkeys(waterfilled(dim, case.bits, seed, case.wide) for seed in seeds))
        of_head = tuple(head % len(profiles) for head in range(heads))
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=g, dtype=torch.float64))[0]
    deviation = torch.exp2(-3.0 * torch.arange(dim) / dim).expand(heads, dim).clone()
    widest = max(profile.widths[0] for profile in profiles)
    levels = torch.zeros(heads, table_size(widest))
    thresholds = torch.full((heads, table_size(widest)), torch.inf)
    for width in range(1, widest + 1):
        steps = 2**width
        step = 3.0 / steps * (1 + 0.1 * torch.rand(heads, 1, generator=g))
        table = step * (torch.arange(steps) - (steps - 1) / 2)
        if "uniform" not in case.kind:
            table = table + 0.2 * table**3 / (1 + table**2)
        levels[:, table_slice(width)] = table
        thresholds[:, table_slice(width)][:, :-1] = (table[:, 1:] + table[:, :-1]) / 2
    centre = torch.randn(heads, dim, generator=g) if case.centred else torch.zeros(heads, dim)
    of_position = torch.randn(heads, case.positions, dim, generator=g).half()
    spec = SideSpec(
        side, profiles, of_head, centre, basis.float(), deviation, basis.mT.contiguous().float(),
        levels, thresholds, case.scale, of_position if case.positions and side == "k" else None,
    )  # fmt: skip
    return spec.to(torch.device(device))


def make(case: Case, device: str = "cpu", room: int = 0) -> tuple[Tensor, Held, PreparedLayer]:
    """A query, a random cache (views of buffers with `room` tokens to spare, filled with junk) and its layer."""
    g = torch.Generator().manual_seed(case.seed)
    layer = PreparedLayer.of(make_spec("k", case, device), make_spec("v", case, device))
    shape = (case.batch, case.heads, case.tokens, case.dim)
    k = _packed(layer.k.spec, shape, g, room, device)
    v = _packed(layer.v.spec, shape, g, room, device)
    q = torch.randn(case.batch, case.heads, case.queries, case.dim, generator=g) / math.sqrt(case.dim) * 2
    rope = angles(case, torch.arange(case.tokens) + case.sinks, device) if case.centred or case.positions else None
    lengths = sinks = None
    if case.ragged:
        lengths = torch.randint(1, case.tokens + case.sinks + 1, (case.batch,), generator=g, dtype=torch.int32)
        lengths[0] = case.tokens + case.sinks
        lengths = lengths.to(device)
    if case.sinks:
        sinks = torch.randn(2, case.batch, case.heads, case.sinks, case.dim, generator=g).half().to(device)
    held = Held(k, v, rope, lengths, *((None, None) if sinks is None else sinks))
    return q.to(case.dtype).to(device), held, layer


def in_tiles(held: Held) -> Held:
    """The same with values in tiles, as the fast path reads them."""
    tokens = held.v.codes.shape[3]
    tiles = reference.tiled(F.pad(held.v.codes, (0, -tokens % ROOM)))
    return replace(held, v=replace(held.v, codes=tiles[:, :, :, : -(-tokens // TILE)]))


def angles(case: Case, positions: Tensor, device: str = "cpu") -> Rope:
    """RoPE's angles; learned positions turn nothing."""
    frequencies = 10000.0 ** (-torch.arange(0, case.dim, 2) / case.dim) * (case.positions == 0)
    return Rope.at(positions.to(device), frequencies.to(device))


def _packed(spec: SideSpec, shape: tuple[int, ...], g: torch.Generator, room: int, device: str) -> Packed:
    """Random codes, in the codec's memory order, each bit drawn alone; scales between 0.4 and 1.6."""
    batch, heads, tokens, _ = shape
    axes = spec.deviation.shape[-1]
    codes = torch.zeros(batch, heads, tokens + room, axes, dtype=torch.uint8)
    for head, index in enumerate(spec.profile_of_head):
        for width, own in spec.profiles[index].runs:
            size = codes[:, head, :, own].shape
            codes[:, head, :, own] = torch.randint(0, 2**width, size, generator=g).to(torch.uint8)
    packed = reference.pack(codes, spec).to(device)
    view = packed[:, :, :, :tokens]
    if spec.scale == "none":
        return Packed(view, None)
    scales = torch.randint(85, 150, (batch, heads, tokens + room), generator=g).to(torch.uint8).to(device)
    return Packed(view, scales[:, :, :tokens])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in double; NaN stays NaN."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()
