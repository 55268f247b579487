"""Plain torch: encode, pack, unpack, decode and attend. The oracle for every kernel.

A vector x of head_dim d (a key after RoPE, or a value) is coded as

    z = (x - c) E            c: centre, E [d, A]: analysis matrix
    y = z / (n s)            n: the token's scale, s [A]: deviation of each axis
    code = #{thresholds below y}, one table of thresholds and levels per head and width
    x^ = n (s T[code]) D + c D [A, d]: synthesis matrix, T: the levels

and n is the least-squares factor <z, z^> / <z^, z^> of z^ = s T[code] (DESIGN: recipe `flat` and after), kept
in 8 bits, or 1 where a recipe has no scale. To find the codes, n is not known yet: `start_scale` stands for it.
A key's centre is the mean of keys *before* RoPE: it comes back as R_j c, the centre turned to the token's
position j. Where a model has learned positions instead, each may have a centre of its own: c + `centre_at`_j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from turboesm_kernels.layout import ROPE_BASE as ROPE_BASE
from turboesm_kernels.layout import TILE, WIDE, Profile, codes_shape, tiles_shape
from turboesm_kernels.layout import Side as Side
from turboesm_kernels.layout import table_size as table_size

Scale = Literal["none", "norm", "least-squares"]

SCALE_STEPS_PER_OCTAVE = 32
SCALE_ZERO = 128

TURN = 128
"""Tokens of a block of the fast kernel: see `Rope.turns`."""

PAIRED = 32
"""Channels whose pairs the fast kernel turns at once: four lanes, four pairs each."""


SPEC_TENSORS = ("centre", "analysis", "deviation", "synthesis", "levels", "thresholds")
"""Of a `SideSpec`, by name: those that each has."""


@dataclass(frozen=True)
class SideSpec:
    """How the keys or the values of one layer are coded. H heads of head_dim d, A axes a head.

    profiles         the distinct bit layouts of the layer's heads; all have the same nbytes and lanes
    profile_of_head  for each head, the index of its profile
    centre           float32 [H, d]; for keys, before RoPE
    analysis         float32 [H, d, A]
    deviation        float32 [H, A], > 0
    synthesis        float32 [H, A, d]
    levels           float32 [H, table_size(width)]: tables of all widths, see `table_slice`
    thresholds       float32, same shape: 2^w - 1 ascending thresholds a table, the last entry +inf
    scale            the factor that each token has of its own: none, its norm, or the least-squares factor
    centre_at        of keys, float16 [H, P, d]: what the centre at each learned position has more than `centre`,
                     the last one's from there on; or None

    Axes beyond head_dim, if any, have 1 bit: the signs of what the others leave over (`residual_axes`).
    """

    side: Side
    profiles: tuple[Profile, ...]
    profile_of_head: tuple[int, ...]
    centre: Tensor
    analysis: Tensor
    deviation: Tensor
    synthesis: Tensor
    levels: Tensor
    thresholds: Tensor
    scale: Scale
    centre_at: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes a token and head."""
        return self.profiles[0].nbytes

    @property
    def lanes(self) -> int:
        """Byte lanes of the layout."""
        return self.profiles[0].lanes

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.centre.shape[0]

    @property
    def head_dim(self) -> int:
        """Channels d of a head."""
        return self.centre.shape[1]

    @property
    def residual_axes(self) -> int:
        """How many axes, the last ones, code the residual of the others."""
        return max(0, self.analysis.shape[-1] - self.head_dim)

    @property
    def can_tile(self) -> bool:
        """Whether codes may lie in tiles: values in words of 4 lanes."""
        return self.side == "v" and self.lanes == WIDE

    def codes_shape(self, batch: int, tokens: int, tiled: bool = False) -> tuple[int, ...]:
        """Of `Packed.codes`, see `layout.codes_shape`, or of values in tiles."""
        if tiled:
            return tiles_shape(self.heads, self.nbytes, batch, tokens)
        return codes_shape(self.side, self.heads, self.nbytes, self.lanes, batch, tokens)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The spec's tensors by name."""
        own = {name: getattr(self, name) for name in SPEC_TENSORS}
        return own if self.centre_at is None else own | {"centre_at": self.centre_at}

    def to(self, device: torch.device) -> SideSpec:
        """The same spec with its tensors on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return SideSpec(self.side, self.profiles, self.profile_of_head, scale=self.scale, **moved)


@dataclass(frozen=True)
class Packed:
    """Packed vectors of B sequences, H heads, T tokens.

    codes   uint8, see `SideSpec.codes_shape`; values may lie in tiles
    scales  uint8 [B, H, T], or None where the spec has no scales
    """

    codes: Tensor
    scales: Tensor | None

    @property
    def tiled(self) -> bool:
        """Whether these are values in tiles (`layout`)."""
        return self.codes.dim() == 6


def table_slice(width: int) -> slice:
    """Where the table of codes of `width` bits lies: tables of 1, 2, ... bits follow each other."""
    return slice(2**width - 2, 2 ** (width + 1) - 2)


def encode(x: Tensor, spec: SideSpec) -> tuple[Tensor, Tensor | None]:
    """Codes uint8 [B, H, T, A] and scale bytes uint8 [B, H, T] (or None) of centred vectors x [B, H, T, d]."""
    x = x.to(spec.analysis.dtype)
    codes, scales = _encode_axes(x @ spec.analysis, spec)
    if spec.residual_axes:
        own = slice(spec.head_dim, None)
        left = x - decode(codes, scales, spec, with_residual=False)
        codes[..., own] = ((left @ spec.analysis[:, :, own]) > 0).to(torch.uint8)
    return codes, scales


def _encode_axes(z: Tensor, spec: SideSpec) -> tuple[Tensor, Tensor | None]:
    """Codes and scale bytes of coordinates z [B, H, T, A], each axis on its own."""
    y = z / spec.deviation[:, None]
    if spec.scale == "none":
        return _codes(y, spec), None
    start = start_scale(y, spec)
    codes = _codes(y / start, spec)
    if spec.scale == "norm":
        return codes, scale_to_byte(start[..., 0])
    z_hat = _levels(codes, spec) * spec.deviation[:, None] * _coded_mask(spec)
    scale = (z * z_hat).sum(-1) / (z_hat * z_hat).sum(-1).clamp_min(1e-30)
    return codes, scale_to_byte(scale)


def decode(codes: Tensor, scales: Tensor | None, spec: SideSpec, with_residual: bool = True) -> Tensor:
    """Centred vectors float32 [B, H, T, d] of codes [B, H, T, A] and scale bytes [B, H, T]."""
    z_hat = _levels(codes, spec) * spec.deviation[:, None]
    x = (z_hat if with_residual else z_hat * _coded_mask(spec)) @ spec.synthesis
    return x if scales is None else x * byte_to_scale(scales)[..., None]


def start_scale(y: Tensor, spec: SideSpec) -> Tensor:
    """What normalised coordinates y [B, H, T, A] are divided by before they are coded, [B, H, T, 1].

    The root mean square of the coded axes, and for least squares a quarter of the largest one added: tokens with
    one large coordinate then lose less of it to the table's end (about 10 % less error on real models).
    """
    coded = _coded_mask(spec)
    norm = ((y * y * coded).sum(-1, keepdim=True) / coded.sum(-1, keepdim=True)).sqrt()
    if spec.scale == "least-squares":
        norm = norm + (y.abs() * coded).amax(-1, keepdim=True) / 4
    return norm.clamp_min(1e-12)


def pack(codes: Tensor, spec: SideSpec) -> Tensor:
    """Packed codes, in the memory order of `Packed.codes`, of codes uint8 [B, H, T, A]."""
    planes = codes.new_zeros((spec.nbytes, *codes.shape[:-1]))
    axes = codes.movedim(-1, 0)
    for profile, heads in _heads_by_profile(spec):
        own, out = axes[:, :, heads], planes[:, :, heads]
        for field in profile.fields:
            out[field.in_bytes] |= ((own[field.axes] >> field.low) & field.mask) << field.shift
        planes[:, :, heads] = out
    return _to_memory_order(planes, spec)


def unpack(packed: Tensor, spec: SideSpec) -> Tensor:
    """Codes uint8 [B, H, T, A] of packed codes; the inverse of `pack`."""
    planes = _from_memory_order(packed, spec)
    axes = planes.new_zeros((spec.deviation.shape[-1], *planes.shape[1:]))
    for profile, heads in _heads_by_profile(spec):
        own, out = planes[:, :, heads], axes[:, :, heads]
        for field in profile.fields:
            out[field.axes] |= ((own[field.in_bytes] >> field.shift) & field.mask) << field.low
        axes[:, :, heads] = out
    return axes.movedim(0, -1)


def compress(x: Tensor, spec: SideSpec, rope: Rope | None = None) -> Packed:
    """Centre, encode and pack vectors x float [B, H, T, d]; `rope` gives the keys' positions."""
    codes, scales = encode(x.to(spec.centre.dtype) - _centre(spec, rope), spec)
    return Packed(pack(codes, spec), scales)


def expand(packed: Packed, spec: SideSpec, rope: Rope | None = None) -> Tensor:
    """Vectors float32 [B, H, T, d] of packed ones; the inverse of `compress` but for quantization."""
    codes = unpack(packed.codes, spec)
    if packed.scales is not None:
        codes = codes[:, :, : packed.scales.shape[2]]  # the last tile may have room for more
    return decode(codes, packed.scales, spec) + _centre(spec, rope)


def roundtrip(x: Tensor, spec: SideSpec, rope: Rope | None = None) -> Tensor:
    """`expand(compress(x))` without the packing: what a cache gives back for x [B, H, T, d]."""
    centre = _centre(spec, rope)
    codes, scales = encode(x.to(spec.centre.dtype) - centre, spec)
    return decode(codes, scales, spec) + centre


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Softmax attention of q [B, H, Q, d] (scaled already) over k, v [B, H, T, d]; result like q.

    `lengths` int [B]: keys from there on are padding.
    """
    scores = q @ k.transpose(-1, -2)
    if lengths is not None:
        padding = torch.arange(k.shape[2], device=k.device) >= lengths[:, None]
        scores = scores.masked_fill(padding[:, None, None], -math.inf)
    return scores.softmax(-1) @ v


def rope_frequencies(dim: int, device: torch.device) -> Tensor:
    """RoPE's inverse frequencies float32 [dim / 2]."""
    return float(ROPE_BASE) ** (-torch.arange(0, dim, 2, device=device) / dim)


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of RoPE's angles at some positions, float32 [..., T, d] (both halves alike).

    `positions` int [..., T]: those, where they matter (`SideSpec.centre_at`).
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None = None

    def rows(self, which: slice | Tensor) -> Rope:
        """Some of the positions: those of angles [T, d] that `which` picks."""
        own = None if self.positions is None else self.positions[which]
        return Rope(self.cos[which], self.sin[which], own)

    @cached_property
    def half(self) -> Tensor:
        """Cosines, then sines, of the first half of channels: [d, T] for angles [T, d]."""
        half = self.cos.shape[-1] // 2
        return torch.cat((self.cos[:, :half], self.sin[:, :half]), 1).mT

    @cached_property
    def half_rows(self) -> Tensor:
        """`half`, an angle's tokens side by side in memory."""
        return self.half.contiguous()

    @cached_property
    def turns(self) -> Tensor:
        """Cosines and sines of the turns by 16 g and 16 g + 1 tokens, g < 8, as the fast kernel multiplies them.

        A sum of two float16 [2, d' / 16, 32 lanes, 4 registers, (cosine, sine)] (`ptx_text.bias_code`); angles [T,
        d] of consecutive positions, d' = d padded to `PAIRED`: those of pairs that are none mean nothing. Turns by
        T tokens or more are 0: nothing asks for them. Made when first asked for, so ask once before a CUDA graph
        is captured.
        """
        lane, register = self._fragment
        return self._turns_by(16 * (lane // 4)[:, None] + register % 2)

    @cached_property
    def group_turns(self) -> Tensor:
        """The same of the turns by 32 s + 4 g and 32 s + 4 g + 2 tokens, s < 4: [4 s, 2, d' / 16, 32, 4, 2].

        As the kernel for grouped queries multiplies them (`grouped_text.bias_code`).
        """
        lane, register = self._fragment
        own = 4 * (lane // 4)[:, None] + 2 * (register % 2)
        return torch.stack([self._turns_by(32 * s + own) for s in range(4)])

    @property
    def _fragment(self) -> tuple[Tensor, Tensor]:
        """Lanes, and registers of each, of the left side of a product m16n8k16."""
        return torch.arange(32, device=self.cos.device), torch.arange(4, device=self.cos.device)

    def _turns_by(self, offset: Tensor) -> Tensor:
        """`turns` by offsets int64 [32, 4] of lanes' registers."""
        half = _padded_pairs(self.cos)
        lane, register = self._fragment
        first_pair = half // 4 * (lane % 4)[:, None] + register // 2
        pair = first_pair + 2 * torch.arange(half // 8, device=lane.device)[:, None, None]
        there = (offset < len(self.cos))[None]
        row = offset.clamp(max=len(self.cos) - 1).expand(pair.shape)
        pair = pair.clamp(max=self.cos.shape[-1] // 2 - 1)
        cos, sin = self.cos.double(), self.sin.double()
        cos_0, sin_0 = cos[0][pair], sin[0][pair]
        cosine = cos[row, pair] * cos_0 + sin[row, pair] * sin_0
        sine = sin[row, pair] * cos_0 - cos[row, pair] * sin_0
        whole = torch.stack((cosine * there, sine * there), -1)
        high = whole.half()
        return torch.stack((high, (whole - high).half()))

    @cached_property
    def block_turn(self) -> Tensor:
        """Cosines, then sines, of the turn by 128 tokens, float32 [d']; 0 where there are no more angles [T, d].

        d' as in `turns`.
        """
        half, more = self.cos.shape[-1] // 2, _padded_pairs(self.cos)
        if len(self.cos) <= TURN:
            return torch.zeros(2 * more, device=self.cos.device)
        cos, sin = (x.double()[:, :half] for x in (self.cos, self.sin))
        turn = (cos[TURN] * cos[0] + sin[TURN] * sin[0], sin[TURN] * cos[0] - cos[TURN] * sin[0])
        return torch.cat([torch.nn.functional.pad(part, (0, more - half)) for part in turn]).float()

    def ready(self) -> None:
        """Make now what the fast kernels would ask for first: they read it before they wait for earlier work."""
        _ = self.turns, self.group_turns, self.block_turn

    @classmethod
    def at(cls, positions: Tensor, inverse_frequencies: Tensor) -> Rope:
        """Angles of `positions` int [..., T] for inverse frequencies float [d / 2]."""
        angles = positions[..., None].to(inverse_frequencies.dtype) * inverse_frequencies
        angles = torch.cat((angles, angles), -1)
        return cls(angles.cos(), angles.sin(), positions)

    def rotate(self, x: Tensor) -> Tensor:
        """Turn x [..., T, d] to the positions (RoFormer, arXiv 2104.09864; halves rotate together)."""
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin

    def rotate_back(self, x: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        first, second = x.chunk(2, -1)
        return x * self.cos - torch.cat((-second, first), -1) * self.sin


def _padded_pairs(cos: Tensor) -> int:
    """Pairs of channels of angles [T, d], padded as the fast kernel takes them."""
    return -(-cos.shape[-1] // PAIRED) * PAIRED // 2


def scale_to_byte(scale: Tensor) -> Tensor:
    """Scales as uint8, logarithmic: 32 steps an octave around 1, so within 1.1 % from 1/16 to 15.6."""
    steps = torch.log2(scale.clamp_min(1e-30)) * SCALE_STEPS_PER_OCTAVE
    return (steps.round() + SCALE_ZERO).clamp(0, 255).to(torch.uint8)


def byte_to_scale(byte: Tensor) -> Tensor:
    """Scales float32 of their bytes."""
    return torch.exp2((byte.float() - SCALE_ZERO) / SCALE_STEPS_PER_OCTAVE)


def _centre(spec: SideSpec, rope: Rope | None) -> Tensor:
    """What is added back: [H, 1, d] for values, the centre at each position [..., H, T, d] for keys."""
    centre = spec.centre[:, None]
    if spec.side == "v":
        return centre
    if rope is None:
        raise ValueError("keys need their positions")
    turned = rope.rotate(centre)
    return turned if spec.centre_at is None else turned + at_positions(spec.centre_at, rope)


def at_positions(table: Tensor, rope: Rope) -> Tensor:
    """Rows [..., H, T, d] of a table [H, P, d] at positions int [T] or [..., 1, T]; the last one beyond it."""
    if rope.positions is None:
        raise ValueError("a centre for each position needs the positions")
    index = rope.positions.long().clamp(max=table.shape[1] - 1)
    return table[:, index] if index.dim() == 1 else table[:, index.squeeze(-2)].movedim(0, -3)


def _coded_mask(spec: SideSpec) -> Tensor:
    """1 where an axis is coded, 0 where it has no bits or codes the residual of the others: float32 [H, 1, A]."""
    rows = [[width > 0 for width in spec.profiles[index].widths] for index in spec.profile_of_head]
    mask = torch.tensor(rows, device=spec.centre.device)[:, None].float()
    mask[..., spec.head_dim :] = 0
    return mask


def _heads_by_profile(spec: SideSpec) -> list[tuple[Profile, slice | list[int]]]:
    """Each profile with its heads: a slice, and so a view, where there is but one."""
    if len(spec.profiles) == 1:
        return [(spec.profiles[0], slice(None))]
    heads = range(len(spec.profile_of_head))
    return [(p, [h for h in heads if spec.profile_of_head[h] == i]) for i, p in enumerate(spec.profiles)]


def _codes(y: Tensor, spec: SideSpec) -> Tensor:
    """Codes uint8 of normalised coordinates y [B, H, T, A]."""
    codes = torch.zeros_like(y, dtype=torch.uint8)
    for profile, heads in _heads_by_profile(spec):
        for width, axes in profile.runs:
            table = spec.thresholds[heads, table_slice(width)][:, :-1].contiguous()
            block = y[:, heads, :, axes].transpose(0, 1)
            found = torch.searchsorted(table, block.reshape(len(table), -1).contiguous())
            codes[:, heads, :, axes] = found.to(torch.uint8).reshape(block.shape).transpose(0, 1)
    return codes


def _levels(codes: Tensor, spec: SideSpec) -> Tensor:
    """Levels float32 [B, H, T, A] that codes stand for; 0 where an axis is not coded."""
    y = torch.zeros(codes.shape, dtype=spec.levels.dtype, device=codes.device)
    for profile, heads in _heads_by_profile(spec):
        for width, axes in profile.runs:
            table = spec.levels[heads, table_slice(width)]
            block = codes[:, heads, :, axes].transpose(0, 1)
            found = table.gather(1, block.reshape(len(table), -1).long())
            y[:, heads, :, axes] = found.reshape(block.shape).transpose(0, 1)
    return y


def _to_memory_order(planes: Tensor, spec: SideSpec) -> Tensor:
    """[nbytes, B, H, T] -> `Packed.codes`."""
    if spec.side == "v":
        return planes.permute(1, 2, 0, 3).contiguous()
    words = planes.unflatten(0, (-1, spec.lanes))
    return words.permute(2, 3, 0, 4, 1).contiguous()


def _from_memory_order(packed: Tensor, spec: SideSpec) -> Tensor:
    """`Packed.codes` -> [nbytes, B, H, T]."""
    if spec.side == "v":
        return untiled(packed).permute(2, 0, 1, 3)
    return packed.permute(2, 4, 0, 1, 3).flatten(0, 1)


def tiled(planes: Tensor) -> Tensor:
    """Values' codes [B, H, nbytes, T] in tiles [B, H, nbytes / 4, T / 8, 4, 8], T padded to whole ones: a copy."""
    padded = torch.nn.functional.pad(planes, (0, -planes.shape[3] % TILE))
    return padded.unflatten(3, (-1, TILE)).unflatten(2, (-1, WIDE)).transpose(3, 4).contiguous()


def untiled(codes: Tensor) -> Tensor:
    """Values' codes [B, H, nbytes, T] of tiles, a copy; what lies so already, as it is."""
    return codes if codes.dim() == 4 else codes.transpose(3, 4).flatten(4, 5).flatten(2, 3)
