"""Decode attention over packed keys and values in plain Triton: any layout, any CUDA GPU, and the interpreter.

For a query q (scaled), keys k^_j = n_j T[code_j] (s D) + R_j c_k and values v^_j = n'_j T'[code'_j] (s' D') + c_v,

    score_j = n_j <q (s D)^T, T[code_j]> + <q, R_j c_k>        p = softmax(score)
    out     = (sum_j p_j n'_j T'[code'_j]) (s' D') + (sum_j p_j) c_v + sum over sinks of p_i v_i

in three launches: `project_query_kernel` makes q (s D)^T and the position term, `attend_split_kernel` goes once
over the codes of one sequence, head and range of tokens, and `combine_kernel` joins the ranges in order, adds
the sinks and maps back. Every sum has one fixed order, so results are the same bits from run to run. Scores are in
units of log 2 throughout: softmax is taken with exp2. Kernels that do little are kept short: code that runs once
costs its own fetching.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.reference import SCALE_STEPS_PER_OCTAVE, SCALE_ZERO

LOG2E = tl.constexpr(1.4426950408889634)
STEPS = tl.constexpr(SCALE_STEPS_PER_OCTAVE)
ZERO = tl.constexpr(SCALE_ZERO)
NEGATIVE = tl.constexpr(-1e30)  # below every score, yet finite: its differences are no NaN


@triton.jit
def project_query_kernel(
    query, q_b, q_h, q_q, q_d, key_map, centre, cos, sin, rope_t, rope_d, folded, bias, rows, tokens,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, AXES: tl.constexpr,
    DIM_PAD: tl.constexpr, AXES_PAD: tl.constexpr, HALF_PAD: tl.constexpr,
    ROW_BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries in coded axes, and the scores of the keys' centre at each position.

        folded[b, h, q] = log2(e) q map[h]                     bias[b, h, q, j] = log2(e) <q, R_j c[h]>

    query any float [B, H, Q, d], key_map f32 [H, d, A], centre f32 [H, d], cos and sin f32 [T, d], folded f32
    [B, H, Q, A], bias f32 [B, H, Q, T]. Program (h, r, 0) folds the r-th block of rows (b, q) of head h,
    (h, r, 1 + t) does the t-th block of its bias.
    """
    head = tl.program_id(0)
    row = tl.program_id(1) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    live = row < rows
    batch = row // QUERIES
    queries = query + batch.to(tl.int64) * q_b + head * q_h + (row % QUERIES) * q_q
    out_row = (batch.to(tl.int64) * HEADS + head) * QUERIES + row % QUERIES
    if tl.program_id(2) == 0:
        axis = tl.arange(0, AXES_PAD)
        result = tl.zeros((ROW_BLOCK, AXES_PAD), tl.float32)
        for start in tl.static_range(0, DIM_PAD, DIM_BLOCK):
            dim = start + tl.arange(0, DIM_BLOCK)
            mask = live[:, None] & (dim < DIM)[None, :]
            q = tl.load(queries[:, None] + dim[None, :] * q_d, mask=mask, other=0.0).to(tl.float32)
            inside = (dim < DIM)[:, None] & (axis < AXES)[None, :]
            weight_at = key_map + (head * DIM + dim[:, None]) * AXES + axis[None, :]
            weight = tl.load(weight_at, mask=inside, other=0.0)
            result = tl.dot(q, weight, result, input_precision="tf32x3")
        target = folded + out_row[:, None] * AXES + axis[None, :]
        tl.store(target, result * LOG2E, mask=live[:, None] & (axis < AXES)[None, :])
    else:
        half: tl.constexpr = DIM // 2
        pair = tl.arange(0, HALF_PAD)
        token = (tl.program_id(2) - 1) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
        paired = live[:, None] & (pair < half)[None, :]
        first = tl.load(queries[:, None] + pair[None, :] * q_d, mask=paired, other=0.0).to(tl.float32)
        second = tl.load(queries[:, None] + (pair + half)[None, :] * q_d, mask=paired, other=0.0).to(tl.float32)
        c_first = tl.load(centre + head * DIM + pair, mask=pair < half, other=0.0)[None, :]
        c_second = tl.load(centre + head * DIM + half + pair, mask=pair < half, other=0.0)[None, :]
        at = token[None, :].to(tl.int64) * rope_t + pair[:, None] * rope_d
        there = (token < tokens)[None, :] & (pair < half)[:, None]
        cosine = tl.load(cos + at, mask=there, other=0.0)
        sine = tl.load(sin + at, mask=there, other=0.0)
        total = tl.dot(first * c_first + second * c_second, cosine, input_precision="tf32x3")
        total += tl.dot(second * c_first - first * c_second, sine, input_precision="tf32x3")
        there_bias = bias + out_row[:, None] * tokens + token[None, :]
        tl.store(there_bias, total * LOG2E, mask=live[:, None] & (token < tokens)[None, :])


@triton.jit(do_not_specialize=["rows", "tokens", "sinks", "b_r"])
def position_scores_kernel(
    query, q_b, q_h, q_q, q_d, centre, centre_at, positions, sinks, bias, b_r, rows, tokens,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, EXACT: tl.constexpr,
    ROW_BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The scores of keys' centres that each position has of its own.

        bias[b, h, q, j] = log2(e) <q, c[h] + centre_at[h, j + sinks]>, the last position's from there on

    query any float [B, H, Q, d], c f32 [H, d], centre_at f16 [H, `positions`, d], bias f32 [B, H, Q, T], a row in
    b_r numbers. EXACT: 16 bits hold the query. Program (h, r, t): the r-th block of rows (b, q) of head h, the
    t-th of tokens.
    """
    position_tile(
        query, q_b, q_h, q_q, q_d, centre, centre_at, positions, sinks, bias, b_r, rows, tokens,
        tl.program_id(0), tl.program_id(1), tl.program_id(2),
        HEADS, QUERIES, DIM, DIM_PAD, EXACT, ROW_BLOCK, TOKEN_BLOCK, EARLY,
    )  # fmt: skip


@triton.jit
def position_tile(
    query, q_b, q_h, q_q, q_d, centre, centre_at, positions, sinks, bias, b_r, rows, tokens,
    head, row_block, token_block,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, EXACT: tl.constexpr,
    ROW_BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`position_scores_kernel` for one head, block of rows and block of tokens."""
    row = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    token = token_block * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    dim = tl.arange(0, DIM_PAD)
    live = row < rows
    batch = (row // QUERIES).to(tl.int64)
    position = tl.minimum(token + sinks, positions - 1)
    at = centre_at + (head * positions + position)[:, None] * DIM + dim[None, :]
    own = tl.trans(tl.load(at, mask=(token < tokens)[:, None] & (dim < DIM)[None, :], other=0.0))
    constant = tl.load(centre + head * DIM + dim, mask=dim < DIM, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    queries = query + batch * q_b + head * q_h + (row % QUERIES) * q_q
    asked = live[:, None] & (dim < DIM)[None, :]
    q = tl.load(queries[:, None] + dim[None, :] * q_d, mask=asked, other=0.0).to(tl.float32)
    high = tl.clamp(q, -65504.0, 65504.0).to(tl.float16)
    total = tl.dot(high, own)
    if not EXACT:
        total = tl.dot((q - high.to(tl.float32)).to(tl.float16), own, total)
    total += tl.sum(q * constant[None, :], 1)[:, None]
    target = bias + ((batch * HEADS + head) * QUERIES + row % QUERIES)[:, None] * b_r + token[None, :]
    tl.store(target, total * LOG2E, mask=live[:, None] & (token < tokens)[None, :])


@triton.jit
def _levels(
    codes, c_word, c_token, c_lane, pieces, start, table, token, valid, head,
    AXES: tl.constexpr, AXES_PAD: tl.constexpr, PIECES: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Levels f32 [tokens, AXES_PAD] of one sequence and head: gather each code's pieces, then its level.

    TABLE 0: levels are on a uniform grid, and `table` is `PreparedSide.line`.
    """
    axis = tl.arange(0, AXES_PAD)
    own = axis < AXES
    code = tl.zeros((token.shape[0], AXES_PAD), tl.int32)
    for piece in tl.static_range(PIECES):
        fields = pieces + (head * PIECES + piece) * 5 * AXES + axis
        word = tl.load(fields, mask=own, other=0)
        lane = tl.load(fields + AXES, mask=own, other=0)
        shift = tl.load(fields + 2 * AXES, mask=own, other=0)
        bits = tl.load(fields + 3 * AXES, mask=own, other=0)
        low = tl.load(fields + 4 * AXES, mask=own, other=0)
        at = word.to(tl.int64) * c_word + lane * c_lane
        there = codes + token[:, None].to(tl.int64) * c_token + at[None, :]
        byte = tl.load(there, mask=valid[:, None] & (bits > 0)[None, :], other=0).to(tl.int32)
        code |= ((byte >> shift[None, :]) & bits[None, :]) << low[None, :]
    if TABLE == 0:
        step = tl.load(table + head * 2 * AXES + axis, mask=own, other=0.0)
        zero = tl.load(table + head * 2 * AXES + AXES + axis, mask=own, other=0.0)
        return code.to(tl.float32) * step[None, :] - zero[None, :]
    first = tl.load(start + head * AXES + axis, mask=own, other=TABLE - 1)
    return tl.load(table + head * TABLE + first[None, :] + code)


@triton.jit
def _scales(scales, s_token, token, valid):
    """Scales f32 of a block of tokens; 0 where there is no token."""
    byte = tl.load(scales + token * s_token, mask=valid, other=0).to(tl.float32)
    return tl.where(valid, tl.exp2((byte - ZERO) / STEPS), 0.0)


@triton.jit
def attend_split_kernel(
    folded, bias, lengths,
    k_codes, k_b, k_h, k_word, k_token, k_lane, k_scales, ks_b, ks_h, ks_t, k_pieces, k_start, k_table,
    v_codes, v_b, v_h, v_word, v_token, v_scales, vs_b, vs_h, vs_t, v_pieces, v_start, v_table,
    part_max, part_sum, part_out, tokens, chunk, sinks,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, QUERY_PAD: tl.constexpr, BLOCK: tl.constexpr,
    K_AXES: tl.constexpr, K_PAD: tl.constexpr, K_PIECES: tl.constexpr, K_TABLE: tl.constexpr,
    V_AXES: tl.constexpr, V_PAD: tl.constexpr, V_PIECES: tl.constexpr, V_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
):  # fmt: skip
    """One range of `chunk` tokens of one sequence and head: the softmax's maximum, mass and weighted levels.

        m = max_j score_j      l = sum_j 2^(score_j - m)      acc = sum_j 2^(score_j - m) n'_j T'[code'_j]

    folded f32 [B, H, Q, A], bias f32 [B, H, Q, T], codes and scales as in `Packed`, lengths int32 [B] with the
    sinks counted; part_max and part_sum f32 [B, H, Q, S], part_out f32 [B, H, Q, S, A']. Program (b H + h, s).
    """
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    end = tokens
    if HAS_LENGTHS:
        end = tl.maximum(tl.load(lengths + batch).to(tl.int32) - sinks, 0)
        end = tl.minimum(end, tokens)
    begin = split * chunk
    end = tl.minimum(end, begin + chunk)

    index = tl.arange(0, QUERY_PAD)
    k_axis = tl.arange(0, K_PAD)
    v_axis = tl.arange(0, V_PAD)
    row = pair * QUERIES + index
    asked = index < QUERIES
    at = row[None, :] * K_AXES + k_axis[:, None]
    q = tl.load(folded + at, mask=asked[None, :] & (k_axis < K_AXES)[:, None], other=0.0)
    top = tl.full((QUERY_PAD,), NEGATIVE, tl.float32)
    mass = tl.zeros((QUERY_PAD,), tl.float32)
    acc = tl.zeros((V_PAD, QUERY_PAD), tl.float32)
    k_codes += batch * k_b + head * k_h
    v_codes += batch * v_b + head * v_h
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        valid = token < end
        y = _levels(
            k_codes, k_word, k_token, k_lane, k_pieces, k_start, k_table, token, valid, head,
            K_AXES, K_PAD, K_PIECES, K_TABLE,
        )  # fmt: skip
        if QUERY_PAD == 1:  # noqa: SIM108  Triton compiles one branch only
            score = tl.sum(tl.trans(q) * y, 1)[:, None]
        else:
            score = tl.dot(y, q, input_precision="tf32x3")
        if K_SCALED:
            score *= _scales(k_scales + batch * ks_b + head * ks_h, ks_t, token, valid)[:, None]
        if HAS_BIAS:
            there = bias + row[None, :] * tokens + token[:, None]
            score += tl.load(there, mask=valid[:, None] & asked[None, :], other=0.0)
        score = tl.where(valid[:, None], score, NEGATIVE)
        new_top = tl.maximum(top, tl.max(score, 0))
        p = tl.where(valid[:, None], tl.exp2(score - new_top[None, :]), 0.0)
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(p, 0)
        if V_SCALED:
            p *= _scales(v_scales + batch * vs_b + head * vs_h, vs_t, token, valid)[:, None]
        y = _levels(
            v_codes, v_word, v_token, 0, v_pieces, v_start, v_table, token, valid, head,
            V_AXES, V_PAD, V_PIECES, V_TABLE,
        )  # fmt: skip
        if QUERY_PAD == 1:
            acc = acc * shrink[None, :] + tl.sum(y * p, 0)[:, None]
        else:
            acc = acc * shrink[None, :] + tl.dot(tl.trans(y), p, input_precision="tf32x3")
        top = new_top
    part = row * tl.num_programs(1) + split
    tl.store(part_max + part, top, mask=asked)
    tl.store(part_sum + part, mass, mask=asked)
    target = part_out + part[None, :] * V_AXES + v_axis[:, None]
    tl.store(target, acc, mask=asked[None, :] & (v_axis < V_AXES)[:, None])


@triton.jit(do_not_specialize=["rows", "splits", "axes", "whole"])
def combine_kernel(
    part_max, part_sum, part_weight, part_out, query, q_b, q_h, q_q, q_d, lengths,
    sink_k, sk_b, sk_h, sk_t, sk_d, sink_v, sv_b, sv_h, sv_t, sv_d,
    value_map, offset, centre, out, rows, splits, axes, whole,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, AXES_STEP: tl.constexpr,
    DIM_PAD: tl.constexpr, AXES_BLOCK: tl.constexpr, AXES_BLOCKS: tl.constexpr, MAP_EARLY: tl.constexpr,
    SINKS: tl.constexpr, ROW_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_WEIGHT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Join the ranges of each row (b, q) of head h in order, add the sinks, map back to head_dim.

        out = (sum_s w_s acc_s map + sum_s w_s l_s c + sum_i p_i v_i) / (sum_s w_s l_s + sum_i p_i)

    with w_s = 2^(m_s - m); where the codes were summed as they are stored, (sum_s w_s weight_s) offset is added to
    the numerator: what levels are off by. offset f32 [H, d]. part_* as `attend_split_kernel` leaves them, query
    any float [B, H, Q, d], sinks any float [B, H, SINKS, d], value_map f32 [H, A, d], centre f32 [H, d], out any
    float [B, H, Q, d], contiguous. A row without any token gets 0. Program (h, r) does the r-th block of rows: one
    row where rows are few, by sums; else 16 or more, by matrix products. What needs no range, the sinks and, where
    MAP_EARLY, the map, comes before the wait for the ranges. Axes are taken AXES_BLOCK at a time; A is a multiple
    of AXES_STEP: that makes loads wide. Of the first `whole` rows (b, h, q) there is one range.
    """
    axes = axes // AXES_STEP * AXES_STEP
    head = tl.program_id(0)
    row = tl.program_id(1) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    live = row < rows
    batch = (row // QUERIES).to(tl.int64)
    out_row = (batch * HEADS + head) * QUERIES + row % QUERIES
    dim = tl.arange(0, DIM_PAD)
    axis = tl.arange(0, AXES_BLOCK)
    own_dim = live[:, None] & (dim < DIM)[None, :]
    map_at = value_map + (head * axes + axis[:, None]) * DIM + dim[None, :]
    back = ()
    if MAP_EARLY:  # a large one does not fit in the registers beside the rest
        for i in tl.static_range(AXES_BLOCKS):
            inside = (i * AXES_BLOCK + axis < axes)[:, None] & (dim < DIM)[None, :]
            back = back + (tl.load(map_at + i * AXES_BLOCK * DIM, mask=inside, other=0.0),)  # noqa: RUF005
    constant = tl.load(centre + head * DIM + dim, mask=dim < DIM, other=0.0)
    off = tl.zeros((DIM_PAD,), tl.float32)
    if HAS_WEIGHT:
        off = tl.load(offset + head * DIM + dim, mask=dim < DIM, other=0.0)
    top = tl.full((ROW_BLOCK,), NEGATIVE, tl.float32)
    mass = tl.zeros((ROW_BLOCK,), tl.float32)
    total = tl.zeros((ROW_BLOCK, DIM_PAD), tl.float32)
    if SINKS:
        at = query + batch * q_b + head * q_h + (row % QUERIES) * q_q
        q = tl.load(at[:, None] + dim[None, :] * q_d, mask=own_dim, other=0.0).to(tl.float32)
        for sink in tl.static_range(SINKS):
            has = live
            if HAS_LENGTHS:
                has = live & (sink < tl.load(lengths + batch, mask=live, other=0))
            k_at = (batch * sk_b + head * sk_h + sink * sk_t)[:, None] + dim[None, :] * sk_d
            v_at = (batch * sv_b + head * sv_h + sink * sv_t)[:, None] + dim[None, :] * sv_d
            k = tl.load(sink_k + k_at, mask=own_dim & has[:, None], other=0.0).to(tl.float32)
            v = tl.load(sink_v + v_at, mask=own_dim & has[:, None], other=0.0).to(tl.float32)
            score = tl.where(has, tl.sum(q * k, 1) * LOG2E, NEGATIVE)
            new_top = tl.maximum(top, score)
            shrink = tl.exp2(top - new_top)
            p = tl.where(has, tl.exp2(score - new_top), 0.0)
            mass = mass * shrink + p
            total = total * shrink[:, None] + v * p[:, None]
            top = new_top
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()  # of our own kernels, none reads before its own wait
    coded = tl.zeros((ROW_BLOCK,), tl.float32)
    heavy = tl.zeros((ROW_BLOCK,), tl.float32)
    acc = (tl.zeros((ROW_BLOCK, AXES_BLOCK), tl.float32),) * AXES_BLOCKS
    for first in range(0, splits, SPLIT_BLOCK):
        split = first + tl.arange(0, SPLIT_BLOCK)
        first_part = tl.where(out_row < whole, out_row, whole + (out_row - whole) * splits)
        part = first_part[:, None] + split[None, :]
        there = live[:, None] & (split[None, :] < tl.where(out_row < whole, 1, splits)[:, None])
        m = tl.load(part_max + part, mask=there, other=NEGATIVE)
        held = tl.load(part_sum + part, mask=there, other=0.0)
        new_top = tl.maximum(top, tl.max(m, 1))
        shrink, weight = tl.exp2(top - new_top), tl.exp2(m - new_top[:, None])
        coded = coded * shrink + tl.sum(weight * held, 1)
        if HAS_WEIGHT:
            own_weight = tl.load(part_weight + part, mask=there, other=0.0)
            heavy = heavy * shrink + tl.sum(weight * own_weight, 1)
        values_at = part_out + part[:, :, None] * axes + axis[None, None, :]
        added = ()
        for i in tl.static_range(AXES_BLOCKS):
            own = there[:, :, None] & (i * AXES_BLOCK + axis < axes)[None, None, :]
            values = tl.load(values_at + i * AXES_BLOCK, mask=own, other=0.0)
            added = added + (acc[i] * shrink[:, None] + tl.sum(values * weight[:, :, None], 1),)  # noqa: RUF005
        acc = added
        mass *= shrink
        total *= shrink[:, None]
        top = new_top
    for i in tl.static_range(AXES_BLOCKS):
        if MAP_EARLY:
            matrix = back[i]
        else:
            inside = (i * AXES_BLOCK + axis < axes)[:, None] & (dim < DIM)[None, :]
            matrix = tl.load(map_at + i * AXES_BLOCK * DIM, mask=inside, other=0.0)
        if ROW_BLOCK == 1:
            total += tl.sum(tl.sum(acc[i], 0)[:, None] * matrix, 0)[None, :]
        else:
            total = tl.dot(acc[i], matrix, total, input_precision="tf32x3")
    total += coded[:, None] * constant[None, :]
    if HAS_WEIGHT:
        total += heavy[:, None] * off[None, :]
    mass += coded
    result = total / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(out + out_row[:, None] * DIM + dim[None, :], result.to(out.dtype.element_ty), mask=own_dim)
