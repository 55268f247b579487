# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Compress keys and values straight into a cache: centre, rotate, scale, quantize and pack, in one launch.

Plain Triton. Codes of neighbouring axes lie at the same bits of neighbouring bytes (`layout`): they are put side
by side in a word once, and each word of the cache is gathered from pieces of those. On a uniform grid codes are
computed, else looked for in the tables of thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels import layout
from turboesm_kernels.arguments import Fixed
from turboesm_kernels.launch import early_launch, is_roomy, launch, launches_early
from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.parts import angles_at, summed, swapped, turned_sum
from turboesm_kernels.prepared import PreparedSide, dims_at_once, padded
from turboesm_kernels.reference import SCALE_STEPS_PER_OCTAVE, SCALE_ZERO, Packed

TILE = tl.constexpr(layout.TILE)
STEPS = tl.constexpr(SCALE_STEPS_PER_OCTAVE)
ZERO = tl.constexpr(SCALE_ZERO)
STEP_ROWS, PROMPT_ROWS = 16, 32
"""Rows of a head that a program packs: few where a step brings one token per sequence.

Fewer than 64, so that products are `mma` and not `wgmma`: in blocks of 64, two products added up in `wgmma` lost
what the second added (Triton 3.6, H200), which `test_pack_on_gpu` saw."""


@triton.jit
def _grid_rows(grid, axis, head, AXES: tl.constexpr):
    """The head's rows of `PreparedSide.grid`."""
    own = axis < AXES
    at = grid + head * 6 * AXES + axis
    per_step, half = tl.load(at, mask=own, other=0.0), tl.load(at + AXES, mask=own, other=0.0)
    top, level = tl.load(at + 2 * AXES, mask=own, other=0.0), tl.load(at + 3 * AXES, mask=own, other=0.0)
    zero, spread = tl.load(at + 4 * AXES, mask=own, other=0.0), tl.load(at + 5 * AXES, mask=own, other=0.0)
    return per_step[None, :], half[None, :], top[None, :], level[None, :], zero[None, :], spread[None, :]


@triton.jit
def _grid_codes(y, norm, grid_rows, SCALE: tl.constexpr):
    """Codes int32 of normalised coordinates y on a uniform grid, and their scales (see `cpu_lookup.Bits`)."""
    per_step, half, top, level, zero, spread = grid_rows
    code = tl.floor(y * (1.0 / norm)[:, None] * per_step + half)
    code = tl.minimum(tl.maximum(code, 0.0), top)
    factor = norm
    if SCALE == "least-squares":
        guess = code * level - zero
        factor = tl.sum(y * spread * guess, 1) / tl.maximum(tl.sum(guess * guess, 1), 1e-30)
    return code.to(tl.int32), factor


@triton.jit
def _table_codes(
    y, norm, widths, table_start, levels, thresholds, deviation, axis, head,
    AXES: tl.constexpr, WIDEST: tl.constexpr, LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The same by binary search in any tables."""
    own = axis < AXES
    width = tl.load(widths + head * AXES + axis, mask=own, other=0)
    start = tl.load(table_start + head * AXES + axis, mask=own, other=LEVELS - 1)
    code = tl.zeros(y.shape, tl.int32)
    normed = y / norm[:, None]
    for i in tl.static_range(WIDEST):
        more = code + (1 << (WIDEST - 1 - i))
        used = (width > WIDEST - 1 - i)[None, :]
        limit = tl.load(thresholds + head * THRESHOLDS + start[None, :] + more - 1, mask=used, other=float("inf"))
        code = tl.where(limit < normed, more, code)
    factor = norm
    if SCALE == "least-squares":
        spread = tl.load(deviation + head * AXES + axis, mask=own, other=0.0)[None, :]
        guess = tl.load(levels + head * LEVELS + start[None, :] + code) * spread
        factor = tl.sum(y * spread * guess, 1) / tl.maximum(tl.sum(guess * guess, 1), 1e-30)
    return code, factor


@triton.jit
def _picks(picks, head, SIZE: tl.constexpr):
    """The head's rows of `PreparedSide.picks`: group, low, mask, shift."""
    at = picks + head * 4 * SIZE + tl.arange(0, SIZE)
    return tl.load(at), tl.load(at + SIZE), tl.load(at + 2 * SIZE), tl.load(at + 3 * SIZE)


@triton.jit
def _words(code, pieces, AXES_PAD: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr):
    """Codes int32 [rows, A] as packed words int32 [rows, WORDS]: `LANES` neighbours side by side, then fields."""
    lane = tl.arange(0, LANES)
    rows: tl.constexpr = code.shape[0]
    groups = tl.reshape(code, (rows, AXES_PAD // LANES, LANES)) << (8 * lane)[None, None, :]
    groups = tl.sum(groups, 2)
    group, low, mask, shift = pieces
    found = tl.gather(groups, tl.broadcast_to(group[None, :], (rows, WORDS * FIELDS)), 1)
    found = ((found >> low[None, :]) & mask[None, :]) << shift[None, :]
    return tl.sum(tl.reshape(found, (rows, WORDS, FIELDS)), 2)


@triton.jit
def _turns(analysis, head, dim, axis, HEADS: tl.constexpr, DIM: tl.constexpr, AXES: tl.constexpr):
    """The head's `analysis` for some channels: both halves of the numbers."""
    inside = (dim < DIM)[:, None] & (axis < AXES)[None, :]
    at = analysis + (head * DIM + dim[:, None]) * AXES + axis[None, :]
    high = tl.load(at, mask=inside, other=0.0)
    return high, tl.load(at + HEADS * DIM * AXES, mask=inside, other=0.0)


@triton.jit
def pack_rows(
    x, x_b, x_h, x_t, x_d, x_s, like, starts, first_token, batches, tokens, head, block,
    centre, analysis, factors, coded_norm, grid, widths, table_start, levels, thresholds, deviation, picks,
    cos, sin, rope_t, rope_d, centre_at, positions, sinks, sink, w_b, w_h, w_t, w_d,
    codes, c_b, c_h, c_word, c_token, words, scales, s_b, s_h,
    HEADS: tl.constexpr, DIM: tl.constexpr, AXES: tl.constexpr, DIM_PAD: tl.constexpr, AXES_PAD: tl.constexpr,
    LANES: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr, WIDEST: tl.constexpr,
    LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr, SCALE: tl.constexpr, UNIFORM: tl.constexpr,
    PLANES: tl.constexpr, TILED: tl.constexpr, HAS_STARTS: tl.constexpr, ONE_TOKEN: tl.constexpr,
    TURNED: tl.constexpr, POSITIONED: tl.constexpr, HAS_SINKS: tl.constexpr, BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr, PARTS: tl.constexpr, ROTATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`pack_kernel` for one side, head and block of rows (b, token).

    Where PARTS, x is that many of a product's, x_s apart: the sum, turned where ROTATED, is rounded as `like` is.
    Tables are read before the wait, since a layer's have left the caches since the step before; and where PARTS
    `starts` and angles, which are older than the product.
    """
    axis = tl.arange(0, AXES_PAD)
    pieces = _picks(picks, head, WORDS * FIELDS)
    coded = tl.load(coded_norm + head)
    grid_rows = ()
    if UNIFORM:
        grid_rows = _grid_rows(grid, axis, head, AXES)
    own_dim = tl.arange(0, DIM_BLOCK)
    turns = _turns(analysis, head, own_dim, axis, HEADS, DIM, AXES)
    factor_of_axis = tl.load(factors + head * AXES + axis, mask=axis < AXES, other=0.0)
    constant = tl.load(centre + head * DIM + own_dim, mask=own_dim < DIM, other=0.0)
    if EARLY and not PARTS:
        gdc_wait()
        gdc_launch_dependents()
    row = block * BLOCK + tl.arange(0, BLOCK)
    live = row < batches * tokens
    batch, token = row.to(tl.int64), row * 0
    if not ONE_TOKEN:
        batch, token = (row // tokens).to(tl.int64), row % tokens
    place = first_token + token
    turn = place
    if HAS_STARTS:
        turn = tl.load(starts + batch, mask=live, other=0).to(tl.int32) - first_token + token
        place = tl.maximum(turn, 0)
    kept = live & (place < 0)
    if HAS_SINKS:
        live = live & (place >= 0)
    cosine = 0.0
    sine = 0.0
    if TURNED or ROTATED:
        cosine, sine = angles_at(cos, sin, rope_t, rope_d, turn if PARTS else place, live, own_dim, DIM)
    if EARLY and PARTS:
        gdc_wait()
        gdc_launch_dependents()
    y = tl.zeros((BLOCK, AXES_PAD), tl.float32)
    for first in tl.static_range(0, DIM_PAD, DIM_BLOCK):
        dim = first + own_dim
        partner, sign = swapped(dim, DIM)
        if first > 0:
            if TURNED or ROTATED:
                cosine, sine = angles_at(cos, sin, rope_t, rope_d, turn if PARTS else place, live, dim, DIM)
            turns = _turns(analysis, head, dim, axis, HEADS, DIM, AXES)
            constant = tl.load(centre + head * DIM + dim, mask=dim < DIM, other=0.0)
        inside = live[:, None] & (dim < DIM)[None, :]
        if HAS_SINKS:
            inside = (live | kept)[:, None] & (dim < DIM)[None, :]
        rows = x + (batch * x_b + head * x_h + token.to(tl.int64) * x_t)
        if ROTATED:
            value = turned_sum(rows, x_d, dim, inside, x_s, cosine, sine, DIM, PARTS)
        else:
            value = summed(rows[:, None] + dim[None, :] * x_d, inside, x_s, PARTS)
        if PARTS:
            value = value.to(like.dtype.element_ty).to(tl.float32)
        if HAS_SINKS:
            into = (batch * w_b + head * w_h + (place + sinks) * w_t)[:, None] + dim[None, :] * w_d
            whole = kept[:, None] & (dim < DIM)[None, :]
            tl.store(sink + into, value.to(sink.dtype.element_ty), mask=whole)
            inside = live[:, None] & (dim < DIM)[None, :]
        if TURNED:
            beside = tl.load(centre + head * DIM + partner, mask=dim < DIM, other=0.0) * sign
            value -= constant[None, :] * cosine + beside[None, :] * sine
        else:
            value = tl.where(inside, value - constant[None, :], 0.0)
        if POSITIONED:
            position = tl.minimum(place + sinks, positions - 1)
            own_centre = centre_at + (head * positions + position)[:, None] * DIM + dim[None, :]
            value -= tl.load(own_centre, mask=inside, other=0.0).to(tl.float32)
        high = value.to(tl.float16)
        low = (value - high.to(tl.float32)).to(tl.float16)
        y = tl.dot(low, turns[0], y)
        y = tl.dot(high, turns[1], y)
        y = tl.dot(high, turns[0], y)
    y *= factor_of_axis[None, :]
    norm = tl.full((BLOCK,), 1.0, tl.float32)
    if SCALE != "none":
        norm = tl.sqrt(tl.sum(y * y, 1)) * coded
        if SCALE == "least-squares":  # as in reference.start_scale
            norm += tl.max(tl.abs(y), 1) / 4
        norm = tl.maximum(norm, 1e-12)
    if UNIFORM:
        code, factor = _grid_codes(y, norm, grid_rows, SCALE)
    else:
        code, factor = _table_codes(
            y, norm, widths, table_start, levels, thresholds, deviation, axis, head,
            AXES, WIDEST, LEVELS, THRESHOLDS, SCALE,
        )  # fmt: skip
    if SCALE != "none":
        steps = tl.log2(tl.maximum(factor, 1e-30)) * STEPS + ZERO
        byte = tl.minimum(tl.maximum(tl.floor(steps + 0.5), 0.0), 255.0).to(tl.uint8)
        tl.store(scales + batch * s_b + head * s_h + place, byte, mask=live)
    # Neighbouring tokens side by side, as they are stored.
    packed = tl.trans(_words(code, pieces, AXES_PAD, LANES, WORDS, FIELDS))
    word = tl.arange(0, WORDS)
    there = (word < words)[:, None] & live[None, :]
    at = place.to(tl.int64) * c_token
    if TILED:
        at = (place // TILE * TILE * LANES + place % TILE).to(tl.int64)
    target = codes + (batch * c_b + head * c_h + at)[None, :]
    if PLANES:
        for lane in tl.static_range(LANES):
            plane = (word * LANES + lane).to(tl.int64) * c_word
            if TILED:
                plane = word.to(tl.int64) * c_word + lane * TILE
            tl.store(target + plane[:, None], (packed >> (8 * lane)).to(tl.uint8), mask=there)
    else:
        whole = target + (word.to(tl.int64) * c_word)[:, None]
        if LANES == 4:
            tl.store(whole.to(tl.pointer_type(tl.int32), bitcast=True), packed, mask=there)
        elif LANES == 2:
            tl.store(whole.to(tl.pointer_type(tl.int16), bitcast=True), packed.to(tl.int16), mask=there)
        else:
            tl.store(whole, packed.to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=["first_token", "batches", "tokens", "k_words", "v_words", "sinks"])
def pack_kernel(
    k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, starts, first_token, batches, tokens,
    k_centre, k_analysis, k_factors, k_norm, k_grid, k_widths, k_start, k_levels, k_thresholds, k_deviation,
    k_picks,
    v_centre, v_analysis, v_factors, v_norm, v_grid, v_widths, v_start, v_levels, v_thresholds, v_deviation,
    v_picks,
    cos, sin, rope_t, rope_d, centre_at, positions, sinks,
    k_codes, kc_b, kc_h, kc_word, kc_token, k_words, k_scales, ks_b, ks_h,
    v_codes, vc_b, vc_h, vc_plane, vc_token, v_words, v_scales, vs_b, vs_h,
    sink_k, sk_b, sk_h, sk_t, sk_d, sink_v, sv_b, sv_h, sv_t, sv_d,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, K_LANES: tl.constexpr, V_LANES: tl.constexpr,
    K_AXES: tl.constexpr, K_PAD: tl.constexpr, K_WORDS: tl.constexpr, K_FIELDS: tl.constexpr,
    K_WIDEST: tl.constexpr, K_LEVELS: tl.constexpr, K_THRESHOLDS: tl.constexpr, K_SCALE: tl.constexpr,
    K_UNIFORM: tl.constexpr,
    V_AXES: tl.constexpr, V_PAD: tl.constexpr, V_WORDS: tl.constexpr, V_FIELDS: tl.constexpr,
    V_WIDEST: tl.constexpr, V_LEVELS: tl.constexpr, V_THRESHOLDS: tl.constexpr, V_SCALE: tl.constexpr,
    V_UNIFORM: tl.constexpr, V_TILED: tl.constexpr,
    HAS_STARTS: tl.constexpr, ONE_TOKEN: tl.constexpr, TURNED: tl.constexpr, POSITIONED: tl.constexpr,
    HAS_SINKS: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compress k and v [B, H, n, d] into a cache from packed token start[b] on.

        y = (x - R c) E / s    code = #{thresholds below y / start(y)}    scale = <s y, z^> / <z^, z^>

    with z^ = s T[code]; SCALE "norm" keeps norm(y) instead, "none" neither divides nor keeps. Every symbol as in
    `reference`: x any float, centre f32 [H, d], analysis f16 [2, H, d, A] and factors f32 [H, A] of E / s, norm
    f32 [H], grid f32 [H, 6, A] (`PreparedSide.grid`), widths and table_start int32 [H, A], levels f32 [H,
    LEVELS] (with a 0 at the end), thresholds f32 [H, THRESHOLDS], picks as in `PreparedSide`, cos and sin f32
    [T, d] of packed token 0 on, centre_at f16 [H, `positions`, d], for packed token j at j + `sinks` (`SideSpec`;
    a model that has it turns nothing). `first_token` is the first packed token's number, or what to subtract from
    `starts` int [B]. Codes' words are WORDS at most, `k_words` or `v_words` of them stored.
    Values go into tiles where V_TILED. Where HAS_SINKS, rows before packed token 0 go as they are into sink_k and
    sink_v, any float [B, H, `sinks`, d].
    Program (h, r, s): the r-th block of rows (b, token) of head h, keys where s is 0.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    if tl.program_id(2) == 0:
        pack_rows(
            k, k_b, k_h, k_t, k_d, 0, k, starts, first_token, batches, tokens, head, block,
            k_centre, k_analysis, k_factors, k_norm, k_grid, k_widths, k_start, k_levels, k_thresholds,
            k_deviation, k_picks,
            cos, sin, rope_t, rope_d, centre_at, positions, sinks, sink_k, sk_b, sk_h, sk_t, sk_d,
            k_codes, kc_b, kc_h, kc_word, kc_token, k_words, k_scales, ks_b, ks_h,
            HEADS, DIM, K_AXES, DIM_PAD, K_PAD, K_LANES, K_WORDS, K_FIELDS, K_WIDEST, K_LEVELS,
            K_THRESHOLDS, K_SCALE, K_UNIFORM, False, False, HAS_STARTS, ONE_TOKEN, TURNED, POSITIONED, HAS_SINKS,
            BLOCK, DIM_BLOCK, 0, False, EARLY,
        )  # fmt: skip
    else:
        pack_rows(
            v, v_b, v_h, v_t, v_d, 0, v, starts, first_token, batches, tokens, head, block,
            v_centre, v_analysis, v_factors, v_norm, v_grid, v_widths, v_start, v_levels, v_thresholds,
            v_deviation, v_picks,
            cos, sin, rope_t, rope_d, centre_at, positions, sinks, sink_v, sv_b, sv_h, sv_t, sv_d,
            v_codes, vc_b, vc_h, vc_plane, vc_token, v_words, v_scales, vs_b, vs_h,
            HEADS, DIM, V_AXES, DIM_PAD, V_PAD, V_LANES, V_WORDS, V_FIELDS, V_WIDEST, V_LEVELS,
            V_THRESHOLDS, V_SCALE, V_UNIFORM, True, V_TILED, HAS_STARTS, ONE_TOKEN, False, False, HAS_SINKS,
            BLOCK, DIM_BLOCK, 0, False, EARLY,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Target:
    """Where a layer's keys and values go, checked and looked at once: the cache's buffers have to stay.

    operands   what the kernels take from `cos` on: angles, centres of positions, codes and scales
    sinks      keys and values of the sinks, which `pack_kernel` takes last
    constants  what the kernels are compiled for, but for what depends on the call
    calls      all that `pack_kernel` is compiled for, by kind of call
    """

    layer: PreparedLayer
    held: Held
    operands: Fixed
    sinks: Fixed
    constants: dict[str, Any]
    calls: dict[tuple[bool, ...], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: PreparedLayer, held: Held, turns: bool = False) -> Target:
        """`turns`: with RoPE's angles even where the keys' centre is 0. Raises ValueError where nothing fits."""
        _validate(layer, held)
        centre_at, nothing, dim = layer.k.spec.centre_at, layer.k.centre, layer.k.head_dim
        turned = layer.k.centred and centre_at is None
        needed = (turned or turns) and held.rope is not None
        cos, sin = (held.rope.cos, held.rope.sin) if needed and held.rope is not None else (nothing,) * 2
        positions = (nothing, 0) if centre_at is None else (centre_at, centre_at.shape[1])
        operands = Fixed((
            cos, sin, cos.stride(-2), cos.stride(-1), *positions, held.sinks,
            *_target(held.k, layer.k), *_target(held.v, layer.v),
        ))  # fmt: skip
        sink_k, sink_v = (nothing[:, None, None] if x is None else x for x in (held.sink_k, held.sink_v))
        constants = {
            "HEADS": layer.k.spec.heads, "DIM": dim, "DIM_PAD": padded(dim),
            "DIM_BLOCK": dims_at_once(dim, is_roomy(held.k.codes)),
            **layer.k.pack_constants, **layer.v.pack_constants,
            "TURNED": turned, "POSITIONED": centre_at is not None, "V_TILED": held.v.tiled,
        }  # fmt: skip
        sinks = Fixed((sink_k, *sink_k.stride(), sink_v, *sink_v.stride()))
        return cls(layer, held, operands, sinks, constants)

    def given(self, k: Tensor, v: Tensor, start: int | Tensor) -> tuple[Any, ...]:
        """What the kernels take of keys and values, all but sinks. Raises ValueError where they do not fit."""
        batch, heads, tokens, dim = k.shape
        spec, held = self.layer.k.spec, self.held
        if k.shape != v.shape or (heads, dim) != (spec.heads, spec.head_dim) or batch != len(held.k.codes):
            own = f"the codec has {spec.heads} heads of {spec.head_dim}, the cache {len(held.k.codes)} sequences"
            raise ValueError(f"keys {tuple(k.shape)}, values {tuple(v.shape)}: {own}")
        if not k.device == v.device == held.k.codes.device:
            raise ValueError(f"keys on {k.device}, values on {v.device}, the cache on {held.k.codes.device}")
        if isinstance(start, Tensor) and (tokens != 1 or start.shape != (batch,) or start.is_floating_point()):
            raise ValueError(
                f"{tokens} tokens from {start.dtype} {list(start.shape)} on: sequences that start apart get "
                f"one token each, and starts are integers [{batch}]"
            )
        even = isinstance(start, int)
        return (
            k, *k.stride(), v, *v.stride(), self.layer.k.centre if even else start,
            start - held.sinks if even else held.sinks, batch, tokens,
            self.layer.k.pack_tables, self.layer.v.pack_tables, self.operands,
        )  # fmt: skip

    def put(self, k: Tensor, v: Tensor, start: int | Tensor) -> None:
        """Compress k (after RoPE) and v float [B, H, n, d], any strides: `dispatch.append` in one launch.

        Copies nothing, waits for nothing. Raises ValueError where they do not fit.
        """
        batch, heads, tokens, dim = k.shape
        held = self.held
        held.check_room(start, tokens)
        keeps = isinstance(start, int) and start < held.sinks
        kind = not isinstance(start, int), tokens == 1, keeps, launches_early(k)
        if (named := self.calls.get(kind)) is None:
            given_by = dict(zip(("HAS_STARTS", "ONE_TOKEN", "HAS_SINKS", "EARLY"), kind, strict=True))
            block = STEP_ROWS if tokens == 1 else PROMPT_ROWS
            options = {"num_warps": warps_for(dim), **early_launch(kind[-1])}
            named = self.calls[kind] = {**self.constants, **given_by, "BLOCK": block, **options}
        launch(
            pack_kernel, (heads, -(-batch * tokens // named["BLOCK"]), 2),
            *self.given(k, v, start), self.sinks, **named,
        )  # fmt: skip


def pack(k: Tensor, v: Tensor, layer: PreparedLayer, held: Held, start: int | Tensor) -> None:
    """`Target.put` into what is looked at for this once. Raises ValueError where shapes do not agree."""
    Target.of(layer, held).put(k, v, start)


def warps_for(dim: int) -> int:
    """Warps of a program that multiplies rows of head_dim d by a square matrix."""
    return 4 if dim <= 64 else 8


def _target(packed: Packed, side: PreparedSide) -> tuple[Tensor | int, ...]:
    """Codes and scales with their strides of sequences, heads, words or planes, tokens; how many words."""
    scales = packed.codes if packed.scales is None else packed.scales
    words = side.spec.nbytes // side.spec.lanes
    return packed.codes, *packed.codes.stride()[:4], words, scales, *scales.stride()[:2]


def _validate(layer: PreparedLayer, held: Held) -> None:
    held.check_sinks(len(held.k.codes), layer.k.spec.heads, layer.k.head_dim)
    for side, into in ((layer.k, held.k), (layer.v, held.v)):
        spec = side.spec
        shape = spec.codes_shape(len(held.k.codes), held.tokens, into.tiled and spec.can_tile)
        if into.codes.dtype != torch.uint8 or into.codes.shape != shape:
            raise ValueError(f"codes must be uint8 {shape}, not {tuple(into.codes.shape)}")
        if into.tiled and into.codes.stride()[3:] != (spec.lanes * layout.TILE, layout.TILE, 1):
            raise ValueError("a tile's tokens must lie beside each other")
        if spec.side == "k" and any(n % spec.lanes for n in (into.codes.data_ptr(), *into.codes.stride()[:4])):
            raise ValueError(f"words of keys must lie at multiples of {spec.lanes} bytes")
        if spec.residual_axes:
            raise ValueError("residual axes are coded by the plain reference only")
        if (into.scales is None) != (spec.scale == "none"):
            raise ValueError("the cache's scales and the codec's do not agree")
        room = (len(held.k.codes), spec.heads, held.tokens)
        if into.scales is not None and (into.scales.dtype != torch.uint8 or into.scales.shape != room):
            raise ValueError(f"scales must be uint8 {room}, not {into.scales.dtype} {tuple(into.scales.shape)}")
        if into.scales is not None and into.scales.stride(2) != 1:
            raise ValueError("the scales of a sequence's tokens must lie beside each other")
    if held.rope is not None and held.rope.cos.shape != held.rope.sin.shape:
        raise ValueError(f"cosines are {tuple(held.rope.cos.shape)}, sines {tuple(held.rope.sin.shape)}")
    if layer.k.centred and (held.rope is None or held.rope.cos.shape[0] < held.tokens):
        raise ValueError(f"keys with a centre need RoPE's angles at the {held.tokens} packed tokens' positions")
