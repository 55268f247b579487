"""The launch of the kernel for grouped queries in `grouped_kernels`, and which codes it serves."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from turboesm_kernels import grouped_text, ptx_text
from turboesm_kernels.grouped_kernels import fast_attend_group_kernel
from turboesm_kernels.grouped_text import KEY_WORDS, QUERIES, VALUE_WORDS, GroupShared, Slots, slots_of
from turboesm_kernels.launch import early_launch, launch, processors
from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.prepared import Fields
from turboesm_kernels.reference import PAIRED, TURN
from turboesm_kernels.triton_launch import Partials

WARPS = 8
"""Warps that a multiprocessor runs at once: of up to 255 registers."""

ALONE = 2.6
"""Ranges of single queries that take as long as one of a group (64 x 4096, 8 heads of 128, 3 bits, on an H100)."""

LARGEST_DIM = 128
"""Of a head: with more the centre's coefficients leave no registers."""

LARGEST = 184
"""Registers of codes and sums at most, of 255: with 168 of them and a centre some numbers are spilled already."""


def serves(k: Fields, v: Fields, queries: int) -> bool:
    """Whether the kernel is for codes of these fields and so many queries of a head: nearly full groups."""
    dim, slots = k.map.shape[1], _slots(k.shape, v.shape)
    fits = dim <= LARGEST_DIM and grouped_text.registers(*slots) <= LARGEST
    return fits and queries >= ALONE * groups(queries)


def pays(q: Tensor, tokens: int) -> bool:
    """Whether it is faster than each query [B, H, Q, d] apart: room for `tokens` is work for all warps, twice."""
    batch, heads, queries, _ = q.shape
    blocks = batch * heads * groups(queries) * -(-tokens // TURN)
    return blocks >= 2 * WARPS * processors(q)


def groups(queries: int) -> int:
    """Groups of a head's queries."""
    return -(-queries // QUERIES)


def split(
    q: Tensor,
    held: Held,
    layer: PreparedLayer,
    projected: tuple[Tensor, Tensor],
    angles: tuple[Tensor | int, ...],
    partials: Partials,
    chunk: int,
    fresh: bool,
    early: bool,
) -> None:
    """Launch the kernel: `projected` as `project_query` leaves queries, `angles` those it takes."""
    batch, heads, queries, dim = q.shape
    k, v, k_fields, v_fields = held.k, held.v, layer.k.fields, layer.v.fields
    assert k.scales is not None and v.scales is not None and k_fields is not None and v_fields is not None
    (k_masks, places), (v_masks, _) = k_fields.of_keys, v_fields.of_values
    centred = layer.k.centred
    launch(
        fast_attend_group_kernel, (batch * heads * groups(queries), partials.splits),
        q, *q.stride(), layer.k.centre, *projected, places, *angles, q if held.lengths is None else held.lengths,
        k.codes, *k.codes.stride()[:3], k.scales, *k.scales.stride()[:2],
        v.codes, *v.codes.stride()[:3], v.scales, *v.scales.stride()[:2], k_masks, v_masks,
        partials.top, partials.mass, partials.weight, partials.out, held.tokens, chunk, held.sinks, int(fresh),
        HEADS=heads, QUERIES=queries, DIM=dim, HAS_BIAS=centred, HAS_LENGTHS=held.lengths is not None,
        K_TABLE=projected[0].shape[4], V_ROWS=partials.out.shape[1],
        **kernel_code(dim, k_fields.shape, v_fields.shape, centred),
        EARLY=early, num_warps=1, **early_launch(early),
    )  # fmt: skip


def _slots(keys: tuple[int, ...], values: tuple[int, ...]) -> tuple[Slots, Slots]:
    return slots_of(keys, KEY_WORDS), slots_of(values, VALUE_WORDS)


@lru_cache(maxsize=256)
def kernel_code(dim: int, keys: tuple[int, ...], values: tuple[int, ...], centred: bool) -> dict[str, str | int]:
    """The PTX of the kernel for fields of these shapes, the kinds of its operands, and sizes, by its names."""
    k, v = _slots(keys, values)
    paired_dim = -(-dim // PAIRED) * PAIRED
    at = GroupShared(paired_dim, k, v, centred)
    k_count, v_count = 16 * k.groups, 8 * v.groups
    code = {
        "OPEN": (grouped_text.open_code(at), grouped_text.OPEN_KINDS),
        "ROW": (grouped_text.row_code(at), grouped_text.ROW_KINDS),
        "ANGLES": (ptx_text.angles_code(paired_dim), ptx_text.angles_constraints(paired_dim)),
        "TURN": (ptx_text.turn_code(at), ptx_text.turn_constraints(at)),
        "KEYS": (grouped_text.keys_code(at), grouped_text.loads_constraints(k_count)),
        "VALUES": (grouped_text.values_code(at), grouped_text.loads_constraints(v_count)),
        "SCORE": (grouped_text.score_code(at), grouped_text.score_constraints(at)),
        "PUT": (grouped_text.put_code(), grouped_text.PUT_KINDS),
        "SUM": (grouped_text.sum_code(at), grouped_text.sum_constraints(at)),
        "EMPTY": (grouped_text.empty_code(at), grouped_text.empty_constraints(at)),
        "EMIT": (grouped_text.emit_code(at), grouped_text.emit_constraints(at)),
        "BIAS": (grouped_text.bias_code(at), grouped_text.BIAS_KINDS),
    }
    texts = {f"{name}_CODE": text for name, (text, _) in code.items()}
    kinds = {f"{name}_KINDS": own for name, (_, own) in code.items()}
    sizes = {
        "PAIRED_DIM": paired_dim, "K_ROW": k.row, "V_ROW": v.row, "K_COUNT": k_count, "V_COUNT": v_count,
        "SUMS": grouped_text.accumulators(v),
        "QUERY": at.query, "K_MASKS": at.k_masks, "V_MASKS": at.v_masks, "DIGIT_ROW": ptx_text.DIGIT_ROW,
    }  # fmt: skip
    return {**sizes, **texts, **kinds}
