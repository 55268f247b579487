# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""The fast path in one launch, for few and short sequences: a program for each sequence and head, a warp a block.

What `ptx` does in three launches, whose latencies are all that counts where there is little to do: the query's
integers stay in shared memory, the warps' sums are joined and mapped back by the program itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.attend import LOG2E, NEGATIVE
from turboesm_kernels.ptx import BLOCK, QUERY_UNIT, UNIT, _phase, _read, _weigh


@triton.jit
def _stack(x, COUNT: tl.constexpr):
    """COUNT tensors [n], a power of 2, as one [n, COUNT]."""
    size: tl.constexpr = x[0].shape[0]
    for level in tl.static_range(6):
        if 1 << level < COUNT:
            joined = ()
            for i in tl.static_range(COUNT >> (level + 1)):
                joined = joined + (tl.join(x[i], x[i + (COUNT >> (level + 1))]),)  # noqa: RUF005
            x = joined
    return tl.reshape(x[0], (size, COUNT))


@triton.jit
def _query_words(query, head, key_map, factors, middle, shifts, masks, fields, table, weights, FIELDS_PAD: tl.constexpr):
    """A query f32 [d] in coded axes as `fast_fold_kernel` has it: words int32 [4 F] of descriptors, gain, constant."""
    high, low = weights
    column = tl.arange(0, 4 * FIELDS_PAD)
    own = column < 4 * fields
    factor = tl.load(factors + head * 4 * fields + column, mask=own, other=0.0) * LOG2E
    centre = tl.load(middle + head * 4 * fields + column, mask=own, other=0.0)
    field = tl.arange(0, FIELDS_PAD)
    shift = tl.load(shifts + head * table + field, mask=field < fields, other=0)
    bits = tl.load(masks + head * table + field, mask=field < fields, other=0)
    r = tl.sum(query[:, None] * (high.to(tl.float32) + low.to(tl.float32)), 0) * factor
    gain = tl.max(tl.abs(r), 0) / QUERY_UNIT + 1e-30
    whole = tl.floor(r / gain + 0.5)
    constant = -gain * tl.sum(whole * centre, 0)
    first, second = tl.split(tl.reshape(whole.to(tl.int32), (2 * FIELDS_PAD, 2)))
    front, back = tl.split(tl.reshape((first & 0xFFFF) | (second << 16), (FIELDS_PAD, 2)))
    fours = tl.join(tl.join(shift, front), tl.join(bits, back))  # shift, bits, front, back
    return tl.reshape(fours, (4 * FIELDS_PAD,)), gain, constant


@triton.jit(do_not_specialize=["sinks", "angles", "fields", "table"])
def whole_kernel(
    query, q_b, q_h, q_d, k_centre, key_map, factors, middle, shifts, masks, fields, table,
    turns, cos, sin, rope_t, angles, lengths,
    k_codes, k_b, k_h, k_word, k_scales, ks_b, ks_h,
    v_codes, v_b, v_h, v_plane, v_scales, vs_b, vs_h, k_places, v_places, v_masks,
    sink_k, sk_b, sk_h, sk_t, sk_d, sink_v, sv_b, sv_h, sv_t, sv_d,
    value_map, offset, v_centre, out, tokens, sinks,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, FIELDS_PAD: tl.constexpr, WARPS: tl.constexpr,
    V_FIELDS: tl.constexpr, V_PAD: tl.constexpr, V_TABLE: tl.constexpr, SINKS_PAD: tl.constexpr,
    ADDRESS_CODE: tl.constexpr, ADDRESS_KINDS: tl.constexpr, OPEN_CODE: tl.constexpr, OPEN_KINDS: tl.constexpr,
    KEEP_CODE: tl.constexpr, KEEP_KINDS: tl.constexpr,
    FIRST_KEYS_CODE: tl.constexpr, FIRST_KEYS_KINDS: tl.constexpr,
    FIRST_VALUES_CODE: tl.constexpr, FIRST_VALUES_KINDS: tl.constexpr,
    SCORE_CODE: tl.constexpr, SCORE_KINDS: tl.constexpr, SUM_CODE: tl.constexpr, SUM_KINDS: tl.constexpr,
    BIAS_CODE: tl.constexpr, BIAS_KINDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, K_WORDS: tl.constexpr, V_WORDS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Attention of one sequence and head over up to WARPS blocks of tokens and its sinks.

    Tensors as in `fast_fold_kernel`, `fast_split_kernel` and `finish_kernel`. Program b H + h.
    """
    pair_row = tl.program_id(0).to(tl.int64)
    batch, head = pair_row // HEADS, pair_row % HEADS
    thread = tl.arange(0, 32 * WARPS)
    lane, begin = thread % 32, thread // 32 * BLOCK
    dim = tl.arange(0, DIM_PAD)
    column = tl.arange(0, 4 * FIELDS_PAD)
    k_place = (k_places + head * ((K_WORDS + 3) // 4 * 4)).to(tl.int64, bitcast=True)
    v_place = (v_places + head * ((V_WORDS + 3) // 4 * 4)).to(tl.int64, bitcast=True)
    v_mask = (v_masks + head * V_TABLE).to(tl.int64, bitcast=True)
    weight_at = key_map + (head * DIM + dim[:, None]) * (4 * fields) + column[None, :]
    inside = (dim < DIM)[:, None] & (column < 4 * fields)[None, :]
    weight_high = tl.load(weight_at, mask=inside, other=0.0)
    weight_low = tl.load(weight_at + HEADS * DIM * 4 * fields, mask=inside, other=0.0)
    shared = tl.inline_asm_elementwise(
        ADDRESS_CODE, ADDRESS_KINDS, (sinks,), dtype=tl.int32, is_pure=False, pack=1
    )
    tl.inline_asm_elementwise(
        OPEN_CODE, OPEN_KINDS, (thread, shared, v_mask, k_place, v_place, k_place, k_place),
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    length = tokens + sinks
    if HAS_LENGTHS:
        length = tl.load(lengths + batch).to(tl.int32)
    end = tl.minimum(tl.maximum(length - sinks, 0), tokens)
    last = tl.maximum(end - 1, 0)
    k_row = (k_codes + batch * k_b + head * k_h).to(tl.int64, bitcast=True)
    v_row = (v_codes + batch * v_b + head * v_h).to(tl.int64, bitcast=True) + (lane % 4) * v_plane
    k_scale = (k_scales + batch * ks_b + head * ks_h).to(tl.pointer_type(tl.int32), bitcast=True)
    v_scale = (v_scales + batch * vs_b + head * vs_h).to(tl.pointer_type(tl.int32), bitcast=True)
    k_token = tl.minimum(begin + lane * 4, last // 4 * 4)
    v_token = tl.minimum(begin + lane // 4 * 16, last // 16 * 16)
    kn, k_words_of = _read(
        begin, k_token, end, k_row, k_word, k_place, 4, k_scale, begin + lane * 4,
        FIRST_KEYS_CODE, FIRST_KEYS_KINDS, K_WORDS,
    )  # fmt: skip
    vn, v_words_of = _read(
        begin, v_token, end, v_row, v_plane * 4, v_place, 1, v_scale, begin + lane * 4,
        FIRST_VALUES_CODE, FIRST_VALUES_KINDS, V_WORDS,
    )  # fmt: skip

    own_query = query + batch * q_b + head * q_h
    q = tl.load(own_query + dim * q_d, mask=dim < DIM, other=0.0).to(tl.float32)
    words, gain, constant = _query_words(
        q, head, key_map, factors, middle, shifts, masks, fields, table, (weight_high, weight_low), FIELDS_PAD
    )
    tl.inline_asm_elementwise(KEEP_CODE, KEEP_KINDS, (shared, column, words), dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    top = tl.full((), NEGATIVE, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    total = tl.zeros((DIM_PAD,), tl.float32)
    if SINKS_PAD:
        sink = tl.arange(0, SINKS_PAD)
        has = (sink < sinks) & (sink < length)
        there = has[:, None] & (dim < DIM)[None, :]
        k_at = batch * sk_b + head * sk_h + sink[:, None] * sk_t + dim[None, :] * sk_d
        v_at = batch * sv_b + head * sv_h + sink[:, None] * sv_t + dim[None, :] * sv_d
        k = tl.load(sink_k + k_at, mask=there, other=0.0).to(tl.float32)
        v = tl.load(sink_v + v_at, mask=there, other=0.0).to(tl.float32)
        score = tl.where(has, tl.sum(q[None, :] * k, 1) * LOG2E, NEGATIVE)
        top = tl.max(score, 0)
        p = tl.where(has, tl.exp2(score - top), 0.0)
        mass = tl.sum(p, 0)
        total = tl.sum(p[:, None] * v, 0)
    b = (tl.zeros((32 * WARPS,), tl.float32),) * 4
    if HAS_BIAS:
        pair = lane % 4 * (DIM // 8)
        phase = _phase(own_query, q_d, k_centre + head * DIM, pair, DIM)
        angle = (tl.minimum(begin + lane // 4 * 2, angles - 1) * rope_t + pair).to(tl.int64) * 4
        at = (turns.to(tl.int64, bitcast=True) + lane * 16, cos.to(tl.int64, bitcast=True) + angle)
        b = tl.inline_asm_elementwise(
            BIAS_CODE, BIAS_KINDS, at + (sin.to(tl.int64, bitcast=True) + angle,) + phase,  # noqa: RUF005
            dtype=(tl.float32,) * 4, is_pure=False, pack=1,
        )  # fmt: skip
    totals = tl.inline_asm_elementwise(
        SCORE_CODE, SCORE_KINDS, (shared,) + k_words_of,  # noqa: RUF005
        dtype=(tl.int32,) * 4, is_pure=False, pack=1,
    )  # fmt: skip
    none = tl.zeros((32 * WARPS,), tl.float32)
    own_top, own_mass, own_weight, low, high, alpha = _weigh(
        begin, end, lane, totals, kn, vn, b, gain, constant, none + NEGATIVE, none, none
    )
    sums = tl.inline_asm_elementwise(
        SUM_CODE, SUM_KINDS, (low, high, shared, alpha) + v_words_of + (none,) * V_FIELDS,  # noqa: RUF005
        dtype=(tl.float32,) * V_FIELDS, is_pure=False, pack=1,
    )  # fmt: skip

    # Join the warps' sums, then map them back; the centre and the offset of levels are rows of the map.
    index = tl.arange(0, 4 * V_PAD)
    row = value_map + (head * 4 * V_FIELDS + index[:, None]) * DIM + dim[None, :]
    back = tl.load(row, mask=(index < 4 * V_FIELDS)[:, None] & (dim < DIM)[None, :], other=0.0)
    const = tl.load(v_centre + head * DIM + dim, mask=dim < DIM, other=0.0)
    off = tl.load(offset + head * DIM + dim, mask=dim < DIM, other=0.0)
    codes_top = tl.max(own_top, 0)
    shrink = tl.exp2(own_top - tl.maximum(codes_top, 0.5 * NEGATIVE))
    coded = tl.sum(own_mass * shrink, 0)
    heavy = tl.sum(own_weight * shrink, 0) / UNIT
    columns = _stack(sums + (none,) * (V_PAD - V_FIELDS), V_PAD) * (shrink / UNIT)[:, None]  # noqa: RUF005
    acc = tl.reshape(tl.trans(tl.sum(tl.reshape(columns, (8 * WARPS, 4, V_PAD)), 0)), (4 * V_PAD,))
    part = tl.sum(acc[:, None] * back, 0) + coded * const + heavy * off
    new_top = tl.maximum(tl.maximum(top, codes_top), 0.5 * NEGATIVE)
    mine, theirs = tl.exp2(codes_top - new_top), tl.exp2(top - new_top)
    mass = mass * theirs + coded * mine
    result = (total * theirs + part * mine) / tl.where(mass > 0, mass, 1.0)
    tl.store(out + pair_row * DIM + dim, result.to(out.dtype.element_ty), mask=dim < DIM)
