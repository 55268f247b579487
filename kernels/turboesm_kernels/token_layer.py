"""A layer that keeps the kind of each token alone: ESM-2's first, whose keys and values follow from the token."""

from __future__ import annotations

import torch
from torch import Tensor

from turboesm_kernels.available import has_triton
from turboesm_kernels.reference import Rope
from turboesm_kernels.token_tables import TokenTables


def attend_tokens(
    q: Tensor, ids: Tensor, tables: TokenTables, unmasked: Tensor, rope: Rope, lengths: Tensor | None = None
) -> Tensor:
    """Attention of q [B, H, Q, d] (scaled, after RoPE) over tokens of which only the kind is kept; result like q.

    ids uint8 [B, T] of tokens at positions 0.., unmasked float32 [B], rope [T' >= T, d], lengths int [B] or None.
    Softmax's weights are added up by kind. A GPU does that in a kernel of its own (`token_kernels.py`).
    """
    if q.is_cuda and q.shape[2] == 1 and lengths is not None and has_triton():
        from turboesm_kernels import token_kernels

        return token_kernels.attend(q, ids, tables, unmasked, rope, lengths)
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
    by_kind = weights.new_zeros((batch, heads, queries, kinds))
    by_kind.scatter_add_(-1, index[:, None, None].expand(weights.shape), weights)
    return (by_kind * factors[:, None, None]) @ tables.v + tables.v_const[:, None]
