# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""Decode attention of grouped queries over a uniform grid, with inline PTX: one warp for four queries of a head.

As in `ptx_kernels`, whose conventions hold here, every tensor is one value a lane; but a product's 8 columns are
the digits of four queries, and codes are masked once for all of them. Which lane has which tokens and queries is
in `grouped_text`. Queries that a group lacks are its last one again, whose results are not written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.grouped_text import QUERIES, QUERY_ROW, any_query, over_groups, spread_code
from turboesm_kernels.ptx_kernels import (
    BLOCK,
    HEADROOM,
    UNIT,
    byte_steps,
    dithers_from,
    phase_of,
    scales_of,
    score_of,
    weight_of,
)
from turboesm_kernels.triton_kernels import NEGATIVE

TOGETHER = tl.constexpr(QUERIES)
WEIGHTS_ROW = tl.constexpr(QUERY_ROW)
GREATEST, TOTAL, ANY, SPREAD = (
    tl.constexpr(text) for text in (over_groups("max"), over_groups("add"), any_query(), spread_code())
)


@triton.jit
def _of_query(x, CODE: tl.constexpr):
    """A float32 of all lanes of the same t, joined."""
    return tl.inline_asm_elementwise(CODE, "=&f,f", (x,), dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _spread(word, lane):
    """What lanes 8 s + g hold, s < 4."""
    return tl.inline_asm_elementwise(
        SPREAD, "=&r,=&r,=&r,=&r,r,r", (lane, word), dtype=(tl.int32,) * 4, is_pure=True, pack=1
    )


@triton.jit
def _dithers(g, block):
    """What is added to each of 4 weights, of 1: multiples of the golden ratio, from token to token of 32, and on
    from one block of a sequence to the next."""
    return dithers_from(g.to(tl.float32) * 0.4721359 + block.to(tl.float32) * 0.7770876)  # 4 of them, 32 of them


@triton.jit
def _scores(token, end, totals, kn, b, gain, constant):
    """Of a lane's 16 tokens, in units of log 2."""
    scores = ()
    for n in tl.static_range(16):
        score = score_of(totals[n], kn[n // 4], n % 4, gain, constant, b[n], token + n // 4 * 32, end)
        scores = scores + (score,)  # noqa: RUF005
    return scores


@triton.jit
def _weigh(scores, vn, dithers, one, mass, weight):
    """`ptx_kernels`' online softmax over a lane's 16 tokens of one query; `empty` if any query's sums must be."""
    greatest = tl.full((32,), NEGATIVE, tl.float32)
    for n in tl.static_range(16):
        greatest = tl.maximum(greatest, scores[n] + byte_steps(vn[n // 4], n % 4))
    greatest = _of_query(greatest, GREATEST)
    grown = greatest > one + HEADROOM
    new_one = tl.where(grown, greatest, one)
    # A range without a token yet has `NEGATIVE` there; its weights must still be 0.
    safe = tl.maximum(new_one, 0.5 * NEGATIVE)
    alpha = tl.exp2(one - safe)
    weights = ()
    own_mass, own_weight = tl.zeros((32,), tl.float32), tl.zeros((32,), tl.int32)
    for n in tl.static_range(16):
        own_mass += tl.exp2(scores[n] - safe)
        w = weight_of(scores[n] + byte_steps(vn[n // 4], n % 4) - safe, dithers[n % 4])
        own_weight += w
        weights = weights + (w,)  # noqa: RUF005
    grown_after_one = (grown & (one > 0.5 * NEGATIVE)).to(tl.int32)
    empty = tl.inline_asm_elementwise(ANY, "=&r,r", (grown_after_one,), dtype=tl.int32, is_pure=True, pack=1)
    return new_one, mass * alpha + own_mass, weight * alpha + own_weight.to(tl.float32), weights, alpha, empty


@triton.jit
def _read(lane, planes, stride, token, end, CODE: tl.constexpr, KINDS: tl.constexpr, COUNT: tl.constexpr):
    """The lane's words of keys or values of the block from `token` on, anything past the end; see `keys_code`."""
    return tl.inline_asm_elementwise(
        CODE, KINDS, (lane, planes, stride, token, end), dtype=(tl.int32,) * COUNT, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["angles", "sinks", "fresh"])
def fast_attend_group_kernel(
    query, q_b, q_h, q_q, q_d, centre, descriptors, scalars, places,
    group_turns, block_turn, cos, sin, rope_t, angles, lengths,
    k_codes, k_b, k_h, k_word, k_scales, ks_b, ks_h,
    v_codes, v_b, v_h, v_word, v_scales, vs_b, vs_h, k_masks, v_masks,
    part_max, part_sum, part_weight, part_out, tokens, chunk, sinks, fresh,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, PAIRED_DIM: tl.constexpr,
    K_TABLE: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, V_ROWS: tl.constexpr,
    K_COUNT: tl.constexpr, V_COUNT: tl.constexpr, SUMS: tl.constexpr,
    QUERY: tl.constexpr, K_MASKS: tl.constexpr, V_MASKS: tl.constexpr, DIGIT_ROW: tl.constexpr,
    OPEN_CODE: tl.constexpr, OPEN_KINDS: tl.constexpr, ROW_CODE: tl.constexpr, ROW_KINDS: tl.constexpr,
    ANGLES_CODE: tl.constexpr, ANGLES_KINDS: tl.constexpr, TURN_CODE: tl.constexpr, TURN_KINDS: tl.constexpr,
    KEYS_CODE: tl.constexpr, KEYS_KINDS: tl.constexpr, VALUES_CODE: tl.constexpr, VALUES_KINDS: tl.constexpr,
    SCORE_CODE: tl.constexpr, SCORE_KINDS: tl.constexpr, PUT_CODE: tl.constexpr, PUT_KINDS: tl.constexpr,
    SUM_CODE: tl.constexpr, SUM_KINDS: tl.constexpr,
    EMPTY_CODE: tl.constexpr, EMPTY_KINDS: tl.constexpr, EMIT_CODE: tl.constexpr, EMIT_KINDS: tl.constexpr,
    BIAS_CODE: tl.constexpr, BIAS_KINDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One range of `chunk` tokens of one sequence, head and group of four of its queries, with one warp.

    As `ptx_kernels.fast_attend_split_kernel` for each query; k_masks int32 [H, 4, K_ROW], v_masks int32 [H, 2,
    V_ROW] and places int32 [4, K_ROW] of `Fields.of_keys` and `of_values`, group_turns as in `Rope`. K_COUNT,
    V_COUNT and SUMS are registers of words and sums; QUERY to V_MASKS as in `grouped_text.GroupShared`.
    """
    GROUPS: tl.constexpr = (QUERIES + TOGETHER - 1) // TOGETHER
    pair = tl.program_id(0).to(tl.int64) // GROUPS
    first_query = tl.program_id(0) % GROUPS * TOGETHER
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch, head = pair // HEADS, pair % HEADS
    end = tokens
    if HAS_LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int32) - sinks, 0), tokens)
    begin = split * chunk
    end = tl.minimum(end, begin + chunk)

    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    k_own, v_own = g * 4, t * 16  # a lane's first token in a block
    own_column = tl.minimum(first_query + g // 2, QUERIES - 1)  # the query of its column of a right side
    own = tl.minimum(first_query + t, QUERIES - 1)  # that of its scores
    if EARLY:
        if fresh == 0:
            gdc_launch_dependents()
        if end <= begin + BLOCK:  # among the first tokens is the newest, which the kernel before may be packing
            gdc_wait()
    channel = t * (PAIRED_DIM // 8)
    own_query = query + batch * q_b + head * q_h + own_column.to(tl.int64) * q_q
    if HAS_BIAS:
        phase = (tl.zeros((32,), tl.float32),) * (PAIRED_DIM // 4)
        if fresh == 0:
            phase = phase_of(own_query, q_d, centre + head * DIM, channel, DIM, PAIRED_DIM)
        angle = (tl.minimum(begin + g % 2, angles - 1) * rope_t + channel).to(tl.int64) * 4
        turn = tl.inline_asm_elementwise(
            ANGLES_CODE, ANGLES_KINDS,
            (cos.to(tl.int64, bitcast=True) + angle, sin.to(tl.int64, bitcast=True) + angle),
            dtype=(tl.float32,) * (PAIRED_DIM // 4), is_pure=False, pack=1,
        )  # fmt: skip
    k_masks_at = (k_masks + head * (4 * K_ROW)).to(tl.int64, bitcast=True)
    v_masks_at = (v_masks + head * (2 * V_ROW)).to(tl.int64, bitcast=True)
    shared = tl.inline_asm_elementwise(
        OPEN_CODE, OPEN_KINDS, (lane, k_masks_at, v_masks_at, block_turn.to(tl.int64, bitcast=True)),
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    place = shared + lane * 16
    k_row = (k_codes + batch * k_b + head * k_h).to(tl.int64, bitcast=True)
    v_row = (v_codes + batch * v_b + head * v_h).to(tl.int64, bitcast=True)
    k_scale = (k_scales + batch * ks_b + head * ks_h).to(tl.pointer_type(tl.int32), bitcast=True)
    v_scale = (v_scales + batch * vs_b + head * vs_h).to(tl.pointer_type(tl.int32), bitcast=True)
    kn = scales_of(k_scale, begin + lane * 4, end)
    vn = scales_of(v_scale, begin + lane * 4, end)
    k_words = _read(lane, k_row, k_word, begin, end, KEYS_CODE, KEYS_KINDS, K_COUNT)
    if EARLY:  # noqa: SIM102  a constant's branch is compiled or not, the other is taken or not
        if fresh != 0:
            gdc_wait()
            gdc_launch_dependents()
    if HAS_BIAS:
        if fresh != 0:
            phase = phase_of(own_query, q_d, centre + head * DIM, channel, DIM, PAIRED_DIM)
        tl.inline_asm_elementwise(
            TURN_CODE, TURN_KINDS, turn + phase + (place,), dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip
    one = tl.full((32,), NEGATIVE, tl.float32)
    mass, weight = tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32)
    sums = (tl.zeros((32,), tl.int32),) * SUMS
    weights_to = shared + t * WEIGHTS_ROW + k_own
    weights_at = shared + g // 4 * WEIGHTS_ROW + tl.minimum(g % 4, 2) * DIGIT_ROW + v_own
    if EARLY:
        gdc_wait()
    digit = (pair * QUERIES + own_column) * 2 + g % 2
    gain = tl.load(scalars + (pair * QUERIES + own) * 2)
    constant = tl.load(scalars + (pair * QUERIES + own) * 2 + 1)
    tl.inline_asm_elementwise(
        ROW_CODE, ROW_KINDS,
        (lane, shared, (places + t * K_ROW).to(tl.int64, bitcast=True),
         (descriptors + digit * K_TABLE).to(tl.int64, bitcast=True)),
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    query_at, k_masks_there = shared + QUERY + lane * (4 * K_ROW), shared + K_MASKS + t * (4 * K_ROW)
    b = (tl.zeros((32,), tl.float32),) * 16
    for first in range(begin, end, BLOCK):
        if HAS_BIAS:
            b = tl.inline_asm_elementwise(
                BIAS_CODE, BIAS_KINDS,
                (place, shared + t * (PAIRED_DIM // 2), group_turns.to(tl.int64, bitcast=True) + lane * 16),
                dtype=(tl.float32,) * 16, is_pure=False, pack=1,
            )  # fmt: skip
        totals = tl.inline_asm_elementwise(
            SCORE_CODE, SCORE_KINDS, (query_at, k_masks_there) + k_words,  # noqa: RUF005
            dtype=(tl.int32,) * 16, is_pure=False, pack=1,
        )  # fmt: skip
        scores = _scores(first + k_own, end, totals, _spread(kn, lane), b, gain, constant)
        # Values, and the next block's keys, are asked when the registers of this block's keys are free. Loads
        # return in order: the turns would wait for what is asked before them.
        v_words = _read(lane, v_row, v_word, first, end, VALUES_CODE, VALUES_KINDS, V_COUNT)
        own_vn = _spread(vn, lane)
        kn = scales_of(k_scale, first + BLOCK + lane * 4, end)
        vn = scales_of(v_scale, first + BLOCK + lane * 4, end)
        k_words = _read(lane, k_row, k_word, first + BLOCK, end, KEYS_CODE, KEYS_KINDS, K_COUNT)
        one, mass, weight, weights, alpha, empty = _weigh(
            scores, own_vn, _dithers(g, first // BLOCK), one, mass, weight
        )
        sums = tl.inline_asm_elementwise(
            EMPTY_CODE, EMPTY_KINDS, (empty, alpha, lane, shared) + sums,  # noqa: RUF005
            dtype=(tl.int32,) * SUMS, is_pure=False, pack=1,
        )  # fmt: skip
        tl.inline_asm_elementwise(
            PUT_CODE, PUT_KINDS, (weights_to,) + weights, dtype=tl.int32, is_pure=False, pack=1  # noqa: RUF005
        )  # fmt: skip
        sums = tl.inline_asm_elementwise(
            SUM_CODE, SUM_KINDS, (weights_at, shared + V_MASKS + g // 4 * (4 * V_ROW)) + v_words + sums,  # noqa: RUF005
            dtype=(tl.int32,) * SUMS, is_pure=False, pack=1,
        )  # fmt: skip

    part = (pair * QUERIES + own) * splits + split
    writes = (g == 0) & (first_query + t < QUERIES)
    tl.store(part_max + part, one, mask=writes)
    tl.store(part_sum + part, _of_query(mass, TOTAL), mask=writes)
    tl.store(part_weight + part, _of_query(weight, TOTAL) / UNIT, mask=writes)
    front, back = first_query + t // 2, first_query + 2 + t // 2
    byte = part_out + g % 4
    to_front = byte + ((pair * QUERIES + tl.minimum(front, QUERIES - 1)) * splits + split) * V_ROWS
    to_back = byte + ((pair * QUERIES + tl.minimum(back, QUERIES - 1)) * splits + split) * V_ROWS
    tl.inline_asm_elementwise(
        EMIT_CODE, EMIT_KINDS,
        (lane, shared, to_front.to(tl.int64, bitcast=True), to_back.to(tl.int64, bitcast=True),  # noqa: RUF005
         (front < QUERIES).to(tl.int32), (back < QUERIES).to(tl.int32)) + sums,
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
