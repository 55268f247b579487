# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""Decode attention over a uniform grid, with inline PTX: one warp a program, every tensor one value a lane.

For codes in 4 byte lanes; queries of one key/value head each read them, one soon after another. Levels are step
(code - middle), so there is no table; a mask takes 4 codes out of a word, where they lie, and the tensor cores
multiply them as bytes, keys by the query, values by the softmax's weights. Both are integers cut into bytes,
digits: the right side of a product m16n8k32 has 8 columns, of which digits take few; the others let lanes have
tokens of their own. Of a block of 128 tokens lane l = 4 g + t has

    keys      tokens 4 l .. 4 l + 3, all axes: their 4 words of a plane are 16 bytes (`ptx_text.score_code`)
    values    tokens 64 (g / 4) + 16 t .. + 15 of byte lane g % 4 of every word: 8 bytes of two tiles (`sum_code`)

and the weights go from one to the other through shared memory. The query has 16 bits, two digits. Weights have 24,
three: 2^16 stands for the greatest weight when it was last looked at, so sums of integers are only emptied where a
score exceeds that by `HEADROOM`. 16 codes cost a lane 4 masks and a product.

The scores of the keys' centre, <q, R_j c>, are products of float16, 128 tokens at once (`ptx_text.bias_code`).

Which field lies where is data, not code (`prepared.Fields`): one compiled kernel serves every profile of one
shape. Weights are rounded with a dither that differs from token to token: many weights below 2^-16 of the greatest
keep their sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels import layout
from turboesm_kernels.parts import angles_at, turned_sum
from turboesm_kernels.reference import TURN
from turboesm_kernels.triton_kernels import LOG2E, NEGATIVE, STEPS, ZERO

BLOCK = tl.constexpr(TURN)
TILE = tl.constexpr(layout.TILE)
UNIT = tl.constexpr(65536.0)  # of a weight of 1
HEADROOM = tl.constexpr(7.9)  # octaves by which a weight may exceed 1; with its dither, below 2^24
QUERY_UNIT = tl.constexpr(32639.0)  # the greatest integer whose two digits are signed bytes


@triton.jit
def _warp_max(x):
    """The greatest x of all lanes, in all lanes: floats are ordered as integers once negative ones are flipped."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 x, sign;
        shr.s32 sign, $1, 31; and.b32 sign, sign, 0x7fffffff; xor.b32 x, $1, sign;
        redux.sync.max.s32 x, x, 0xffffffff;
        shr.s32 sign, x, 31; and.b32 sign, sign, 0x7fffffff; xor.b32 $0, x, sign;
        }""",
        "=f,f", (x,), dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def byte_steps(word, i: tl.constexpr):
    """log2 of the scale in byte i of a word: (byte - 128) / 32; the byte becomes a float's mantissa."""
    bits = ((word >> (8 * i)) & 0xFF) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) * (1.0 / STEPS) - (8388608.0 + ZERO) / STEPS


@triton.jit
def score_of(total, word, i: tl.constexpr, gain, constant, bias, token, end):
    """The score of the lane's token i in units of log 2, `NEGATIVE` past the end."""
    score = (total.to(tl.float32) * gain + constant) * tl.exp2(byte_steps(word, i)) + bias
    return tl.where(token + i < end, score, NEGATIVE)


@triton.jit
def phase_of(query, q_d, centre, pair, DIM: tl.constexpr, PAIRED_DIM: tl.constexpr):
    """<q, R_j c> as coefficients of RoPE's cosines, then sines, at j, of each lane's pairs from `pair` on.

    Those past the d / 2 that there are have 0: a lane has PAIRED_DIM / 8.

    In units of log 2, with i < d/2 and i' = i + d/2: q_i c_i + q_i' c_i' of the cosine, q_i' c_i - q_i c_i' of the
    sine. Those that a turn could take beyond float16's range, which no model has, are clamped.
    """
    even = ()
    odd = ()
    for i in tl.static_range(PAIRED_DIM // 8):
        there = pair + i < DIM // 2
        q = tl.load(query + (pair + i) * q_d, mask=there, other=0.0).to(tl.float32) * LOG2E
        r = tl.load(query + (pair + i + DIM // 2) * q_d, mask=there, other=0.0).to(tl.float32) * LOG2E
        c = tl.load(centre + pair + i, mask=there, other=0.0)
        d = tl.load(centre + pair + i + DIM // 2, mask=there, other=0.0)
        even = even + (tl.clamp(q * c + r * d, -46000.0, 46000.0),)  # noqa: RUF005  Triton 3.6 unpacks no tuples
        odd = odd + (tl.clamp(r * c - q * d, -46000.0, 46000.0),)  # noqa: RUF005
    return even + odd


@triton.jit
def _two_halves(x):
    """x as a sum of two float16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit(do_not_specialize=["rows", "words"])
def fast_project_query_kernel(
    query, q_b, q_h, q_q, q_d, key_map, factors, middle, descriptors, scalars, rows, words,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, WORDS_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
    FOLD_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Queries in coded axes as 16-bit integers, cut into two digits.

        r = log2(e) q map[h]     gain = max |r| / 32639     r~ = round(r / gain)     constant = -gain <r~, middle>
        r~ = 256 high + low, both signed bytes

    query any float [B, H, Q, d], key_map f16 [2, H, d, 4 W] and factors f32 [H, 4 W] (`in_halves`), middle f32
    [H, 4 W]; descriptors int32 [B, H, Q, 2, W]: low digits of 4 columns a word, then high ones; scalars f32 [B, H,
    Q, 2] = (gain, constant). W = `words`. Program (h, g): the g-th block of rows (b, q) of head h.
    """
    fold_rows(
        query, q_b, q_h, q_q, q_d, key_map, factors, middle, descriptors, scalars, rows, words,
        0, query, 1.0, factors, factors, 0, 0, factors, 0,
        tl.program_id(0), tl.program_id(1), HEADS, QUERIES, DIM, WORDS_PAD, DIM_PAD, FOLD_BLOCK,
        DIM_BLOCK, 0, EARLY,
    )  # fmt: skip


@triton.jit
def _map_rows(key_map, head, dim, column, words, HEADS: tl.constexpr, DIM: tl.constexpr):
    """The head's `key_map` for some channels: both halves of the numbers."""
    inside = (dim < DIM)[:, None] & (column < 4 * words)[None, :]
    at = key_map + (head * DIM + dim[:, None]) * (4 * words) + column[None, :]
    high = tl.load(at, mask=inside, other=0.0)
    return high, tl.load(at + HEADS * DIM * 4 * words, mask=inside, other=0.0)


@triton.jit
def fold_rows(
    query, q_b, q_h, q_q, q_d, key_map, factors, middle, descriptors, scalars, rows, words,
    x_s, turned, scaling, cos, sin, rope_t, rope_d, starts, first_token, head, group,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, WORDS_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
    FOLD_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`fast_project_query_kernel` for one head and block of rows.

    Where PARTS, the query is turned first, and left in `turned`: see `step_kernels.append_and_project_kernel`.
    """
    item = group * FOLD_BLOCK + tl.arange(0, FOLD_BLOCK)
    live = item < rows
    own_dim = tl.arange(0, DIM_BLOCK)
    column = tl.arange(0, 4 * WORDS_PAD)
    own = column < 4 * words
    weights = _map_rows(key_map, head, own_dim, column, words, HEADS, DIM)
    factor = tl.load(factors + head * 4 * words + column, mask=own, other=0.0) * LOG2E
    centre_of_piece = tl.load(middle + head * 4 * words + column, mask=own, other=0.0)
    q_at = (item // QUERIES).to(tl.int64) * q_b + head * q_h + item % QUERIES * q_q
    row = ((item // QUERIES).to(tl.int64) * HEADS + head) * QUERIES + item % QUERIES
    turn = item * 0
    if PARTS:
        turn = tl.load(starts + item // QUERIES, mask=live, other=0).to(tl.int32) - first_token
    if EARLY:  # wait for what was launched before, then let what comes after start: it may read the cache at once
        gdc_wait()
        gdc_launch_dependents()
    r = tl.zeros((FOLD_BLOCK, 4 * WORDS_PAD), tl.float32)
    for first in tl.static_range(0, DIM_PAD, DIM_BLOCK):
        dim = first + own_dim
        if first > 0:
            weights = _map_rows(key_map, head, dim, column, words, HEADS, DIM)
        asked = live[:, None] & (dim < DIM)[None, :]
        if PARTS:
            cosine, sine = angles_at(cos, sin, rope_t, rope_d, turn, live, dim, DIM)
            q = turned_sum(query + q_at, q_d, dim, asked, x_s, cosine, sine, DIM, PARTS)
            q = (q * scaling).to(turned.dtype.element_ty)
            tl.store(turned + row[:, None] * DIM + dim[None, :], q, mask=asked)
            q = q.to(tl.float32)
        else:
            q = tl.load(query + q_at[:, None] + dim[None, :] * q_d, mask=asked, other=0.0).to(tl.float32)
        if FOLD_BLOCK == 1:
            weight = weights[0].to(tl.float32) + weights[1].to(tl.float32)
            r += tl.sum(tl.sum(q, 0)[:, None] * weight, 0)[None, :]
        else:
            q_high, q_low = _two_halves(q)
            r = tl.dot(q_low, weights[0], r)
            r = tl.dot(q_high, weights[1], r)
            r = tl.dot(q_high, weights[0], r)
    r *= factor[None, :]
    gain = tl.max(tl.abs(r), 1) / QUERY_UNIT + 1e-30
    rounded = tl.floor(r / gain[:, None] + 0.5)
    constant = -gain * tl.sum(rounded * centre_of_piece[None, :], 1)
    whole = rounded.to(tl.int32)
    digits = (whole & 0xFF) | (((whole + 128) >> 8) << 16)  # low byte, then the high one, of a half each
    first, second = tl.split(tl.reshape(digits, (FOLD_BLOCK, 2 * WORDS_PAD, 2)))
    pairs = (first & 0xFF00FF) | ((second & 0xFF00FF) << 8)
    front, back = tl.split(tl.reshape(pairs, (FOLD_BLOCK, WORDS_PAD, 2)))
    word = tl.arange(0, WORDS_PAD)
    target = descriptors + row[:, None] * (2 * words) + word[None, :]
    there = live[:, None] & (word < words)[None, :]
    tl.store(target, (front & 0xFFFF) | (back << 16), mask=there)
    tl.store(target + words, ((front >> 16) & 0xFFFF) | (back & -65536), mask=there)
    tl.store(scalars + row * 2, gain, mask=live)
    tl.store(scalars + row * 2 + 1, constant, mask=live)


@triton.jit
def _read(row, token, end, stride, CODE: tl.constexpr, KINDS: tl.constexpr, WORDS: tl.constexpr):
    """The lane's words of a block from its first token on, anything past the end; see `load_code`."""
    return tl.inline_asm_elementwise(
        CODE, KINDS, (row + (token * 4).to(tl.int64), stride, (token < end).to(tl.int32)),
        dtype=(tl.int32,) * (4 * WORDS), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def scales_of(scale, token, end):
    """The scales of 4 tokens from `token` on, a byte each."""
    return tl.load(scale + token // 4, mask=token < end, other=0, eviction_policy="evict_first")


@triton.jit
def _four(row, token, end, tokens, CODE: tl.constexpr, KINDS: tl.constexpr):
    """Numbers f32 of 4 tokens from `token` on, anything past the end; see `load_code`."""
    found = _read(row, token, end, tokens, CODE, KINDS, 1)
    return (
        found[0].to(tl.float32, bitcast=True), found[1].to(tl.float32, bitcast=True),
        found[2].to(tl.float32, bitcast=True), found[3].to(tl.float32, bitcast=True),
    )  # fmt: skip


@triton.jit
def weight_of(x, dither):
    """2^x as a number of 24 bits, 16 of them below the point."""
    return (tl.exp2(x) * UNIT + dither).to(tl.int32)


@triton.jit
def _weigh(token, end, totals, kn, vn, b, gain, constant, dithers, one, mass, weight):
    """The online softmax over a lane's 4 tokens: its state after, the weights, what shrank and whether anything.

    `one` is the score, in units of log 2, whose weight is 1: the greatest when it was last set.
    """
    s0 = score_of(totals[0], kn, 0, gain, constant, b[0], token, end)
    s1 = score_of(totals[1], kn, 1, gain, constant, b[1], token, end)
    s2 = score_of(totals[2], kn, 2, gain, constant, b[2], token, end)
    s3 = score_of(totals[3], kn, 3, gain, constant, b[3], token, end)
    x0 = s0 + byte_steps(vn, 0)
    x1 = s1 + byte_steps(vn, 1)
    x2 = s2 + byte_steps(vn, 2)
    x3 = s3 + byte_steps(vn, 3)
    greatest = _warp_max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))
    grown = greatest > one + HEADROOM
    new_one = tl.where(grown, greatest, one)
    # A range without a token yet has `NEGATIVE` there; its weights must still be 0.
    safe = tl.maximum(new_one, 0.5 * NEGATIVE)
    alpha = tl.exp2(one - safe)
    mass = mass * alpha + ((tl.exp2(s0 - safe) + tl.exp2(s1 - safe)) + (tl.exp2(s2 - safe) + tl.exp2(s3 - safe)))
    w0 = weight_of(x0 - safe, dithers[0])
    w1 = weight_of(x1 - safe, dithers[1])
    w2 = weight_of(x2 - safe, dithers[2])
    w3 = weight_of(x3 - safe, dithers[3])
    weight = weight * alpha + (w0 + w1 + w2 + w3).to(tl.float32)
    empty = (grown & (one > 0.5 * NEGATIVE)).to(tl.int32)
    return new_one, mass, weight, (w0, w1, w2, w3), alpha, empty


@triton.jit
def _dithers(lane):
    """What is added to each of a lane's 4 weights, of 1: multiples of the golden ratio, from token to token."""
    return dithers_from(lane.to(tl.float32) * 0.4721359)  # 4 of them


@triton.jit
def dithers_from(first):
    """The fraction of `first`, and of the next three multiples of the golden ratio."""
    d0 = first - tl.floor(first)
    d1 = d0 + 0.6180340
    d2 = d0 + 0.2360680
    d3 = d0 + 0.8541020
    return d0, d1 - tl.floor(d1), d2 - tl.floor(d2), d3 - tl.floor(d3)


@triton.jit(do_not_specialize=["angles", "sinks", "whole", "divided", "splits", "fresh"])
def fast_attend_split_kernel(
    query, q_b, q_h, q_q, q_d, centre, descriptors, scalars, turns, block_turn, cos, sin, rope_t, angles, lengths,
    k_codes, k_b, k_h, k_word, k_scales, ks_b, ks_h,
    v_codes, v_b, v_h, v_word, v_scales, vs_b, vs_h, k_masks, v_masks,
    part_max, part_sum, part_weight, part_out, tokens, chunk, whole, divided, splits, sinks, bias, b_r, fresh,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, K_WORDS: tl.constexpr, V_WORDS: tl.constexpr,
    PAIRED_DIM: tl.constexpr,
    K_TABLE: tl.constexpr, V_TABLE: tl.constexpr, V_ROWS: tl.constexpr, SUMS: tl.constexpr,
    QUERY: tl.constexpr, K_MASKS: tl.constexpr, V_MASKS: tl.constexpr, DIGIT_ROW: tl.constexpr,
    OPEN_CODE: tl.constexpr, OPEN_KINDS: tl.constexpr, ROW_CODE: tl.constexpr, ROW_KINDS: tl.constexpr,
    WAIT_CODE: tl.constexpr, WAIT_KINDS: tl.constexpr, ANGLES_CODE: tl.constexpr, ANGLES_KINDS: tl.constexpr,
    TURN_CODE: tl.constexpr, TURN_KINDS: tl.constexpr,
    KEYS_CODE: tl.constexpr, KEYS_KINDS: tl.constexpr, VALUES_CODE: tl.constexpr, VALUES_KINDS: tl.constexpr,
    SCORE_CODE: tl.constexpr, SCORE_KINDS: tl.constexpr, SUM_CODE: tl.constexpr, SUM_KINDS: tl.constexpr,
    EMPTY_CODE: tl.constexpr, EMPTY_KINDS: tl.constexpr, EMIT_CODE: tl.constexpr, EMIT_KINDS: tl.constexpr,
    BIAS_CODE: tl.constexpr, BIAS_KINDS: tl.constexpr, FOUR_CODE: tl.constexpr, FOUR_KINDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_LENGTHS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One range of one sequence, head and query with one warp: all of the first `whole` rows (b, h, q), `chunk`
    tokens of each of the other `divided`, which come last, one range of each after another.

        m: the greatest score_j + log2 n'_j, or up to `HEADROOM` below     w_j = 2^(score_j + log2 n'_j - m)
        part_sum = sum_j 2^(score_j - m)    part_weight = sum_j w_j    part_out[f, i] = sum_j w_j byte_jfi

    scores in units of log 2; query any float [B, H, Q, d], centre f32 [H, d]; descriptors and scalars as
    `fast_project_query_kernel` leaves them, turns and block_turn as in `Rope`, cos and sin f32 [angles, d], rows
    rope_t apart, of packed token 0 on; codes and scales as in `Packed` with aligned strides, k_masks and v_masks
    as in `Fields`; bias f32 [B, H, Q, T] where HAS_POSITIONS, of `position_scores_kernel`, rows b_r apart;
    part_max, part_sum and part_weight f32 [whole + divided S], S the `splits` of a row side by side, part_out f32
    [.., V_ROWS]. `fresh`, not 0: the kernel before makes the query, too. K_WORDS and V_WORDS are words
    of a code, K_TABLE and V_TABLE fields padded to 4, PAIRED_DIM d padded to `PAIRED`; QUERY to V_MASKS as in
    `ptx_text.Shared`.
    """
    number = tl.program_id(0)
    past = number - whole
    row_number = tl.where(past < 0, number, whole + past % divided)
    split = tl.where(past < 0, 0, past // divided)
    part = tl.where(past < 0, number, whole + (row_number - whole) * splits + split)
    pair_row = row_number.to(tl.int64)
    pair = pair_row // QUERIES
    batch, head = pair // HEADS, pair % HEADS
    last = tokens
    if HAS_LENGTHS:
        last = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int32) - sinks, 0), tokens)
    begin = split * chunk
    end = tl.where(past < 0, last, tl.minimum(last, begin + chunk))

    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    k_own, v_own = lane * 4, g // 4 * 64 + t * 16  # a lane's first token in a block
    if EARLY:
        if fresh == 0:  # what comes after may read the query, too
            gdc_launch_dependents()
        ends = end  # in a register anyway; of ranges of one block only the last has the newest token
        if ONE_BLOCK:
            ends = last
        if ends <= begin + BLOCK:  # among the first tokens is the newest, which the kernel before may be packing
            gdc_wait()
    # Unless it is fresh, the query was there before the kernel before began, and other codes do not wait for that
    # either. They come last: loads return in order.
    channel = t * (PAIRED_DIM // 8)
    own_query = query + batch * q_b + head * q_h + pair_row % QUERIES * q_q
    if HAS_BIAS:
        phase = (tl.zeros((32,), tl.float32),) * (PAIRED_DIM // 4)
        if fresh == 0:
            phase = phase_of(own_query, q_d, centre + head * DIM, channel, DIM, PAIRED_DIM)
        angle = (tl.minimum(begin + g * 2, angles - 1) * rope_t + channel).to(tl.int64) * 4
        turn = tl.inline_asm_elementwise(
            ANGLES_CODE, ANGLES_KINDS,
            (cos.to(tl.int64, bitcast=True) + angle, sin.to(tl.int64, bitcast=True) + angle),
            dtype=(tl.float32,) * (PAIRED_DIM // 4), is_pure=False, pack=1,
        )  # fmt: skip
    k_masks_at = (k_masks + head * K_TABLE).to(tl.int64, bitcast=True)
    v_masks_at = (v_masks + head * V_TABLE).to(tl.int64, bitcast=True)
    shared = tl.inline_asm_elementwise(
        OPEN_CODE, OPEN_KINDS,
        (lane, k_masks_at, v_masks_at, turns.to(tl.int64, bitcast=True), block_turn.to(tl.int64, bitcast=True)),
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    place = shared + lane * 16
    k_row = (k_codes + batch * k_b + head * k_h).to(tl.int64, bitcast=True)
    v_row = (v_codes + batch * v_b + head * v_h).to(tl.int64, bitcast=True) + g % 4 * TILE
    k_scale = (k_scales + batch * ks_b + head * ks_h).to(tl.pointer_type(tl.int32), bitcast=True)
    v_scale = (v_scales + batch * vs_b + head * vs_h).to(tl.pointer_type(tl.int32), bitcast=True)
    kn = scales_of(k_scale, begin + k_own, end)
    vn = scales_of(v_scale, begin + k_own, end)
    k_words = _read(k_row, begin + k_own, end, k_word, KEYS_CODE, KEYS_KINDS, K_WORDS)
    v_words = _read(v_row, begin + v_own, end, v_word, VALUES_CODE, VALUES_KINDS, V_WORDS)
    one = tl.full((32,), NEGATIVE, tl.float32)
    mass, weight = tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32)
    sums = (tl.zeros((32,), tl.int32),) * SUMS
    weights_to, weights_at = shared + k_own, shared + tl.minimum(g % 4, 2) * DIGIT_ROW + g // 4 * 64 + t * 16
    dithers = _dithers(lane)
    b = (tl.zeros((32,), tl.float32),) * 4
    if EARLY:  # noqa: SIM102  a constant's branch is compiled or not, the other is taken or not
        if fresh != 0:
            gdc_wait()
            gdc_launch_dependents()
    if HAS_BIAS:
        if fresh != 0:
            phase = phase_of(own_query, q_d, centre + head * DIM, channel, DIM, PAIRED_DIM)
        if ONE_BLOCK:
            state = tl.inline_asm_elementwise(
                TURN_CODE, TURN_KINDS, turn + phase + (place,),
                dtype=(tl.float32,) * (PAIRED_DIM // 4), is_pure=False, pack=1,
            )  # fmt: skip
            there = tl.inline_asm_elementwise(
                WAIT_CODE, WAIT_KINDS, (place,), dtype=tl.int32, is_pure=False, pack=1
            )
            b = tl.inline_asm_elementwise(
                BIAS_CODE, BIAS_KINDS, (there,) + state,  # noqa: RUF005
                dtype=(tl.float32,) * 4, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.inline_asm_elementwise(
                TURN_CODE, TURN_KINDS, turn + phase + (place,),
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    if EARLY:
        gdc_wait()
    row = (descriptors + pair_row * (2 * K_TABLE)).to(tl.int64, bitcast=True)
    gain = tl.load(scalars + pair_row * 2)
    constant = tl.load(scalars + pair_row * 2 + 1)
    digit_at = g % 2 * (4 * K_TABLE)
    bias_row = (bias + pair_row * b_r).to(tl.int64, bitcast=True)
    if HAS_POSITIONS:
        b = _four(bias_row, begin + k_own, end, tokens, FOUR_CODE, FOUR_KINDS)
    if ONE_BLOCK:
        totals = tl.inline_asm_elementwise(
            SCORE_CODE, SCORE_KINDS, (lane, row + digit_at, k_masks_at) + k_words,  # noqa: RUF005
            dtype=(tl.int32,) * 4, is_pure=False, pack=1,
        )  # fmt: skip
        one, mass, weight, weights, alpha, empty = _weigh(
            begin + k_own, end, totals, kn, vn, b, gain, constant, dithers, one, mass, weight
        )
        sums = tl.inline_asm_elementwise(
            SUM_CODE, SUM_KINDS, weights + (weights_to, weights_at, v_masks_at) + v_words + sums,  # noqa: RUF005
            dtype=(tl.int32,) * SUMS, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(ROW_CODE, ROW_KINDS, (lane, shared, row), dtype=tl.int32, is_pure=False, pack=1)
        for first in range(begin, end, BLOCK):
            if HAS_BIAS:
                b = tl.inline_asm_elementwise(
                    BIAS_CODE, BIAS_KINDS, (place, shared + t * (PAIRED_DIM // 2)),
                    dtype=(tl.float32,) * 4, is_pure=False, pack=1,
                )  # fmt: skip
            totals = tl.inline_asm_elementwise(
                SCORE_CODE, SCORE_KINDS, (lane, shared + QUERY + digit_at, shared + K_MASKS) + k_words,  # noqa: RUF005
                dtype=(tl.int32,) * 4, is_pure=False, pack=1,
            )  # fmt: skip
            # Keys and values are read one block ahead, into the registers that the block's own leave.
            own_kn, own_vn = kn, vn
            kn = scales_of(k_scale, first + BLOCK + k_own, end)
            vn = scales_of(v_scale, first + BLOCK + k_own, end)
            k_words = _read(k_row, first + BLOCK + k_own, end, k_word, KEYS_CODE, KEYS_KINDS, K_WORDS)
            own_b = b
            if HAS_POSITIONS:
                b = _four(bias_row, first + BLOCK + k_own, end, tokens, FOUR_CODE, FOUR_KINDS)
            one, mass, weight, weights, alpha, empty = _weigh(
                first + k_own, end, totals, own_kn, own_vn, own_b, gain, constant, dithers, one, mass, weight
            )
            sums = tl.inline_asm_elementwise(
                EMPTY_CODE, EMPTY_KINDS, (empty, alpha, lane, shared) + sums,  # noqa: RUF005
                dtype=(tl.int32,) * SUMS, is_pure=False, pack=1,
            )  # fmt: skip
            sums = tl.inline_asm_elementwise(
                SUM_CODE, SUM_KINDS,
                weights + (weights_to, weights_at, shared + V_MASKS) + v_words + sums,  # noqa: RUF005
                dtype=(tl.int32,) * SUMS, is_pure=False, pack=1,
            )  # fmt: skip
            v_words = _read(v_row, first + BLOCK + v_own, end, v_word, VALUES_CODE, VALUES_KINDS, V_WORDS)

    tl.store(part_max + part, tl.max(one, 0))
    tl.store(part_sum + part, tl.sum(mass, 0))
    tl.store(part_weight + part, tl.sum(weight, 0) / UNIT)
    out = (part_out + part.to(tl.int64) * V_ROWS).to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        EMIT_CODE, EMIT_KINDS, (lane, shared, out) + sums, dtype=tl.int32, is_pure=False, pack=1  # noqa: RUF005
    )  # fmt: skip
