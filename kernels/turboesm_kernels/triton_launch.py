"""Launches of the portable kernels in `triton_kernels`: grid, strides, buffers for the partial results."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turboesm_kernels.launch import early_launch, is_roomy, launch, processors
from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.prepared import PreparedSide, dims_at_once, padded
from turboesm_kernels.reference import Packed
from turboesm_kernels.triton_kernels import (
    attend_split_kernel,
    combine_kernel,
    position_scores_kernel,
    project_query_kernel,
)

ROW_BLOCK = 16
FOLD_TOKENS = 64
FEW_ROWS = 40
"""Rows and heads up to which `combine` takes them one by one: latency counts, not what is read twice."""

FINISH_TILE, SPLIT_BLOCK = 8192, 64
"""Partial results that a program of `combine` holds at once, and ranges that they are of, at most."""

EARLY_MAP = 8192
"""Numbers of a head's value map up to which `combine` reads it before it waits for the ranges."""

CODES_AT_ONCE = 4096
"""Codes that a program takes apart at once, on a GPU."""

WAVES = 8
"""Programs a multiprocessor is given before ranges of tokens are made longer instead of more."""


@dataclass(frozen=True)
class Partials:
    """What ranges of tokens leave for `combine`: top and mass f32 [N], out f32 [N, A].

    weight f32 [N], from the fast path alone: the mass of its rounded weights, the values' scales in them. There is
    one range of each of the first `whole` rows (b, h, q), then `splits` of each of the others.
    """

    top: Tensor
    mass: Tensor
    out: Tensor
    splits: int
    whole: int = 0
    weight: Tensor | None = None

    @classmethod
    def empty(cls, q: Tensor, splits: int, axes: int, weighted: bool = False, whole: int = 0) -> Partials:
        """Buffers for the query q [B, H, Q, d]."""
        count = whole + (q.shape[:3].numel() - whole) * splits
        top, mass, weight = torch.empty((3, count), dtype=torch.float32, device=q.device)
        out = torch.empty((count, axes), dtype=torch.float32, device=q.device)
        return cls(top, mass, out, splits, whole, weight if weighted else None)


def attend(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    """`dispatch.attend` with the portable kernels; the inputs are validated already."""
    folded, bias = project_query(q, held, layer)
    # The interpreter pays by the operation, a GPU by the register.
    block = max(16, CODES_AT_ONCE // padded(layer.k.axes)) if q.is_cuda else 256
    chunk = chunk_of(q, held.tokens, block)
    partials = Partials.empty(q, -(-held.tokens // chunk), layer.v.axes)
    if held.tokens:
        _split(q, held, layer, folded, bias, partials, chunk, block)
    return combine(q, held, layer, partials)


def chunk_of(q: Tensor, tokens: int, block: int) -> int:
    """Tokens a program goes over: enough programs to fill the device, whole blocks, no more than needed."""
    wanted = max(1, WAVES * processors(q) // (q.shape[0] * q.shape[1]))
    blocks = -(-max(tokens, 1) // block)
    return -(-blocks // min(wanted, blocks)) * block


def project_query(q: Tensor, held: Held, layer: PreparedLayer) -> tuple[Tensor, Tensor | None]:
    """Queries f32 [B, H, Q, A] and the centre's scores f32 [B, H, Q, T] or None; see `project_query_kernel`."""
    batch, heads, queries, dim = q.shape
    folded = torch.empty((batch, heads, queries, layer.k.axes), dtype=torch.float32, device=q.device)
    bias, rope, positioned = None, held.rope, layer.k.spec.centre_at is not None
    if positioned:
        bias = position_scores(q, held, layer)
    elif layer.k.centred:
        bias = torch.empty((batch, heads, queries, held.tokens), dtype=torch.float32, device=q.device)
    cos, sin = (rope.cos, rope.sin) if bias is not None and rope is not None else (folded, folded)
    rows = batch * queries
    blocks = -(-held.tokens // FOLD_TOKENS) if bias is not None and not positioned else 0
    launch(
        project_query_kernel, (heads, -(-rows // ROW_BLOCK), 1 + blocks),
        q, *q.stride(), layer.k.map, layer.k.centre, cos, sin, cos.stride(-2), cos.stride(-1),
        folded, folded if bias is None else bias, rows, held.tokens,
        HEADS=heads, QUERIES=queries, DIM=dim, AXES=layer.k.axes,
        DIM_PAD=padded(dim), AXES_PAD=padded(layer.k.axes), HALF_PAD=padded(dim // 2),
        ROW_BLOCK=ROW_BLOCK, TOKEN_BLOCK=FOLD_TOKENS, DIM_BLOCK=dims_at_once(dim, is_roomy(q)),
    )  # fmt: skip
    return folded, bias


def position_blocks(rows: int) -> tuple[int, int]:
    """Rows and tokens of a tile of positions' scores: the fastest of eight, on an H100."""
    return (ROW_BLOCK, 128) if rows <= ROW_BLOCK else (64, 64)


def empty_scores(q: Tensor, tokens: int, align: int = 1) -> Tensor:
    """A buffer f32 [B, H, Q, T], whose rows start at multiples of `align` numbers."""
    room = -(-tokens // align) * align
    return torch.empty((*q.shape[:3], room), dtype=torch.float32, device=q.device)[..., :tokens]


def position_scores(q: Tensor, held: Held, layer: PreparedLayer, early: bool = False, align: int = 1) -> Tensor:
    """Scores f32 [B, H, Q, T] of the centres at each position; see `position_scores_kernel`, `empty_scores`."""
    batch, heads, queries, dim = q.shape
    centre_at, rows = layer.k.spec.centre_at, batch * queries
    assert centre_at is not None
    bias = empty_scores(q, held.tokens, align)
    row_block, token_block = position_blocks(rows)
    launch(
        position_scores_kernel, (heads, -(-rows // row_block), -(-held.tokens // token_block)),
        q, *q.stride(), layer.k.centre, centre_at, centre_at.shape[1], held.sinks, bias, bias.stride(2), rows,
        held.tokens,
        HEADS=heads, QUERIES=queries, DIM=dim, DIM_PAD=padded(dim), EXACT=q.dtype.itemsize == 2,
        ROW_BLOCK=row_block, TOKEN_BLOCK=token_block, EARLY=early, **early_launch(early),
    )  # fmt: skip
    return bias


def _split(
    q: Tensor,
    held: Held,
    layer: PreparedLayer,
    folded: Tensor,
    bias: Tensor | None,
    partials: Partials,
    chunk: int,
    block: int,
) -> None:
    batch, heads, queries, _ = q.shape
    k, v = layer.k, layer.v
    launch(
        attend_split_kernel, (batch * heads, partials.splits),
        folded, folded if bias is None else bias, folded if held.lengths is None else held.lengths,
        held.k.codes, *held.k.codes.stride(), *_scales(held.k), k.pieces, k.start, _levels(k),
        held.v.codes, *held.v.codes.stride(), *_scales(held.v), v.pieces, v.start, _levels(v),
        partials.top, partials.mass, partials.out, held.tokens, chunk, held.sinks,
        HEADS=heads, QUERIES=queries, QUERY_PAD=1 if queries == 1 else padded(queries), BLOCK=block,
        K_AXES=k.axes, K_PAD=padded(k.axes), K_PIECES=k.pieces.shape[1], K_TABLE=_table_size(k),
        V_AXES=v.axes, V_PAD=padded(v.axes), V_PIECES=v.pieces.shape[1], V_TABLE=_table_size(v),
        HAS_BIAS=bias is not None, HAS_LENGTHS=held.lengths is not None,
        K_SCALED=held.k.scales is not None, V_SCALED=held.v.scales is not None,
    )  # fmt: skip


def _levels(side: PreparedSide) -> Tensor:
    """Levels by two numbers of each axis, or where they are on no grid a table."""
    return side.table if side.line is None else side.line


def _table_size(side: PreparedSide) -> int:
    """Entries of a head's table; 0 where there is none."""
    return side.table.shape[1] if side.line is None else 0


def _scales(packed: Packed) -> tuple[Tensor | int, ...]:
    """Scales and strides; where there are none, something that is never read."""
    if packed.scales is None:
        return packed.codes, 0, 0, 0
    return packed.scales, *packed.scales.stride()


def combine(
    q: Tensor,
    held: Held,
    layer: PreparedLayer,
    partials: Partials,
    early: bool = False,
) -> Tensor:
    """Attention [B, H, Q, d] of partial results; see `combine_kernel`."""
    batch, heads, queries, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sink_k, sink_v = (q, q) if held.sink_k is None or held.sink_v is None else (held.sink_k, held.sink_v)
    rows, axes = batch * queries, partials.out.shape[-1]
    weighted = partials.weight is not None and layer.v.fields is not None
    value_map, offset = layer.v.map, layer.v.centre
    if weighted:
        assert layer.v.fields is not None
        value_map, offset = layer.v.fields.map, layer.v.fields.offset
    row_block = 1 if rows * heads <= FEW_ROWS else ROW_BLOCK
    axes_block = 64 if axes % 64 == 0 or axes % 64 > 32 else min(32, padded(axes))
    blocks = -(-axes // axes_block)
    held_at_once = FINISH_TILE // (row_block * padded(blocks * axes_block))
    split_block = max(1, min(padded(max(partials.splits, 1), 1), held_at_once, SPLIT_BLOCK))
    launch(
        combine_kernel, (heads, -(-rows // row_block)),
        partials.top, partials.mass, partials.weight if weighted else partials.mass, partials.out,
        q, *q.stride(), q if held.lengths is None else held.lengths,
        sink_k, *sink_k.stride(), sink_v, *sink_v.stride(), value_map, offset, layer.v.centre, out,
        rows, partials.splits, axes, partials.whole,
        HEADS=heads, QUERIES=queries, DIM=dim, AXES_STEP=math.gcd(axes, 4),
        DIM_PAD=padded(dim), AXES_BLOCK=axes_block, AXES_BLOCKS=blocks, MAP_EARLY=axes * dim <= EARLY_MAP,
        SPLIT_BLOCK=split_block, SINKS=held.sinks, ROW_BLOCK=row_block, HAS_LENGTHS=held.lengths is not None,
        HAS_WEIGHT=weighted, EARLY=early, num_warps=4 if axes <= 128 else 8, **early_launch(early),
    )  # fmt: skip
    return out
