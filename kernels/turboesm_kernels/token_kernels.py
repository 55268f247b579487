# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""A layer that keeps the kind of each token alone, on a GPU: one program per sequence, head, query; one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboesm_kernels.launch import launch, processors
from turboesm_kernels.prepared import padded
from turboesm_kernels.reference import Rope
from turboesm_kernels.token_tables import TokenTables

BLOCK = 64
MANY = 16
"""Programs a multiprocessor from which one warp does a sequence and head: fewer wait for each other."""


@triton.jit
def tokens_kernel(
    q, q_b, q_h, q_q, ids, i_b, lengths, k, v, k_const, v_const, sigma, epsilon, unmasked, cos, sin, r_t, out,
    kinds,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    KINDS_PAD: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = softmax_j(q . R_j (f k + k_const)) (f v + v_const), k, v, f of the kind of token j (`TokenTables`).

    The query is turned back to each position, q . R_j x = (R_j^T q) . x, pair by pair. q any float [B, H, Q, d],
    ids uint8 [B, T], lengths int32 [B], tables f32, unmasked f32 [B], cos and sin f32 [T, d], out like q.
    """
    row = tl.program_id(0) // QUERIES
    batch, head = (row // HEADS).to(tl.int64), row % HEADS
    pair, kind = tl.arange(0, HALF_PAD), tl.arange(0, KINDS_PAD)
    inside = pair < HALF
    at = q + batch * q_b + head * q_h + tl.program_id(0) % QUERIES * q_q + pair
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    constant = head * 2 * HALF + pair
    k_first = tl.load(k_const + constant, mask=inside, other=0.0)[None, :]
    k_second = tl.load(k_const + constant + HALF, mask=inside, other=0.0)[None, :]
    part = 1.0
    if DROPS:
        part = tl.load(unmasked + batch)
    length = tl.load(lengths + batch)
    top = tl.full((), float("-inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    weight = tl.zeros((KINDS_PAD,), tl.float32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        live = token < length
        own = tl.load(ids + batch * i_b + token, mask=live, other=0).to(tl.int32)
        s = tl.load(sigma + own) / part
        factor = (s * tl.rsqrt(s * s + epsilon))[:, None]
        key = k + ((head * kinds + own) * 2 * HALF)[:, None] + pair[None, :]
        angle = token[:, None] * r_t + pair[None, :]
        seen = live[:, None] & inside[None, :]
        cosine = tl.load(cos + angle, mask=seen, other=0.0)
        sine = tl.load(sin + angle, mask=seen, other=0.0)
        score = (first * cosine + second * sine) * (
            factor * tl.load(key, mask=inside[None, :], other=0.0) + k_first
        )
        score += (second * cosine - first * sine) * (
            factor * tl.load(key + HALF, mask=inside[None, :], other=0.0) + k_second
        )
        scores = tl.where(live, tl.sum(score, 1), float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 0))
        share = tl.exp(scores - highest)
        shrink = tl.exp(top - highest)
        mass = mass * shrink + tl.sum(share, 0)
        weight = weight * shrink + tl.sum(tl.where(own[:, None] == kind[None, :], share[:, None], 0.0), 0)
        top = highest
    s = tl.load(sigma + kind, mask=kind < kinds, other=0.0) / part
    weight = weight * s * tl.rsqrt(s * s + epsilon) / tl.where(mass > 0, mass, 1.0)
    values = v + ((head * kinds + kind) * 2 * HALF)[:, None] + pair[None, :]
    there = (kind < kinds)[:, None] & inside[None, :]
    held = tl.where(mass > 0, 1.0, 0.0)
    target = out + tl.program_id(0).to(tl.int64) * 2 * HALF + pair
    for half in tl.static_range(2):
        value = tl.sum(weight[:, None] * tl.load(values + half * HALF, mask=there, other=0.0), 0)
        value += held * tl.load(v_const + constant + half * HALF, mask=inside, other=0.0)
        tl.store(target + half * HALF, value.to(out.dtype.element_ty), mask=inside)


def attend(q: Tensor, ids: Tensor, tables: TokenTables, unmasked: Tensor, rope: Rope, lengths: Tensor) -> Tensor:
    """`token_layer.attend_tokens` in float32. A sequence of length 0 gets 0.

    Nothing is synchronized: safe in a CUDA graph.
    """
    batch, heads, queries, dim = q.shape
    kinds = len(tables.sigma)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        tokens_kernel, (batch * heads * queries,),
        q, *q.stride()[:3], ids, ids.stride(0), lengths, tables.k, tables.v, tables.k_const,
        tables.v_const, tables.sigma, tables.epsilon, unmasked, rope.cos, rope.sin, rope.cos.stride(0), out, kinds,
        HEADS=heads, QUERIES=queries, HALF=dim // 2, HALF_PAD=padded(dim // 2),
        KINDS_PAD=padded(kinds), DROPS=tables.drops, BLOCK=BLOCK,
        num_warps=1 if batch * heads * queries >= MANY * processors(q) else 4,
    )  # fmt: skip
    return out
