# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""Decode attention over a uniform grid, with inline PTX: one warp a program, every tensor one value a lane.

For one query token a sequence and codes in 4 byte lanes. Levels are step (code - middle), so there is no table:
a shift and a mask pull 4 codes out of a word, and `dp2a` multiplies them by 16-bit integers two at a time, keys by
the query, values by the softmax's weights. Lanes of a warp own, of a block of 128 tokens,

    keys     lane l: tokens 4 l .. 4 l + 3, all axes: their 4 words of a plane are 16 bytes
    values   lane 4 u + i: tokens 16 u .. 16 u + 15 of byte lane i of every word: 16 bytes of a plane

so the weights of a value lane's tokens lie in the 4 lanes of its own quad, which share one running maximum; the
quads are joined once, at the end. `BLOCK` tokens of a field cost 12 to 16 instructions a lane, for 16 codes. The
scores of the keys' centre, <q, R_j c>, come from the tensor cores, 128 tokens a product (`assembly.bias_code`).

What bounds it was measured with Nsight Compute: loads of small tables that queue behind the codes (so they are
kept in shared memory), warps a multiprocessor (so the order of a block's work is the one that needs the fewest
registers), then instructions issued.

Which field lies where is data, not code (`prepared.Fields`): one compiled kernel serves every profile of one F.
Weights are rounded with a dither that differs from token to token: many weights below 2^-16 of the greatest keep
their sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.attend import LOG2E, NEGATIVE, STEPS, ZERO
from turboesm_kernels.reference import TURN

BLOCK = tl.constexpr(TURN)
UNIT = tl.constexpr(65534.0)  # of a weight; with its dither, below 2^16
QUERY_UNIT = tl.constexpr(32767.0)


@triton.jit
def _quad_max(x):
    """The greatest x of a lane's quad."""
    other = tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=f,f", (x,), dtype=tl.float32, is_pure=True, pack=1
    )
    x = tl.maximum(x, other)
    other = tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;", "=f,f", (x,), dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.maximum(x, other)


@triton.jit
def _byte_steps(word, i: tl.constexpr):
    """log2 of the scale in byte i of a word: (byte - 128) / 32; the byte becomes a float's mantissa."""
    bits = ((word >> (8 * i)) & 0xFF) | 0x4B000000
    return (bits.to(tl.float32, bitcast=True) - (8388608.0 + ZERO)) / STEPS


@triton.jit
def _score(total, word, i: tl.constexpr, gain, constant, bias, token, end):
    """The score of the lane's token i in units of log 2, `NEGATIVE` past the end."""
    score = (total.to(tl.float32) * gain + constant) * tl.exp2(_byte_steps(word, i)) + bias
    return tl.where(token + i < end, score, NEGATIVE)


@triton.jit
def _phase(query, q_d, centre, pair, DIM: tl.constexpr):
    """<q, R_j c> as coefficients of RoPE's cosines, then sines, at j, of each lane's pairs from `pair` on.

    In units of log 2, with i < d/2 and i' = i + d/2: q_i c_i + q_i' c_i' of the cosine, q_i' c_i - q_i c_i' of the
    sine. Those beyond float16's range, which no model has, are clamped.
    """
    even = ()
    odd = ()
    for i in tl.static_range(DIM // 8):
        q = tl.load(query + (pair + i) * q_d).to(tl.float32) * LOG2E
        r = tl.load(query + (pair + i + DIM // 2) * q_d).to(tl.float32) * LOG2E
        c = tl.load(centre + pair + i)
        d = tl.load(centre + pair + i + DIM // 2)
        even = even + (tl.clamp(q * c + r * d, -60000.0, 60000.0),)  # noqa: RUF005  Triton 3.6 unpacks no tuples
        odd = odd + (tl.clamp(r * c - q * d, -60000.0, 60000.0),)  # noqa: RUF005
    return even + odd


@triton.jit
def _two_halves(x):
    """x as a sum of two float16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit(do_not_specialize=["batch", "fields", "table"])
def fast_fold_kernel(
    query, q_b, q_h, q_d, key_map, factors, middle, shifts, masks, descriptors, scalars, batch, fields, table,
    HEADS: tl.constexpr, DIM: tl.constexpr, FIELDS_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
    FOLD_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Queries in coded axes as 16-bit integers.

        r = log2(e) q map[h]     gain = max |r| / 32767     r~ = round(r / gain)     constant = -gain <r~, middle>

    query any float [B, H, 1, d], key_map f16 [2, H, d, 4 F] and factors f32 [H, 4 F] (`in_halves`), middle f32
    [H, 4 F], shifts and masks int32 [H, table]; descriptors int32 [B, H, F, 4] (see `key_code`), scalars f32
    [B, H, 2] = (gain, constant). Program (h, g): the g-th block of the sequences of head h.
    """
    head, group = tl.program_id(0), tl.program_id(1)
    item = group * FOLD_BLOCK + tl.arange(0, FOLD_BLOCK)
    live = item < batch
    dim = tl.arange(0, DIM_PAD)
    column = tl.arange(0, 4 * FIELDS_PAD)
    own = column < 4 * fields
    weight_at = key_map + (head * DIM + dim[:, None]) * (4 * fields) + column[None, :]
    inside = (dim < DIM)[:, None] & own[None, :]
    weight_high = tl.load(weight_at, mask=inside, other=0.0)
    weight_low = tl.load(weight_at + HEADS * DIM * 4 * fields, mask=inside, other=0.0)
    factor = tl.load(factors + head * 4 * fields + column, mask=own, other=0.0) * LOG2E
    centre_of_piece = tl.load(middle + head * 4 * fields + column, mask=own, other=0.0)
    field = tl.arange(0, FIELDS_PAD)
    shift = tl.load(shifts + head * table + field, mask=field < fields, other=0)
    bits = tl.load(masks + head * table + field, mask=field < fields, other=0)
    if EARLY:  # wait for what was launched before, then let what comes after start: it may read the cache at once
        gdc_wait()
        gdc_launch_dependents()
    q_at = item.to(tl.int64) * q_b + head * q_h
    q = tl.load(query + q_at[:, None] + dim[None, :] * q_d, mask=live[:, None] & (dim < DIM)[None, :], other=0.0)
    q = q.to(tl.float32)
    if FOLD_BLOCK == 1:
        weight = weight_high.to(tl.float32) + weight_low.to(tl.float32)
        r = tl.sum(tl.sum(q, 0)[:, None] * weight, 0)[None, :] * factor[None, :]
    else:
        q_high, q_low = _two_halves(q)
        r = tl.dot(q_low, weight_high)
        r = tl.dot(q_high, weight_low, r)
        r = tl.dot(q_high, weight_high, r) * factor[None, :]
    gain = tl.max(tl.abs(r), 1) / QUERY_UNIT + 1e-30
    whole = tl.floor(r / gain[:, None] + 0.5)
    constant = -gain * tl.sum(whole * centre_of_piece[None, :], 1)
    low, high = tl.split(tl.reshape(whole.to(tl.int32), (FOLD_BLOCK, 2 * FIELDS_PAD, 2)))
    words = (low & 0xFFFF) | (high << 16)
    front, back = tl.split(tl.reshape(words, (FOLD_BLOCK, FIELDS_PAD, 2)))
    row = item.to(tl.int64) * HEADS + head
    shift = tl.broadcast_to(shift[None, :], (FOLD_BLOCK, FIELDS_PAD))
    bits = tl.broadcast_to(bits[None, :], (FOLD_BLOCK, FIELDS_PAD))
    fours = tl.join(tl.join(shift, front), tl.join(bits, back))  # shift, bits, front, back
    target = descriptors + row[:, None] * (4 * fields) + column[None, :]
    tl.store(target, tl.reshape(fours, (FOLD_BLOCK, 4 * FIELDS_PAD)), mask=live[:, None] & own[None, :])
    tl.store(scalars + row * 2, gain, mask=live)
    tl.store(scalars + row * 2 + 1, constant, mask=live)


@triton.jit
def _read(
    first, token, end, row, stride, shared, token_bytes, scale, scale_token,
    LOAD_CODE: tl.constexpr, LOAD_KINDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A lane's part of a side's block: the scales of its 4 tokens from `scale_token` on, the words of `load_code`.

    Past the end, lanes read what the last tokens' lanes read, and a block that starts there not at all.
    """
    own = tl.minimum(scale_token, tl.maximum(end - 1, 0) // 4 * 4)
    n = tl.load(scale + own // 4, eviction_policy="evict_first")
    wanted = token * 0 + (first < end).to(tl.int32)
    words = tl.inline_asm_elementwise(
        LOAD_CODE, LOAD_KINDS, (row + token * token_bytes, stride, shared, wanted),
        dtype=(tl.int32,) * (4 * WORDS), is_pure=False, pack=1,
    )  # fmt: skip
    return n, words


@triton.jit
def _bias(
    lane, shared, ROTATION: tl.constexpr, BIAS_CODE: tl.constexpr, BIAS_KINDS: tl.constexpr,
    DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The centre's scores of a lane's 4 tokens of the block."""
    b = (0.0, 0.0, 0.0, 0.0)
    if HAS_BIAS:
        b = tl.inline_asm_elementwise(
            BIAS_CODE, BIAS_KINDS, (shared + lane * 16, shared + ROTATION + lane % 4 * (DIM // 2)),
            dtype=(tl.float32,) * 4, is_pure=False, pack=1,
        )  # fmt: skip
    return b


@triton.jit
def _weigh(first, end, lane, totals, kn, vn, b, gain, constant, top, mass, weight):
    """The online softmax over a lane's 4 tokens: its state after, the weights as 16-bit integers, what shrank."""
    token = first + lane * 4
    s0 = _score(totals[0], kn, 0, gain, constant, b[0], token, end)
    s1 = _score(totals[1], kn, 1, gain, constant, b[1], token, end)
    s2 = _score(totals[2], kn, 2, gain, constant, b[2], token, end)
    s3 = _score(totals[3], kn, 3, gain, constant, b[3], token, end)
    x0 = s0 + _byte_steps(vn, 0)
    x1 = s1 + _byte_steps(vn, 1)
    x2 = s2 + _byte_steps(vn, 2)
    x3 = s3 + _byte_steps(vn, 3)
    new_top = tl.maximum(top, _quad_max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))))
    # A quad without a token yet has `NEGATIVE` as its maximum; its weights must still be 0.
    safe = tl.maximum(new_top, 0.5 * NEGATIVE)
    alpha = tl.exp2(top - safe)
    mass = mass * alpha + ((tl.exp2(s0 - safe) + tl.exp2(s1 - safe)) + (tl.exp2(s2 - safe) + tl.exp2(s3 - safe)))
    dither = lane.to(tl.float32) * 0.4721359  # 4 golden ratios; a token's is 1 golden ratio after the one before
    w0 = (tl.exp2(x0 - safe) * UNIT + (dither - tl.floor(dither))).to(tl.int32)
    w1 = (tl.exp2(x1 - safe) * UNIT + (dither + 0.6180340 - tl.floor(dither + 0.6180340))).to(tl.int32)
    w2 = (tl.exp2(x2 - safe) * UNIT + (dither + 0.2360680 - tl.floor(dither + 0.2360680))).to(tl.int32)
    w3 = (tl.exp2(x3 - safe) * UNIT + (dither + 0.8541020 - tl.floor(dither + 0.8541020))).to(tl.int32)
    weight = weight * alpha + (w0 + w1 + w2 + w3).to(tl.float32)
    return new_top, mass, weight, w0 | (w1 << 16), w2 | (w3 << 16), alpha


@triton.jit(do_not_specialize=["angles", "sinks"])
def fast_split_kernel(
    query, q_b, q_h, q_d, centre, descriptors, scalars, turns, block_turn, cos, sin, rope_t, angles, lengths,
    k_codes, k_b, k_h, k_word, k_scales, ks_b, ks_h,
    v_codes, v_b, v_h, v_plane, v_scales, vs_b, vs_h, k_places, v_places, v_masks,
    part_max, part_sum, part_weight, part_out, tokens, chunk, sinks,
    HEADS: tl.constexpr, DIM: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, V_TABLE: tl.constexpr,
    ROTATION: tl.constexpr, OPEN_CODE: tl.constexpr, OPEN_KINDS: tl.constexpr,
    ROW_CODE: tl.constexpr, ROW_KINDS: tl.constexpr, STATE_CODE: tl.constexpr, STATE_KINDS: tl.constexpr,
    FIRST_KEYS_CODE: tl.constexpr, FIRST_KEYS_KINDS: tl.constexpr,
    FIRST_VALUES_CODE: tl.constexpr, FIRST_VALUES_KINDS: tl.constexpr,
    KEYS_CODE: tl.constexpr, KEYS_KINDS: tl.constexpr, VALUES_CODE: tl.constexpr, VALUES_KINDS: tl.constexpr,
    SCORE_CODE: tl.constexpr, SCORE_KINDS: tl.constexpr, SUM_CODE: tl.constexpr, SUM_KINDS: tl.constexpr,
    BIAS_CODE: tl.constexpr, BIAS_KINDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    K_WORDS: tl.constexpr, V_WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One range of `chunk` tokens of one sequence and head, with one warp.

        m = max_j (score_j + log2 n'_j)     w_j = 2^(score_j + log2 n'_j - m), in units of 2^-16
        part_sum = sum_j 2^(score_j - m)    part_weight = sum_j w_j    part_out[f, i] = sum_j w_j byte_jfi

    scores in units of log 2; query any float [B, H, 1, d], centre f32 [H, d]; descriptors and scalars as
    `fast_fold_kernel` leaves them, turns and block_turn as in `Rope`, cos and sin f32 [angles, d], rows rope_t
    apart, of packed token 0 on; codes and scales as in `Packed` with aligned strides, k_places, v_places and
    v_masks as in `Fields`; part_max, part_sum and part_weight f32 [B, H, S], part_out f32 [B, H, S, 4 F'].
    """
    pair_row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, head = pair_row // HEADS, pair_row % HEADS
    end = tokens
    if HAS_LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int32) - sinks, 0), tokens)
    begin = split * chunk
    end = tl.minimum(end, begin + chunk)

    lane = tl.arange(0, 32)
    row = (descriptors + pair_row * (4 * K_FIELDS)).to(tl.int64, bitcast=True)
    k_place = (k_places + head * ((K_WORDS + 3) // 4 * 4)).to(tl.int64, bitcast=True)
    v_place = (v_places + head * ((V_WORDS + 3) // 4 * 4)).to(tl.int64, bitcast=True)
    masks = (v_masks + head * V_TABLE).to(tl.int64, bitcast=True)
    k_row = (k_codes + batch * k_b + head * k_h).to(tl.int64, bitcast=True)
    v_plane0 = (v_codes + batch * v_b + head * v_h).to(tl.int64, bitcast=True)
    v_row = v_plane0 + (lane % 4) * v_plane
    k_scale = (k_scales + batch * ks_b + head * ks_h).to(tl.pointer_type(tl.int32), bitcast=True)
    v_scale = (v_scales + batch * vs_b + head * vs_h).to(tl.pointer_type(tl.int32), bitcast=True)
    top = tl.full((32,), NEGATIVE, tl.float32)
    mass, weight = tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32)
    sums = (tl.zeros((32,), tl.float32),) * V_FIELDS
    if EARLY:
        gdc_launch_dependents()
    # The codes do not wait for `fast_fold_kernel`. A block's values are read once its keys are asked, and the
    # next block's keys into the registers that these leave: 96 are enough.
    last = tl.maximum(end - 1, 0)
    k_token = tl.minimum(begin + lane * 4, last // 4 * 4)
    v_token = tl.minimum(begin + lane // 4 * 16, last // 16 * 16)
    kn, k_words_of = _read(
        begin, k_token, end, k_row, k_word, k_place, 4, k_scale, begin + lane * 4,
        FIRST_KEYS_CODE, FIRST_KEYS_KINDS, K_WORDS,
    )  # fmt: skip
    if ONE_BLOCK:
        vn, v_words_of = _read(
            begin, v_token, end, v_row, v_plane * 4, v_place, 1, v_scale, begin + lane * 4,
            FIRST_VALUES_CODE, FIRST_VALUES_KINDS, V_WORDS,
        )  # fmt: skip
    shared = tl.inline_asm_elementwise(
        OPEN_CODE, OPEN_KINDS,
        (lane, masks, k_place, v_place, turns.to(tl.int64, bitcast=True), block_turn.to(tl.int64, bitcast=True)),
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    b = (tl.zeros((32,), tl.float32),) * 4
    if HAS_BIAS:  # the queries were there before `fast_fold_kernel` began
        pair = lane % 4 * (DIM // 8)
        phase = _phase(query + batch * q_b + head * q_h, q_d, centre + head * DIM, pair, DIM)
        angle = (tl.minimum(begin + lane // 4 * 2, angles - 1) * rope_t + pair).to(tl.int64) * 4
        cos_at, sin_at = cos.to(tl.int64, bitcast=True) + angle, sin.to(tl.int64, bitcast=True) + angle
        if ONE_BLOCK:
            b = tl.inline_asm_elementwise(
                BIAS_CODE, BIAS_KINDS, (turns.to(tl.int64, bitcast=True) + lane * 16, cos_at, sin_at) + phase,  # noqa: RUF005
                dtype=(tl.float32,) * 4, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.inline_asm_elementwise(
                STATE_CODE, STATE_KINDS, (shared + lane * 16, cos_at, sin_at) + phase,  # noqa: RUF005
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    if EARLY:
        gdc_wait()
    tl.inline_asm_elementwise(ROW_CODE, ROW_KINDS, (lane, shared, row), dtype=tl.int32, is_pure=False, pack=1)
    gain = tl.load(scalars + pair_row * 2)
    constant = tl.load(scalars + pair_row * 2 + 1)
    if ONE_BLOCK:
        totals = tl.inline_asm_elementwise(
            SCORE_CODE, SCORE_KINDS, (shared,) + k_words_of,  # noqa: RUF005  Triton 3.6 unpacks no tuples
            dtype=(tl.int32,) * 4, is_pure=False, pack=1,
        )  # fmt: skip
        top, mass, weight, low, high, alpha = _weigh(
            begin, end, lane, totals, kn, vn, b, gain, constant, top, mass, weight
        )
        sums = tl.inline_asm_elementwise(
            SUM_CODE, SUM_KINDS, (low, high, shared, alpha) + v_words_of + sums,  # noqa: RUF005
            dtype=(tl.float32,) * V_FIELDS, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for first in range(begin, end, BLOCK):
            own_b = _bias(lane, shared, ROTATION, BIAS_CODE, BIAS_KINDS, DIM, HAS_BIAS)
            totals = tl.inline_asm_elementwise(
                SCORE_CODE, SCORE_KINDS, (shared,) + k_words_of,  # noqa: RUF005
                dtype=(tl.int32,) * 4, is_pure=False, pack=1,
            )  # fmt: skip
            own_kn = kn
            v_token = tl.minimum(first + lane // 4 * 16, last // 16 * 16)
            vn, v_words_of = _read(
                first, v_token, end, v_row, v_plane * 4, shared, 1, v_scale, first + lane * 4,
                VALUES_CODE, VALUES_KINDS, V_WORDS,
            )  # fmt: skip
            k_token = tl.minimum(first + BLOCK + lane * 4, last // 4 * 4)
            kn, k_words_of = _read(
                first + BLOCK, k_token, end, k_row, k_word, shared, 4, k_scale, first + BLOCK + lane * 4,
                KEYS_CODE, KEYS_KINDS, K_WORDS,
            )  # fmt: skip
            top, mass, weight, low, high, alpha = _weigh(
                first, end, lane, totals, own_kn, vn, own_b, gain, constant, top, mass, weight
            )
            sums = tl.inline_asm_elementwise(
                SUM_CODE, SUM_KINDS, (low, high, shared, alpha) + v_words_of + sums,  # noqa: RUF005
                dtype=(tl.float32,) * V_FIELDS, is_pure=False, pack=1,
            )  # fmt: skip

    part = pair_row * tl.num_programs(1) + split
    warp_top = tl.max(top, 0)
    shrink = tl.exp2(top - tl.maximum(warp_top, 0.5 * NEGATIVE))
    tl.store(part_max + part, warp_top)
    tl.store(part_sum + part, tl.sum(mass * shrink, 0))
    tl.store(part_weight + part, tl.sum(weight * shrink, 0) / UNIT)
    shrink = shrink / UNIT
    target = part_out + part * (4 * V_FIELDS) + tl.arange(0, 4)
    for f in tl.static_range(V_FIELDS):
        tl.store(target + 4 * f, tl.sum(tl.reshape(sums[f] * shrink, (8, 4)), 0))
