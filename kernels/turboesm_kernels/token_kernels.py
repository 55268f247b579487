# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""A layer that keeps the kind of each token alone, on a GPU.

All tokens of one kind have the same key but for RoPE, q . R_j k = <phases of q and k, angles of j>: their scores
under all heads are one matrix product, and softmax needs the sum of each kind's shares alone. So a program takes
one kind of one sequence, finds its tokens and leaves the greatest score and the sum for each query; then values
are summed over kinds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboesm_kernels.launch import launch
from turboesm_kernels.prepared import padded
from turboesm_kernels.reference import Rope
from turboesm_kernels.token_tables import TokenTables
from turboesm_kernels.triton_kernels import LOG2E

SCAN = 1024
"""Tokens that are looked at at once for those of a kind."""

TILE = 64
"""Tokens of one kind that are scored at once."""

MOST_ROWS = 32
"""Queries of a sequence, of any head, that a program scores."""

ROW_BLOCK = 16
"""Queries of a head, of any sequence, whose values are summed at once."""

DIM_BLOCK = 64
"""Channels of the values at once."""

MANY_KINDS = 64
"""Kinds above which a program has 8 warps."""


@triton.jit(do_not_specialize=["kinds", "rows"])
def token_scores_kernel(
    q, q_b, q_h, q_q, ids, i_b, lengths, k, k_const, sigma, epsilon, unmasked, cos, sin, r_t,
    places, p_g, p_b, part_max, part_sum, kinds, rows,
    QUERIES: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, DROPS: tl.constexpr, SCAN: tl.constexpr,
    TILE: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the tokens j of one kind: m = max_j s_j and sum_j 2^(s_j - m), s_j = log2(e) q . R_j (f k + k_const).

    The query is turned back to each position, q . R_j x = (R_j^T q) . x, pair by pair. q any float [B, H, Q, d],
    ids uint8 [B, T], lengths int32 [B], up to T, tables f32 (`TokenTables`), unmasked f32 [B], cos and sin f32
    [T, d], places int32 [G, B, T], which each program writes and reads a part of, part_max and part_sum f32
    [B, H Q, N], -inf and 0 where there is no token of the kind. Program (b, t, g): kind t, the g-th block of rows
    (h, q).
    """
    batch, kind, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.minimum(tl.load(lengths + batch), p_b)
    before, count = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, length, SCAN):
        token = start + tl.arange(0, SCAN)
        own = tl.load(ids + batch * i_b + token, mask=token < length, other=0).to(tl.int32)
        before += tl.sum(((own < kind) & (token < length)).to(tl.int32), 0)
    place = places + group.to(tl.int64) * p_g + batch * p_b + before
    for start in range(0, length, SCAN):
        token = start + tl.arange(0, SCAN)
        own = tl.load(ids + batch * i_b + token, mask=token < length, other=0).to(tl.int32)
        is_own = (own == kind) & (token < length)
        tl.store(place + count + tl.cumsum(is_own.to(tl.int32), 0) - 1, token, mask=is_own)
        count += tl.sum(is_own.to(tl.int32), 0)
    tl.debug_barrier()  # other threads of the program wrote some of what each reads
    row = group * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    live = row < rows
    top = tl.full((ROW_BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((ROW_BLOCK,), tl.float32)
    if count > 0:
        pair = tl.arange(0, HALF_PAD)
        inside = (pair < HALF)[:, None] & live[None, :]
        part = 1.0
        if DROPS:
            part = tl.load(unmasked + batch)
        s = tl.load(sigma + kind) / part
        factor = s * tl.rsqrt(s * s + epsilon)
        head = row // QUERIES
        q_at = q + batch * q_b + (head * q_h + row % QUERIES * q_q)[None, :] + pair[:, None]
        first = tl.load(q_at, mask=inside, other=0.0).to(tl.float32) * LOG2E
        second = tl.load(q_at + HALF, mask=inside, other=0.0).to(tl.float32) * LOG2E
        k_at = k + ((head * kinds + kind) * 2 * HALF)[None, :] + pair[:, None]
        const_at = k_const + (head * 2 * HALF)[None, :] + pair[:, None]
        k_first = factor * tl.load(k_at, mask=inside, other=0.0) + tl.load(const_at, mask=inside, other=0.0)
        k_second = factor * tl.load(k_at + HALF, mask=inside, other=0.0)
        k_second += tl.load(const_at + HALF, mask=inside, other=0.0)
        even = first * k_first + second * k_second
        odd = second * k_first - first * k_second
        for start in range(0, count, TILE):
            at = start + tl.arange(0, TILE)
            token = tl.load(place + at, mask=at < count, other=0)
            angle = (token * r_t)[:, None] + pair[None, :]
            cosine = tl.load(cos + angle, mask=(pair < HALF)[None, :], other=0.0)
            sine = tl.load(sin + angle, mask=(pair < HALF)[None, :], other=0.0)
            score = tl.dot(cosine, even, input_precision="tf32x3")
            score = tl.dot(sine, odd, score, input_precision="tf32x3")
            score = tl.where((at < count)[:, None], score, float("-inf"))
            highest = tl.maximum(top, tl.max(score, 0))
            mass = mass * tl.exp2(top - highest) + tl.sum(tl.exp2(score - highest[None, :]), 0)
            top = highest
    to = (batch * rows + row) * kinds + kind
    tl.store(part_max + to, top, mask=live)
    tl.store(part_sum + to, mass, mask=live)


@triton.jit(do_not_specialize=["kinds", "items"])
def token_values_kernel(
    part_max, part_sum, v, v_const, sigma, epsilon, unmasked, out, items, kinds,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, KINDS_PAD: tl.constexpr, DROPS: tl.constexpr,
    BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum_t p_t f_t v_t + v_const, p_t the share of kind t (`token_scores_kernel`); 0 without any token.

    Tables f32, out any float [B, H, Q, d]. Program (h, r, c): block r of items (b, q) of head h, c of channels.
    """
    head = tl.program_id(0)
    item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = item < items
    batch = (item // QUERIES).to(tl.int64)
    row = (batch * HEADS + head) * QUERIES + item % QUERIES
    kind, dim = tl.arange(0, KINDS_PAD), tl.program_id(2) * DIM_BLOCK + tl.arange(0, DIM_BLOCK)
    there = live[:, None] & (kind < kinds)[None, :]
    at = (row * kinds)[:, None] + kind[None, :]
    tops = tl.load(part_max + at, mask=there, other=float("-inf"))
    top = tl.max(tops, 1)
    has = top > float("-inf")
    mass = tl.load(part_sum + at, mask=there, other=0.0) * tl.exp2(tops - tl.where(has, top, 0.0)[:, None])
    s = tl.load(sigma + kind, mask=kind < kinds, other=0.0)[None, :]
    if DROPS:
        s = s / tl.load(unmasked + batch, mask=live, other=1.0)[:, None]
    weight = mass * (s * tl.rsqrt(s * s + epsilon)) / tl.where(has, tl.sum(mass, 1), 1.0)[:, None]
    inside = (kind < kinds)[:, None] & (dim < DIM)[None, :]
    values = tl.load(v + ((head * kinds + kind) * DIM)[:, None] + dim[None, :], mask=inside, other=0.0)
    constant = tl.load(v_const + head * DIM + dim, mask=dim < DIM, other=0.0)
    result = tl.dot(weight, values, input_precision="tf32x3")
    result += tl.where(has, 1.0, 0.0)[:, None] * constant[None, :]
    own = live[:, None] & (dim < DIM)[None, :]
    tl.store(out + (row * DIM)[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=own)


def attend(q: Tensor, ids: Tensor, tables: TokenTables, unmasked: Tensor, rope: Rope, lengths: Tensor) -> Tensor:
    """`token_layer.attend_tokens` in float32. A sequence of length 0 gets 0.

    Nothing is synchronized: safe in a CUDA graph.
    """
    batch, heads, queries, dim = q.shape
    kinds, rows = len(tables.sigma), heads * queries
    row_block = min(MOST_ROWS, padded(rows))
    groups = -(-rows // row_block)
    places = torch.empty((groups, *ids.shape), dtype=torch.int32, device=q.device)
    part_max, part_sum = torch.empty((2, batch, rows, kinds), dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        token_scores_kernel, (batch, kinds, groups),
        q, *q.stride()[:3], ids, ids.stride(0), lengths, tables.k, tables.k_const, tables.sigma, tables.epsilon,
        unmasked, rope.cos, rope.sin, rope.cos.stride(0), places, *places.stride()[:2], part_max, part_sum, kinds,
        rows,
        QUERIES=queries, HALF=dim // 2, HALF_PAD=padded(dim // 2), DROPS=tables.drops, SCAN=SCAN, TILE=TILE,
        ROW_BLOCK=row_block, num_stages=1,
    )  # fmt: skip
    launch(
        token_values_kernel, (heads, -(-batch * queries // ROW_BLOCK), -(-dim // DIM_BLOCK)),
        part_max, part_sum, tables.v, tables.v_const, tables.sigma, tables.epsilon, unmasked, out, batch * queries,
        kinds,
        HEADS=heads, QUERIES=queries, DIM=dim, KINDS_PAD=padded(kinds), DROPS=tables.drops, BLOCK=ROW_BLOCK,
        DIM_BLOCK=DIM_BLOCK, num_stages=1, num_warps=8 if kinds > MANY_KINDS else 4,
    )  # fmt: skip
    return out
