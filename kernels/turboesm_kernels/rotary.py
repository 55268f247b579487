# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Queries and keys out of the joint projection, turned to their positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboesm_kernels.launch import launch
from turboesm_kernels.prepared import padded
from turboesm_kernels.reference import Rope


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    joint, j_r, starts, tokens, cos, sin, r_t, q_out, k_out, scaling,
    HEADS: tl.constexpr, SHARED: tl.constexpr, DIM: tl.constexpr, HEADS_PAD: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """q_out = R (scaling q), k_out = R k of token t of sequence b, at position starts[b] + t.

    joint any float [B T, (H + 2 K) d], q, k, v beside each other; starts int32 [B]; cos and sin f32 [T', d];
    outputs like joint, [B T, H d] and [B T, K d]. Program (b T + t, 0) does the queries, (b T + t, 1) the keys.
    """
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    head, pair = tl.arange(0, HEADS_PAD), tl.arange(0, HALF_PAD)
    heads = tl.where(side == 0, HEADS, SHARED)
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    at = head[:, None] * DIM + pair[None, :]
    source = joint + row * j_r + side * HEADS * DIM + at
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    angle = (tl.load(starts + row // tokens) + row % tokens).to(tl.int64) * r_t + pair
    cosine = tl.load(cos + angle, mask=pair < half, other=0.0)[None, :]
    sine = tl.load(sin + angle, mask=pair < half, other=0.0)[None, :]
    factor = tl.where(side == 0, scaling, 1.0)
    out = tl.where(side == 0, q_out, k_out) + row * heads * DIM + at
    tl.store(out, ((first * cosine - second * sine) * factor).to(q_out.dtype.element_ty), mask=inside)
    tl.store(out + half, ((second * cosine + first * sine) * factor).to(q_out.dtype.element_ty), mask=inside)


def rotate(
    joint: Tensor, heads: int, shared: int, scaling: float, rope: Rope, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, d] (scaled), k (both after RoPE), v [B, K, T, d] of a joint projection [B, T, (H + 2 K) d].

    That is dense, and v is a view of it. rope float32 [T', d], starts int32 [B]: the positions of the first
    tokens, rows of it. One launch, nothing synchronized.
    """
    (batch, tokens, _), dim = joint.shape, joint.shape[-1] // (heads + 2 * shared)
    flat = joint.view(batch, tokens, heads + 2 * shared, dim)
    q = torch.empty((batch, tokens, heads, dim), dtype=joint.dtype, device=joint.device)
    k = torch.empty((batch, tokens, shared, dim), dtype=joint.dtype, device=joint.device)
    launch(
        rotate_kernel, (batch * tokens, 2),
        joint, joint.shape[-1], starts, tokens, rope.cos, rope.sin, rope.cos.stride(0), q, k, scaling,
        HEADS=heads, SHARED=shared, DIM=dim, HEADS_PAD=padded(heads, 1), HALF_PAD=padded(dim // 2, 1),
    )  # fmt: skip
    return q.transpose(1, 2), k.transpose(1, 2), flat[:, :, heads + shared :].transpose(1, 2)
