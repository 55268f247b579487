"""The bit layout of a packed key or value vector: which bits of which byte hold which axis.

A head's vector is coded along A axes. Axis a has a code of `widths[a]` bits (0: not stored). Codes live in
byte lanes: four neighbouring axes have one width and sit at the same bits of four neighbouring bytes, so that
one shift and one mask pull four codes out of a 32-bit word. `lanes` is 4 where head_dim is a multiple of 64,
2 for other multiples of 32, else 1; or 4 at more of them (`wide_lanes`), where sizes may be rounded to words.

    widths 5 5 5 5 3 3 3 3            one word, little-endian; byte i holds axis i and axis 4 + i

      byte 3        byte 2        byte 1        byte 0
    [777 33333]   [666 22222]   [555 11111]   [444 00000]

Codes are placed whole, widest first, into the first byte with room. What does not fit whole is cut into
pieces, low bits first, over the bits left free: eight 3-bit codes take three bytes, codes 6 and 7 in pieces.

    widths 3 x 8, one lane            byte 2 = [77 555 444]   byte 1 = [7 6 333 222]   byte 0 = [66 111 000]

Memory order, for tokens t of a sequence (bytes; the last index runs fastest):

    keys     [B, H, nbytes / lanes, T, lanes]   a token's word: a dot product over axes reads whole words
    values   [B, H, nbytes, T]                  an axis' bytes of 4 tokens: a sum over tokens reads whole words

A cache of the GPU's fast path has values of 4 lanes in tiles of 8 tokens, so that those of a token that is packed
alone are as few sectors of 32 bytes as its words; files and everything else have them as above:

    tiles    [B, H, nbytes / 4, T / 8, 4, 8]    a word of 8 tokens: first their bytes 0, then 1, 2, 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Side = Literal["k", "v"]
SIDES: tuple[Side, Side] = ("k", "v")

BYTE = 8
MAX_WIDTH = 8
WIDE = 4
TILE = 8
"""Tokens of a tile of values."""
ROOM = 16
"""Tokens that a cache of the fast path has room for a multiple of: a lane reads as many values at once."""
LEAST_WIDE = 32
"""head_dim from which a word more or less is no large part of a vector."""
ROPE_BASE = 10000
"""Of the angles by which keys are turned before they are coded, in ESM-2 and most models with RoPE."""


@dataclass(frozen=True)
class Piece:
    """`width` bits of the code of `axis`, from its bit `low` up, stored at bit `shift` of byte `byte`."""

    axis: int
    byte: int
    shift: int
    low: int
    width: int

    @property
    def mask(self) -> int:
        """The piece's bits, right-aligned."""
        return (1 << self.width) - 1


@dataclass(frozen=True)
class Field:
    """Pieces that one shift and one mask serve: of axis `axes[i]` in byte `in_bytes[i]`, all different."""

    shift: int
    low: int
    mask: int
    axes: list[int]
    in_bytes: list[int]


@dataclass(frozen=True)
class Profile:
    """Code widths of a head's axes, in bits, and the bytes that hold them.

    `nbytes` may exceed what the widths need (padding bits are zero). Raises ValueError where a width is not in
    0..8 or larger than the one before it, the widths do not fit, or `lanes` neighbouring axes differ in width.
    """

    widths: tuple[int, ...]
    nbytes: int
    lanes: int = 1

    def __post_init__(self) -> None:
        if not self.widths or any(not 0 <= width <= MAX_WIDTH for width in self.widths):
            raise ValueError(f"code widths must be 0..{MAX_WIDTH} bits, not {self.widths}")
        if list(self.widths) != sorted(self.widths, reverse=True):
            raise ValueError(f"axes come widest first, not {self.widths}")
        if self.lanes not in (1, 2, 4) or self.nbytes % self.lanes or len(self.widths) % self.lanes:
            raise ValueError(
                f"{len(self.widths)} axes in {self.nbytes} bytes do not split into {self.lanes} lanes"
            )
        if any(len(set(group)) > 1 for group in _groups(self.widths, self.lanes)):
            raise ValueError(f"{self.lanes} neighbouring axes must share a width")
        if sum(self.widths) > BYTE * self.nbytes:
            raise ValueError(f"{sum(self.widths)} bits do not fit in {self.nbytes} bytes")

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Where every bit of every code lies, in order of axis."""
        lane_widths = [group[0] for group in _groups(self.widths, self.lanes)]
        placed = _place(lane_widths, self.nbytes // self.lanes)
        lanes = range(self.lanes)
        spread = [
            Piece(p.axis * self.lanes + i, p.byte * self.lanes + i, p.shift, p.low, p.width)
            for p in placed
            for i in lanes
        ]
        return tuple(sorted(spread, key=lambda piece: (piece.axis, piece.low)))

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The pieces, those of one shift, mask and place in the code together."""
        groups: dict[tuple[int, int, int], Field] = {}
        for piece in self.pieces:
            key = (piece.shift, piece.low, piece.mask)
            field = groups.setdefault(key, Field(*key, axes=[], in_bytes=[]))
            field.axes.append(piece.axis)
            field.in_bytes.append(piece.byte)
        return tuple(groups.values())

    @property
    def runs(self) -> tuple[tuple[int, slice], ...]:
        """Each width above 0 with the run of axes that have it, widest first."""
        found = []
        for width in sorted(set(self.widths) - {0}, reverse=True):
            start = self.widths.index(width)
            found.append((width, slice(start, start + self.widths.count(width))))
        return tuple(found)

    @property
    def bits(self) -> int:
        """Payload bits of a vector, padding not counted."""
        return sum(self.widths)


def lanes_for(head_dim: int) -> int:
    """How many neighbouring axes share a width at this head_dim."""
    return 4 if head_dim % 64 == 0 else 2 if head_dim % 32 == 0 else 1


def wide_lanes(head_dim: int) -> int:
    """The same where a vector's bytes need not follow from its bits: the fast kernel reads whole words."""
    return WIDE if head_dim >= LEAST_WIDE and head_dim % WIDE == 0 else lanes_for(head_dim)


def bytes_for(head_dim: int, bits: float) -> int:
    """Bytes of a head's vector at `bits` payload bits per value: the largest whole number of lanes within them."""
    lanes = lanes_for(head_dim)
    return int(head_dim * bits / BYTE + 1e-9) // lanes * lanes


def uniform(head_dim: int, bits: int) -> Profile:
    """The profile that gives every axis `bits` bits."""
    lanes = lanes_for(head_dim)
    nbytes = -(-head_dim * bits // (BYTE * lanes)) * lanes
    return Profile((bits,) * head_dim, nbytes, lanes)


def codes_shape(side: Side, heads: int, nbytes: int, lanes: int, batch: int, tokens: int) -> tuple[int, ...]:
    """Of packed codes: keys [B, H, nbytes / lanes, T, lanes], values [B, H, nbytes, T]."""
    if side == "v":
        return batch, heads, nbytes, tokens
    return batch, heads, nbytes // lanes, tokens, lanes


def tiles_shape(heads: int, nbytes: int, batch: int, tokens: int) -> tuple[int, ...]:
    """Of packed values in tiles; the last one may have room for more tokens."""
    return batch, heads, nbytes // WIDE, -(-tokens // TILE), WIDE, TILE


def table_size(width: int) -> int:
    """Entries of the tables of 1..width bits together."""
    return 2 ** (width + 1) - 2


def _groups(widths: Sequence[int], lanes: int) -> list[Sequence[int]]:
    return [widths[start : start + lanes] for start in range(0, len(widths), lanes)]


def _place(widths: Sequence[int], nbytes: int) -> list[Piece]:
    """Whole codes first-fit, widest first; then the rest in pieces over the bits left free."""
    free = [BYTE] * nbytes
    pieces: list[Piece] = []
    rest: list[int] = []
    for axis in (a for a, width in enumerate(widths) if width):
        byte = next((b for b in range(nbytes) if free[b] >= widths[axis]), None)
        if byte is None:
            rest.append(axis)
        else:
            pieces.append(_take(free, axis, byte, 0, widths[axis]))
    for axis in rest:
        low = 0
        while low < widths[axis]:
            byte = next(b for b in range(nbytes) if free[b])
            pieces.append(_take(free, axis, byte, low, min(free[byte], widths[axis] - low)))
            low += pieces[-1].width
    return pieces


def _take(free: list[int], axis: int, byte: int, low: int, width: int) -> Piece:
    piece = Piece(axis, byte, BYTE - free[byte], low, width)
    free[byte] -= width
    return piece
