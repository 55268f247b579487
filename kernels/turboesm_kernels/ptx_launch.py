"""Launches of the fast kernels in `ptx_kernels`, and what they ask of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from turboesm_kernels import grouped_launch, ptx_kernels, ptx_text, triton_launch
from turboesm_kernels.launch import early_launch, is_roomy, launch, launches_early, processors
from turboesm_kernels.layout import ROOM, TILE, WIDE
from turboesm_kernels.operands import Held, Joint, PreparedLayer
from turboesm_kernels.pack import STEP_ROWS, Target, warps_for
from turboesm_kernels.prepared import FIELD_LANES, Fields, dims_at_once, padded
from turboesm_kernels.reference import PAIRED, TURN, Packed, Rope
from turboesm_kernels.step_kernels import append_and_project_kernel
from turboesm_kernels.triton_launch import Partials

ALIGNMENT = 16
"""Bytes that a lane reads at once."""

MAX_FIELDS = 48
"""Of a side: sums of values take two registers a field."""

WARPS = 12
"""Warps that a multiprocessor runs at once: of 168 registers, as with 3 bits of head_dim 64. With 128 it is 8."""

OPENING = 3
"""What beginning and ending a range costs, in blocks."""

SCORES = 4
"""Numbers that a lane reads at once of positions' scores."""

ONE_WORD = ptx_text.Side((1,))
"""A plane of 16 bytes a lane: 4 numbers."""

LONGEST = 256
"""Blocks of a range at most: 32,768 tokens of weight 255 and byte 255 are what 32 bits hold."""

LARGEST_STRIDE = 1 << 29
"""Bytes from one word of all tokens to the next, at most: offsets within are 32-bit numbers."""


def unserved_reason(layer: PreparedLayer) -> str | None:
    """Why the fast path does not serve a layer's codec, or None."""
    if layer.k.fields is None or layer.v.fields is None:
        return "it needs codes on a uniform grid, in words of 4 lanes"
    if max(layer.k.fields.count, layer.v.fields.count) > MAX_FIELDS:
        return f"a code has more than {MAX_FIELDS} fields"
    if "none" in (layer.k.spec.scale, layer.v.spec.scale):
        return "it needs a scale for each token"
    return None


def unsupported_reason(q: Tensor, held: Held, layer: PreparedLayer) -> str | None:
    """Why the fast path cannot run on these inputs, or None."""
    if reason := unserved_reason(layer):
        return reason
    if not held.v.tiled:
        return "values must lie in tiles"
    if _turned(layer) and held.rope is not None and not _aligned_angles(held.rope):
        return "RoPE's angles must be dense float32, at multiples of 16 bytes"
    if held.tokens == 0:
        return "there are no packed tokens"
    tiles = (ptx_text.TILE_BYTES, TILE, 1)
    return _misaligned("keys", held.k, (FIELD_LANES, 1)) or _misaligned("values", held.v, tiles)


def _misaligned(name: str, packed: Packed, within: tuple[int, ...]) -> str | None:
    """`within`: strides of what a word's tokens are made of."""
    codes, scales = packed.codes, packed.scales
    assert scales is not None
    dense = codes.stride()[3:] == within and scales.stride(2) == 1
    steps = (codes.data_ptr(), *codes.stride()[:3])
    words = (scales.data_ptr(), *scales.stride()[:2])
    if codes.stride(2) >= LARGEST_STRIDE:
        return f"words of packed {name} lie {LARGEST_STRIDE} bytes apart or more"
    if packed.tiled and codes.stride(2) % (WIDE * ROOM):
        return f"there must be room for a multiple of {ROOM} packed {name}"
    if dense and not any(s % ALIGNMENT for s in steps) and not any(s % FIELD_LANES for s in words):
        return None
    return f"packed {name} must have dense tokens, at addresses and strides that are multiples of {ALIGNMENT}"


def _aligned_angles(rope: Rope) -> bool:
    return (
        all(
            x.dtype == torch.float32
            and x.stride(1) == 1
            and x.stride(0) % 4 == 0
            and x.data_ptr() % ALIGNMENT == 0
            for x in (rope.cos, rope.sin)
        )
        and rope.cos.stride() == rope.sin.stride()
    )


def _turned(layer: PreparedLayer) -> bool:
    """Whether the keys' centre is turned to each position, rather than one of its own there."""
    return layer.k.centred and layer.k.spec.centre_at is None


def _angles(held: Held, layer: PreparedLayer, grouped: bool) -> tuple[Tensor | int, ...]:
    """Turns, a block's turn, cosines, sines, floats between their rows, rows.

    Where keys have no centre that is turned, something that is never read.
    """
    rope = held.rope
    if rope is None or not _turned(layer):
        return (layer.k.centre,) * 4 + (0, 0)
    turns = rope.group_turns if grouped else rope.turns
    return turns, rope.block_turn, rope.cos, rope.sin, rope.cos.stride(0), rope.cos.shape[0]


def can_group(q: Tensor, layer: PreparedLayer) -> bool:
    """Whether one product serves four of a head's queries (`grouped_kernels`) where there is work enough."""
    k, v = layer.k.fields, layer.v.fields
    assert k is not None and v is not None
    return layer.k.spec.centre_at is None and grouped_launch.serves(k, v, q.shape[2])


def _groups(q: Tensor, held: Held, layer: PreparedLayer) -> bool:
    """Whether that is faster."""
    return can_group(q, layer) and grouped_launch.pays(q, held.tokens)


@dataclass(frozen=True)
class Folded:
    """Of `fast_project_query_kernel`: descriptors int32 [B, H, Q, 2, W], scalars f32 [B, H, Q, 2]."""

    descriptors: Tensor
    scalars: Tensor

    @classmethod
    def empty(cls, q: Tensor, fields: Fields) -> Folded:
        """Buffers for queries [B, H, Q, d]."""
        shape = (*q.shape[:3], 2, fields.map.shape[2] // FIELD_LANES)
        return cls(
            torch.empty(shape, dtype=torch.int32, device=q.device),
            torch.empty(shape[:4], dtype=torch.float32, device=q.device),
        )

    @property
    def words(self) -> int:
        """W."""
        return self.descriptors.shape[4]


def _make_ready(held: Held, layer: PreparedLayer, grouped: bool) -> None:
    """Make what is missing of what the kernels read before they wait: they do not wait for what comes later."""
    assert layer.k.fields is not None and layer.v.fields is not None
    _ = _angles(held, layer, grouped), layer.k.fields.halves
    if grouped:
        _ = layer.k.fields.of_keys, layer.v.fields.of_values


def attend(
    q: Tensor,
    held: Held,
    layer: PreparedLayer,
    chunk: int | None = None,
    grouped: bool | None = None,
    whole: int = 0,
) -> Tensor:
    """`dispatch.attend` with the fast kernels; `unsupported_reason` was None for these inputs.

    `chunk`: tokens that a warp goes over, a multiple of `TURN`, `LONGEST` of them at most. `grouped`: whether one
    product serves four queries, where `can_group`. None: what suits the device.
    """
    assert layer.k.fields is not None
    early, grouped = launches_early(q), _groups(q, held, layer) if grouped is None else grouped
    _make_ready(held, layer, grouped)
    positioned = layer.k.spec.centre_at is not None
    bias = triton_launch.position_scores(q, held, layer, early, SCORES) if positioned else None
    folded = project_query(q, layer, layer.k.fields, early)
    return attend_projected(q, held, layer, folded, bias, chunk, early, grouped, whole)


def append_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    layer: PreparedLayer,
    starts: Tensor,
    chunk: int | None = None,
    grouped: bool | None = None,
    whole: int = 0,
    joint: Joint | None = None,
) -> Tensor:
    """`pack` of each sequence's newest token, then `attend`: what comes before codes are read is one launch.

    Where q, k and v are a projection's (`Joint.sides`), they are turned in that launch, too.
    """
    assert layer.k.fields is not None
    early, grouped = launches_early(q), _groups(q, held, layer) if grouped is None else grouped
    _make_ready(held, layer, grouped)
    batch, heads, queries, dim = q.shape
    rows, positioned = batch * queries, layer.k.spec.centre_at is not None
    folded = Folded.empty(q, layer.k.fields)
    bias = triton_launch.empty_scores(q, held.tokens, SCORES) if positioned else None
    target = Target.of(layer, held, turns=joint is not None)
    fold_block = _fold_block(rows, heads)
    row_block, token_block = triton_launch.position_blocks(rows if positioned else 1)  # else one kernel serves all
    turned, parts, part_stride, scaling = q, 0, 0, 1.0
    if joint is not None:
        turned = torch.empty(q.shape, dtype=joint.dtype, device=q.device)
        parts, part_stride, scaling = joint.parts, joint.product.stride(0), joint.scaling
    groups = max(-(-batch // STEP_ROWS), -(-rows // fold_block))  # rows of a tile are no fewer
    launch(
        append_and_project_kernel, (heads, groups, 3 + positioned * -(-held.tokens // token_block)),
        *target.given(k, v, starts), q, *q.stride(), part_stride, turned, scaling,
        *layer.k.fields.halves, layer.k.fields.middle, folded.descriptors, folded.scalars, rows, folded.words,
        *_scores(folded, bias), held.tokens,
        **target.constants, HAS_STARTS=True, ONE_TOKEN=True, BLOCK=STEP_ROWS, QUERIES=queries,
        FOLD_PAD=padded(folded.words), FOLD_BLOCK=fold_block, PARTS=parts, EXACT=q.dtype.itemsize == 2,
        ROW_BLOCK=row_block, TOKEN_BLOCK=token_block, EARLY=early, num_warps=warps_for(dim), **early_launch(early),
    )  # fmt: skip
    return attend_projected(turned, held, layer, folded, bias, chunk, early, grouped, whole, joint is not None)


def _scores(folded: Folded, bias: Tensor | None) -> tuple[Tensor, int]:
    """Positions' scores, and numbers between their rows; where there are none, something that is never read."""
    return (folded.scalars, 0) if bias is None else (bias, bias.stride(2))


def attend_projected(
    q: Tensor,
    held: Held,
    layer: PreparedLayer,
    folded: Folded,
    bias: Tensor | None,
    chunk: int | None,
    early: bool,
    grouped: bool,
    whole: int,
    fresh: bool = False,
) -> Tensor:
    """Attention, given what was made of the queries; `fresh`: by the kernel before, which made them, too."""
    assert layer.v.fields is not None and (not grouped or can_group(q, layer))
    if chunk is None:
        chunk, whole = ranges_of(q, held.tokens, grouped)
    assert whole == 0 or (chunk > TURN and not grouped)
    axes = layer.v.fields.map.shape[1]
    partials = Partials.empty(q, -(-held.tokens // chunk), axes, weighted=True, whole=whole)
    if grouped:
        projected, angles = (folded.descriptors, folded.scalars), _angles(held, layer, grouped)
        grouped_launch.split(q, held, layer, projected, angles, partials, chunk, fresh, early)
    else:
        _split(q, held, layer, folded, bias, partials, chunk, fresh, early)
    return triton_launch.combine(q, held, layer, partials, early)


def ranges_of(q: Tensor, tokens: int, grouped: bool) -> tuple[int, int]:
    """Tokens that a warp goes over, in whole blocks, and how many rows before are gone over each by one warp."""
    rows, warps = q.shape[:3].numel(), WARPS
    if grouped:
        rows, warps = q.shape[:2].numel() * grouped_launch.groups(q.shape[2]), grouped_launch.WARPS
    each, whole = _ranges(rows, -(-tokens // TURN), warps * processors(q), grouped)
    return TURN * each, whole


@lru_cache(maxsize=1024)
def _ranges(rows: int, blocks: int, slots: int, alike: bool) -> tuple[int, int]:
    """Blocks of a range of the rows that are divided and how many rows are not, which come first; `alike`: none.

    So that `slots` warps at a time have the least to do one after another.
    """
    found = []
    for waves in range(1 if alike or blocks > LONGEST else 1 + rows // slots):
        left = rows - waves * slots
        for splits in range(-(-blocks // LONGEST), blocks + 1):
            each = -(-blocks // splits)
            if waves and (left == 0 or each == 1):
                continue
            time = waves * (blocks + OPENING) + -(-left * -(-blocks // each) // slots) * (each + OPENING)
            found.append((time, waves, each))
    _, waves, each = min(found)
    return each, waves * slots


def project_query(q: Tensor, layer: PreparedLayer, fields: Fields, early: bool) -> Folded:
    """Queries as integers; see `fast_project_query_kernel`."""
    batch, heads, queries, dim = q.shape
    rows, found = batch * queries, Folded.empty(q, fields)
    fold_block = _fold_block(rows, heads)
    launch(
        ptx_kernels.fast_project_query_kernel, (heads, -(-rows // fold_block)),
        q, *q.stride(), *fields.halves, fields.middle,
        found.descriptors, found.scalars, rows, found.words, HEADS=heads, QUERIES=queries, DIM=dim,
        WORDS_PAD=padded(found.words), DIM_PAD=padded(dim), FOLD_BLOCK=fold_block,
        DIM_BLOCK=dims_at_once(dim, is_roomy(q)), EARLY=early, num_warps=warps_for(dim),
        **early_launch(early),
    )  # fmt: skip
    return found


def _fold_block(rows: int, heads: int) -> int:
    """Rows that a program folds: one by one where they are few, as in `combine`."""
    return 1 if rows * heads <= triton_launch.FEW_ROWS else 16


def _split(
    q: Tensor,
    held: Held,
    layer: PreparedLayer,
    folded: Folded,
    bias: Tensor | None,
    partials: Partials,
    chunk: int,
    fresh: bool,
    early: bool,
) -> None:
    batch, heads, queries, dim = q.shape
    whole, splits = partials.whole, partials.splits
    divided = batch * heads * queries - whole
    k, v, k_fields, v_fields = held.k, held.v, layer.k.fields, layer.v.fields
    assert k.scales is not None and v.scales is not None and k_fields is not None and v_fields is not None
    launch(
        ptx_kernels.fast_attend_split_kernel, (whole + divided * splits,),
        q, *q.stride(), layer.k.centre,
        folded.descriptors, folded.scalars, *_angles(held, layer, False),
        q if held.lengths is None else held.lengths,
        k.codes, *k.codes.stride()[:3], k.scales, *k.scales.stride()[:2],
        v.codes, *v.codes.stride()[:3], v.scales, *v.scales.stride()[:2], k_fields.masks, v_fields.masks,
        partials.top, partials.mass, partials.weight, partials.out, held.tokens, chunk, whole, divided, splits,
        held.sinks, *_scores(folded, bias), int(fresh),
        HEADS=heads, QUERIES=queries, DIM=dim, K_WORDS=k.codes.shape[2], V_WORDS=v.codes.shape[2],
        HAS_BIAS=_turned(layer), HAS_POSITIONS=bias is not None, HAS_LENGTHS=held.lengths is not None,
        ONE_BLOCK=chunk == TURN,
        **kernel_code(dim, k_fields.shape, v_fields.shape, _turned(layer), chunk == TURN),
        EARLY=early, num_warps=1, **early_launch(early),
    )  # fmt: skip


@lru_cache(maxsize=256)
def kernel_code(
    dim: int, keys: tuple[int, ...], values: tuple[int, ...], centred: bool, one_block: bool
) -> dict[str, str | int]:
    """The PTX of the kernel for fields of these shapes, the kinds of its operands, and sizes, by its names."""
    k, v = ptx_text.Side(keys), ptx_text.Side(values)
    paired_dim = -(-dim // PAIRED) * PAIRED
    at = ptx_text.Shared(paired_dim, k, v, one_block, centred)
    code = {
        "OPEN": (ptx_text.open_code(at), ptx_text.OPEN_KINDS),
        "ROW": (ptx_text.row_code(at), ptx_text.ROW_KINDS),
        "WAIT": (ptx_text.wait_code(), ptx_text.WAIT_KINDS),
        "ANGLES": (ptx_text.angles_code(paired_dim), ptx_text.angles_constraints(paired_dim)),
        "TURN": (ptx_text.turn_code(at), ptx_text.turn_constraints(at)),
        "KEYS": (ptx_text.load_code(k), ptx_text.load_constraints(k)),
        "VALUES": (ptx_text.load_code(v, tiled=True), ptx_text.load_constraints(v)),
        "SCORE": (ptx_text.score_code(at), ptx_text.score_constraints(at)),
        "SUM": (ptx_text.sum_code(at), ptx_text.sum_constraints(at)),
        "EMPTY": (ptx_text.empty_code(at), ptx_text.empty_constraints(v)),
        "EMIT": (ptx_text.emit_code(at), ptx_text.emit_constraints(v)),
        "BIAS": (ptx_text.bias_code(at), ptx_text.bias_constraints(at)),
        "FOUR": (ptx_text.load_code(ONE_WORD), ptx_text.load_constraints(ONE_WORD)),
    }
    texts = {f"{name}_CODE": text for name, (text, _) in code.items()}
    kinds = {f"{name}_KINDS": own for name, (_, own) in code.items()}
    sizes = {
        "PAIRED_DIM": paired_dim,
        "K_TABLE": k.table, "V_TABLE": v.table, "V_ROWS": 8 * len(v.pairs), "SUMS": ptx_text.accumulators(v),
        "QUERY": at.query, "K_MASKS": at.k_masks, "V_MASKS": at.v_masks, "DIGIT_ROW": ptx_text.DIGIT_ROW,
    }  # fmt: skip
    return {**sizes, **texts, **kinds}
