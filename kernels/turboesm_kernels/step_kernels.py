# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What a decode step does in a layer before attention reads the codes, in one launch.

The new keys and values are packed, the queries projected, and where positions are learned their centres scored:
none of it needs the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboesm_kernels.pack import pack_rows
from turboesm_kernels.ptx_kernels import fold_rows
from turboesm_kernels.triton_kernels import position_tile


@triton.jit(do_not_specialize=["first_token", "batches", "tokens", "k_words", "v_words", "sinks", "rows", "words"])
def append_and_project_kernel(
    k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, starts, first_token, batches, tokens,
    k_centre, k_analysis, k_factors, k_norm, k_grid, k_widths, k_start, k_levels, k_thresholds, k_deviation,
    k_picks,
    v_centre, v_analysis, v_factors, v_norm, v_grid, v_widths, v_start, v_levels, v_thresholds, v_deviation,
    v_picks,
    cos, sin, rope_t, rope_d, centre_at, positions, sinks,
    k_codes, kc_b, kc_h, kc_word, kc_token, k_words, k_scales, ks_b, ks_h,
    v_codes, vc_b, vc_h, vc_plane, vc_token, v_words, v_scales, vs_b, vs_h,
    query, q_b, q_h, q_q, q_d, x_s, turned, scaling,
    key_map, map_factors, middle, descriptors, scalars, rows, words,
    bias, b_r, held_tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, K_LANES: tl.constexpr, V_LANES: tl.constexpr,
    K_AXES: tl.constexpr, K_PAD: tl.constexpr, K_WORDS: tl.constexpr, K_FIELDS: tl.constexpr,
    K_WIDEST: tl.constexpr, K_LEVELS: tl.constexpr, K_THRESHOLDS: tl.constexpr, K_SCALE: tl.constexpr,
    K_UNIFORM: tl.constexpr,
    V_AXES: tl.constexpr, V_PAD: tl.constexpr, V_WORDS: tl.constexpr, V_FIELDS: tl.constexpr,
    V_WIDEST: tl.constexpr, V_LEVELS: tl.constexpr, V_THRESHOLDS: tl.constexpr, V_SCALE: tl.constexpr,
    V_UNIFORM: tl.constexpr, V_TILED: tl.constexpr,
    HAS_STARTS: tl.constexpr, ONE_TOKEN: tl.constexpr, TURNED: tl.constexpr, POSITIONED: tl.constexpr,
    DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, FOLD_PAD: tl.constexpr,
    FOLD_BLOCK: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr, ROW_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`pack_kernel` for one token of each sequence, `fast_project_query_kernel`, `position_scores_kernel` at once.

    Operands as theirs; key_map and map_factors are the second's. Where PARTS, k, v and query lie side by side in a
    product before RoPE, or in as many parts of it, x_s apart: sums are turned, queries scaled, and rounded as
    `turned` [B, H, Q, d] is, where queries go for attention; angles of sinks are those before packed token 0's.
    Program (h, r, s): block r of head h, of keys where s is 0, values 1, queries 2, and where POSITIONED of the
    scores of tokens (s - 3) TOKEN_BLOCK on.
    """
    head, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if (part == 0) & (block * BLOCK < batches):
        pack_rows(
            k, k_b, k_h, k_t, k_d, x_s, turned, starts, first_token, batches, tokens, head, block,
            k_centre, k_analysis, k_factors, k_norm, k_grid, k_widths, k_start, k_levels, k_thresholds,
            k_deviation, k_picks,
            cos, sin, rope_t, rope_d, centre_at, positions, sinks, k, 0, 0, 0, 0,
            k_codes, kc_b, kc_h, kc_word, kc_token, k_words, k_scales, ks_b, ks_h,
            HEADS, DIM, K_AXES, DIM_PAD, K_PAD, K_LANES, K_WORDS, K_FIELDS, K_WIDEST, K_LEVELS,
            K_THRESHOLDS, K_SCALE, K_UNIFORM, False, False, HAS_STARTS, ONE_TOKEN, TURNED, POSITIONED, False,
            BLOCK, DIM_BLOCK, PARTS, PARTS > 0, EARLY,
        )  # fmt: skip
    elif (part == 1) & (block * BLOCK < batches):
        pack_rows(
            v, v_b, v_h, v_t, v_d, x_s, turned, starts, first_token, batches, tokens, head, block,
            v_centre, v_analysis, v_factors, v_norm, v_grid, v_widths, v_start, v_levels, v_thresholds,
            v_deviation, v_picks,
            cos, sin, rope_t, rope_d, centre_at, positions, sinks, v, 0, 0, 0, 0,
            v_codes, vc_b, vc_h, vc_plane, vc_token, v_words, v_scales, vs_b, vs_h,
            HEADS, DIM, V_AXES, DIM_PAD, V_PAD, V_LANES, V_WORDS, V_FIELDS, V_WIDEST, V_LEVELS,
            V_THRESHOLDS, V_SCALE, V_UNIFORM, True, V_TILED, HAS_STARTS, ONE_TOKEN, False, False, False,
            BLOCK, DIM_BLOCK, PARTS, False, EARLY,
        )  # fmt: skip
    elif (part == 2) & (block * FOLD_BLOCK < rows):
        fold_rows(
            query, q_b, q_h, q_q, q_d, key_map, map_factors, middle, descriptors, scalars, rows, words,
            x_s, turned, scaling, cos, sin, rope_t, rope_d, starts, first_token,
            head, block, HEADS, QUERIES, DIM, FOLD_PAD, DIM_PAD, FOLD_BLOCK, DIM_BLOCK, PARTS, EARLY,
        )  # fmt: skip
    elif POSITIONED:  # noqa: SIM102  a constant's branch is compiled or not, the other is taken or not
        if (part >= 3) & (block * ROW_BLOCK < rows):
            position_tile(
                query, q_b, q_h, q_q, q_d, k_centre, centre_at, positions, sinks, bias, b_r, rows, held_tokens,
                head, block, part - 3, HEADS, QUERIES, DIM, DIM_PAD, EXACT, ROW_BLOCK, TOKEN_BLOCK, EARLY,
            )  # fmt: skip
