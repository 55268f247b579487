"""A layer that keeps the kind of each token alone: a first one, whose keys and values follow from the token."""

from __future__ import annotations

import torch
from torch import Tensor

from turboesm_kernels import cpu_compiled
from turboesm_kernels.available import has_triton
from turboesm_kernels.reference import Rope
from turboesm_kernels.token_tables import TokenTables


def attend_tokens(
    q: Tensor, ids: Tensor, tables: TokenTables, unmasked: Tensor, rope: Rope, lengths: Tensor | None = None
) -> Tensor:
    """Attention of q [B, H, Q, d] (scaled, after RoPE) over tokens of which only the kind is kept; result like q.

    ids uint8 or int16 [B, T] of tokens at positions 0.., unmasked float32 [B], rope [T' >= T, d], lengths int [B]
    or None. Softmax's weights are added up by kind. Where positions are not learned, a GPU does that in a kernel
    of its own (`token_kernels.py`), a CPU in compiled loops.
    """
    if tables.across is not None:
        return _attend_positions(q.to(tables.k.dtype), ids.long(), tables, lengths).to(q.dtype)
    if q.is_cuda and lengths is not None and has_triton() and ids.dtype == torch.uint8:
        from turboesm_kernels import token_kernels

        return token_kernels.attend(q, ids, tables, unmasked, rope, lengths)
    if cpu_compiled.attends_tokens(q, tables):
        return cpu_compiled.attend_tokens(q, ids, tables, unmasked, rope, lengths).to(q.dtype)
    return _attend_kinds(q.to(tables.k.dtype), ids, tables, tables.factors(unmasked), rope, lengths).to(q.dtype)


def _attend_kinds(
    q: Tensor, ids: Tensor, tables: TokenTables, factors: Tensor, rope: Rope, lengths: Tensor | None
) -> Tensor:
    """<q, R_j key> = <phases of the key's kind, the angles of j>: one row of phases is copied for each token."""
    (batch, heads, queries, dim), (tokens, kinds) = q.shape, (ids.shape[1], factors.shape[1])
    keys = factors[:, None, :, None] * tables.k + tables.k_const[:, None]  # [B, H, N, d]
    (first, second), (k_first, k_second) = q[:, :, :, None].chunk(2, -1), keys[:, :, None].chunk(2, -1)
    phases = torch.cat((first * k_first + second * k_second, second * k_first - first * k_second), -1)
    table = phases.permute(0, 3, 1, 2, 4).reshape(batch * kinds, heads * queries * dim)
    index = ids.long()
    rows = table[(index + kinds * torch.arange(batch, device=q.device)[:, None]).flatten()]
    angles = rope.half.mT[:tokens].to(q.dtype)
    found = (rows.view(batch, tokens, heads * queries, dim) * angles[:, None]).sum(-1)
    found = found.mT.unflatten(1, (heads, queries))
    if lengths is not None:
        beyond = torch.arange(tokens, device=q.device) >= lengths[:, None, None, None]
        found = found.masked_fill(beyond, -torch.inf)
    weights = found.softmax(-1)
    by_kind = _by_kind(weights, index, kinds)
    return (by_kind * factors[:, None, None]) @ tables.v + tables.v_const[:, None]


def _attend_positions(q: Tensor, ids: Tensor, tables: TokenTables, lengths: Tensor | None) -> Tensor:
    """<q, key> = f (<q, k_t> + <q, k_at_p>) + <q, k_const>: products with tables, of which each token picks two.

    ids int64 [B, T]; no RoPE: positions are learned.
    """
    assert tables.k_at is not None and tables.v_at is not None
    ids = ids[:, : tables.k_at.shape[1]]  # buffers may be longer than there are positions, sequences are not
    tokens = ids.shape[1]
    picked = ids[:, None, None].expand(*q.shape[:3], tokens)
    factor = tables.factors_of(ids, q.new_ones(len(q)))[:, None, None]
    found = (q @ tables.k.mT).gather(-1, picked) + q @ tables.k_at[:, :tokens].mT
    found = found * factor + (q * tables.k_const[:, None]).sum(-1, keepdim=True)
    if lengths is not None:
        beyond = torch.arange(tokens, device=q.device) >= lengths[:, None, None, None]
        found = found.masked_fill(beyond, -torch.inf)
    weights = found.softmax(-1) * factor
    by_kind = _by_kind(weights, ids, tables.k.shape[1])
    return by_kind @ tables.v + weights @ tables.v_at[:, :tokens] + tables.v_const[:, None]


ONE_HOT = 64
"""Kinds that a GPU adds up at once."""


def _by_kind(weights: Tensor, ids: Tensor, kinds: int) -> Tensor:
    """Sums [B, H, Q, N] of weights [B, H, Q, T] over tokens of each kind, ids int64 [B, T].

    On a GPU as products with ones and zeros: scatter_add would add up in any order there, and round differently.
    """
    if not weights.is_cuda:
        picked = ids[:, None, None].expand(weights.shape)
        return weights.new_zeros((*weights.shape[:3], kinds)).scatter_add_(-1, picked, weights)
    parts = []
    for start in range(0, kinds, ONE_HOT):
        own = torch.arange(start, min(start + ONE_HOT, kinds), device=ids.device)
        parts.append(weights.flatten(1, 2) @ (ids[:, :, None] == own).to(weights.dtype))
    return torch.cat(parts, -1).view(*weights.shape[:3], kinds)
