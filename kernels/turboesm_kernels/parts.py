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
