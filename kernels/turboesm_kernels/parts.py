# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What kernels do with the queries, keys and values of a joint projection: add its parts, turn channels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def summed(at, inside, part_stride, PARTS: tl.constexpr):
    """The sum of a product's parts at some places, float32."""
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * part_stride, mask=inside, other=0.0)
    return total


@triton.jit
def swapped(dim, DIM: tl.constexpr):
    """The channel that RoPE turns with each, and the sign of what is added of it."""
    half: tl.constexpr = DIM // 2
    return tl.where(dim < half, dim + half, dim - half), tl.where(dim < half, -1.0, 1.0)


@triton.jit
def angles_at(cos, sin, rope_t, rope_d, place, live, dim, DIM: tl.constexpr):
    """Cosines and sines of rows' places, for some channels."""
    inside = live[:, None] & (dim < DIM)[None, :]
    angle = (place.to(tl.int64) * rope_t)[:, None] + dim[None, :] * rope_d
    return tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)


@triton.jit
def turned_sum(rows, x_d, dim, inside, part_stride, cosine, sine, DIM: tl.constexpr, PARTS: tl.constexpr):
    """The sum of a product's parts, turned: some channels, x_d apart, of rows that begin at `rows`, float32."""
    partner, sign = swapped(dim, DIM)
    own = summed(rows[:, None] + dim[None, :] * x_d, inside, part_stride, PARTS)
    other = summed(rows[:, None] + partner[None, :] * x_d, inside, part_stride, PARTS)
    return own * cosine + other * sign[None, :] * sine
