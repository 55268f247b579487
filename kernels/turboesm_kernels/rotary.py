# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Queries and keys out of the joint projection, turned to their positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.launch import early_launch, launch, launches_early
from turboesm_kernels.operands import Joint
from turboesm_kernels.parts import summed
from turboesm_kernels.prepared import padded
from turboesm_kernels.reference import Rope


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    joint, j_r, joint_s, starts, tokens, cos, sin, r_t, q_out, k_out, v_out, scaling,
    HEADS: tl.constexpr, SHARED: tl.constexpr, DIM: tl.constexpr, HEADS_PAD: tl.constexpr, HALF_PAD: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """q_out = R (scaling q), k_out = R k, v_out = v of token t of sequence b, at position starts[b] + t.

    joint any float [PARTS, B T, (H + 2 K) d], q, k, v beside each other; starts int32 [B]; cos and sin f32
    [T', d]; outputs any float, [B T, H d] and twice [B T, K d]. Program (b T + t, 0) does the queries,
    (b T + t, 1) the keys, (b T + t, 2) the values.
    """
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    head, pair = tl.arange(0, HEADS_PAD), tl.arange(0, HALF_PAD)
    heads = tl.where(side == 0, HEADS, SHARED)
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    at = head[:, None] * DIM + pair[None, :]
    before = tl.where(side == 0, 0, HEADS + (side - 1) * SHARED)  # heads
    source = joint + row * j_r + before * DIM + at
    # Positions were there before the product, the kernel before, began.
    angle = (tl.load(starts + row // tokens) + row % tokens).to(tl.int64) * r_t + pair
    turned = pair < tl.where(side < 2, half, 0)
    cosine = tl.load(cos + angle, mask=turned, other=1.0)[None, :]
    sine = tl.load(sin + angle, mask=turned, other=0.0)[None, :]
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    first = summed(source, inside, joint_s, PARTS)
    second = summed(source + half, inside, joint_s, PARTS)
    factor = tl.where(side == 0, scaling, 1.0)
    out = tl.where(side == 0, q_out, tl.where(side == 1, k_out, v_out)) + row * heads * DIM + at
    tl.store(out, ((first * cosine - second * sine) * factor).to(q_out.dtype.element_ty), mask=inside)
    tl.store(out + half, ((second * cosine + first * sine) * factor).to(q_out.dtype.element_ty), mask=inside)


def rotate(joint: Joint, rope: Rope, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, d] (scaled), k (both after RoPE) and v [B, K, T, d], a view where the product is in one part.

    rope float32 [T', d], starts int32 [B]: the positions of the first tokens, rows of it. One launch, nothing
    synchronized. `starts` and rope must be older than the kernel that made the product.
    """
    product, (heads, shared) = joint.product, joint.heads
    in_parts = product.dim() == 4
    batch, tokens, width = product.shape[-3:]
    dim = width // (heads + 2 * shared)
    q, k, v = (
        torch.empty((batch, tokens, each, dim), dtype=joint.dtype, device=product.device)
        for each in (heads, shared, shared if in_parts else 0)
    )
    early = launches_early(product)
    launch(
        rotate_kernel, (batch * tokens, 3 if in_parts else 2),
        product, width, batch * tokens * width, starts, tokens, rope.cos, rope.sin, rope.cos.stride(0), q, k, v,
        joint.scaling,
        HEADS=heads, SHARED=shared, DIM=dim, HEADS_PAD=padded(heads, 1), HALF_PAD=padded(dim // 2, 1),
        PARTS=joint.parts, EARLY=early, **early_launch(early),
    )  # fmt: skip
    if not in_parts:
        v = product.view(batch, tokens, heads + 2 * shared, dim)[:, :, heads + shared :]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
