# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Decode attention over a uniform grid, with inline PTX: one warp a program, every tensor one value a lane.

For one query token a sequence and codes in 4 byte lanes. Levels are step (code - middle), so there is no table:
a shift and a mask pull 4 codes out of a word, and `dp2a` multiplies them by 16-bit integers two at a time, keys by
the query, values by the softmax's weights. Lanes of a warp own, of a block of 128 tokens,

    keys     lane l: tokens 4 l .. 4 l + 3, all axes: their 4 words of a plane are 16 bytes
    values   lane 4 u + i: tokens 16 u .. 16 u + 15 of byte lane i of every word: 16 bytes of a plane

so the weights of a value lane's tokens lie in the 4 lanes of its own quad, which share one running maximum; the
quads are joined once, at the end. `BLOCK` tokens of a field cost 12 to 16 instructions a lane, for 16 codes.

Which field lies where is data, not code (`prepared.Fields`): one compiled kernel serves every profile of one F.
Weights are rounded with a dither that differs from token to token: many weights below 2^-16 of the greatest keep
their sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.attend import LOG2E, NEGATIVE, STEPS, ZERO

BLOCK = 128
LANE_TOKENS = 4
UNIT = tl.constexpr(65534.0)  # of a weight; with its dither, below 2^16
QUERY_UNIT = tl.constexpr(32767.0)
PHASE_UNIT = tl.constexpr(1024.0)  # what coefficients add up to at most: well within float16


STREAM = "ld.global.L1::no_allocate.L2::cache_hint.v4.b32"
ONCE = "createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
"""What is read once leaves the L2 first: code, maps, biases and partial results stay."""

FENCE = "bar.warp.sync 0xffffffff;"
"""Keeps the assembler from putting off a batch of loads until each is used: one latency, not one for each word."""


def load_code(key_words: int, value_words: int) -> str:
    """PTX: $0.. = 4 tokens of the lane's key words, then 16 tokens of the lane's value words, 4 registers a word.

    After the outputs: address of the lane's bytes in plane 0, bytes between words, the head's places; for keys,
    then for values. Either count may be 0.
    """
    outputs = [f"${i}" for i in range(4 * (key_words + value_words))]
    base = [f"${len(outputs) + i}" for i in range(6)]
    lines = [f".reg .b32 place<{4 * -(-max(key_words, value_words) // 4)}>;", ".reg .b64 at, once;", ONCE]
    lines += _load_words(value_words, base[3:], outputs[4 * key_words :])
    lines += _load_words(key_words, base[:3], outputs)
    return _block([*lines, FENCE])


def load_constraints(words: int) -> str:
    """Operand kinds of `load_code`."""
    return ",".join(["=&r"] * (4 * words) + ["l", "r", "l"] * 2)


def key_code(shape: tuple[int, ...]) -> str:
    """PTX: $0..$3 = sum over fields and lanes of query * piece, of 4 tokens.

    After the outputs: the row's descriptors, F times (shift, mask, query of lanes 0 and 1, of lanes 2 and 3); the
    words of `load_code`.
    """
    lines = [".reg .b32 t, d<4>;", *(f"mov.b32 ${token}, 0;" for token in range(4))]
    words = _word_of_field(shape)
    for f, word in enumerate(words):
        is_first = f == 0 or words[f - 1] != word  # at bit 0
        lines.append(f"ld.global.v4.b32 {{d0, d1, d2, d3}}, [$4+{16 * f}];")
        for token in range(4):
            if is_first:
                lines.append(f"and.b32 t, ${5 + 4 * word + token}, d1;")
            else:
                lines.append(f"shr.u32 t, ${5 + 4 * word + token}, d0;")
                lines.append("and.b32 t, t, d1;")
            lines.append(f"dp2a.lo.s32.u32 ${token}, d2, t, ${token};")
            lines.append(f"dp2a.hi.s32.u32 ${token}, d3, t, ${token};")
    return _block(lines)


def _word_of_field(shape: tuple[int, ...]) -> list[int]:
    return [word for word, count in enumerate(shape) for _ in range(count)]


def _load_words(count: int, operands: list[str], registers: list[str]) -> list[str]:
    """Load 16 bytes at `base` of each of `count` planes, in the order of the head's places."""
    base, stride, places = operands
    lines = []
    for w in range(count):
        if w % 4 == 0:
            lines.append(
                f"ld.global.v4.b32 {{{', '.join(f'place{w + i}' for i in range(4))}}}, [{places}+{4 * w}];"
            )
    for w in range(count):
        lines.append(f"mad.wide.u32 at, place{w}, {stride}, {base};")
        lines.append(f"{STREAM} {{{', '.join(registers[4 * w : 4 * w + 4])}}}, [at], once;")
    return lines


def value_code(shape: tuple[int, ...]) -> str:
    """PTX: $f = acc * alpha + sum over 16 tokens of weight * masked byte, for each of F fields.

    After the outputs: the lane's own 4 weights as 2 words, the head's masks, alpha, the words of `key_code`, the
    F accumulators.
    """
    fields = sum(shape)
    low, high, masks, alpha = (f"${fields + i}" for i in range(4))
    word_at = fields + 4
    acc_at = word_at + 4 * len(shape)
    lines = [".reg .b32 p<8>, t, sum, m<4>;", ".reg .f32 x;"]
    for owner in range(4):  # the weights of the quad's 16 tokens, in order
        lines.append(f"shfl.sync.idx.b32 p{2 * owner}, {low}, {owner}, 0x1c1f, 0xffffffff;")
        lines.append(f"shfl.sync.idx.b32 p{2 * owner + 1}, {high}, {owner}, 0x1c1f, 0xffffffff;")
    for f, word in enumerate(_word_of_field(shape)):
        if f % 4 == 0:
            lines.append(f"ld.global.v4.b32 {{m0, m1, m2, m3}}, [{masks}+{4 * f}];")
        lines.append("mov.b32 sum, 0;")
        for i in range(4):
            lines.append(f"and.b32 t, ${word_at + 4 * word + i}, m{f % 4};")
            lines.append(f"dp2a.lo.u32.u32 sum, p{2 * i}, t, sum;")
            lines.append(f"dp2a.hi.u32.u32 sum, p{2 * i + 1}, t, sum;")
        lines += ["cvt.rn.f32.s32 x, sum;", f"fma.rn.f32 ${f}, ${acc_at + f}, {alpha}, x;"]
    return _block(lines)


def bias_code(dim: int) -> str:
    """PTX: $0..$3 = the centre's scores of the lane's tokens 4 l .. 4 l + 3 of a block, in units of the row.

    After the outputs: addresses of the lane's 16 bytes in `Rope.turns`, of its pairs' coefficients of the cosines
    (those of the sines are dim / 2 further), of its pairs' cosines and of their sines at token 2 (l / 4) of the
    block. Tokens are 16 g + 2 c + {0, 1}: the coefficients are turned by 2 c first, one column c a quad, then
    meet the turns by 16 g and 16 g + 1 in a matrix product, m16n8k16, whose results lie where they are needed.
    Both factors are sums of two float16; the product of the low parts is below rounding.
    """
    lines = [
        ".reg .f32 e<4>, o<4>, x<4>, y<4>, a, b, r, s;",
        ".reg .b16 p, q;",
        ".reg .b32 high<2>, low<2>, m<4>;",
    ]
    lines += [f"mov.f32 ${token}, 0f00000000;" for token in range(4)]
    acc = "{$0, $2, $1, $3}"
    for four in range(dim // 32):
        for name, operand, offset in (("e", 5, 0), ("o", 5, 2 * dim), ("x", 6, 0), ("y", 7, 0)):
            four_of = ", ".join(f"{name}{j}" for j in range(4))
            lines.append(f"ld.global.v4.f32 {{{four_of}}}, [${operand}+{16 * four + offset}];")
        for two in range(2):
            for j in range(2):
                n = 2 * two + j
                lines += [
                    f"mul.f32 a, o{n}, y{n};", f"fma.rn.f32 a, e{n}, x{n}, a;",
                    f"mul.f32 b, e{n}, y{n};", "neg.f32 b, b;", f"fma.rn.f32 b, o{n}, x{n}, b;",
                    f"cvt.rn.f16x2.f32 high{j}, b, a;", f"mov.b32 {{p, q}}, high{j};",
                    "cvt.f32.f16 r, p;", "cvt.f32.f16 s, q;", "sub.f32 a, a, r;", "sub.f32 b, b, s;",
                    f"cvt.rn.f16x2.f32 low{j}, b, a;",
                ]  # fmt: skip
            at = 512 * (2 * four + two)
            product = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
            lines += [
                f"ld.global.v4.b32 {{m0, m1, m2, m3}}, [$4+{at}];",
                f"{product} {acc}, {{m0, m1, m2, m3}}, {{low0, low1}}, {acc};",
                f"{product} {acc}, {{m0, m1, m2, m3}}, {{high0, high1}}, {acc};",
                f"ld.global.v4.b32 {{m0, m1, m2, m3}}, [$4+{at + 32 * dim}];",
                f"{product} {acc}, {{m0, m1, m2, m3}}, {{high0, high1}}, {acc};",
            ]
    return _block(lines)


BIAS_KINDS = "=&f,=&f,=&f,=&f,l,l,l,l"


def key_constraints(shape: tuple[int, ...]) -> str:
    """Operand kinds of `key_code`."""
    return ",".join(["=&r"] * 4 + ["l"] + ["r"] * (4 * len(shape)))


def value_constraints(shape: tuple[int, ...]) -> str:
    """Operand kinds of `value_code`."""
    fields = sum(shape)
    return ",".join(["=&f"] * fields + ["r", "r", "l", "f"] + ["r"] * (4 * len(shape)) + ["f"] * fields)


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


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
def _phase(query, q_d, row_at, live, centre, head, dim, DIM: tl.constexpr):
    """<q, R_j c> as coefficients f32 [rows, d] of RoPE's cosines, then sines, at j, in units of log 2.

    With i < d/2 and i' = i + d/2: q_i c_i + q_i' c_i' of the cosine, q_i' c_i - q_i c_i' of the sine, at i and i'.
    """
    half: tl.constexpr = DIM // 2
    front = dim < half
    mask = live[:, None] & (dim < DIM)[None, :]
    other = tl.where(front, dim + half, dim - half)
    at = query + row_at[:, None]
    own_q = tl.load(at + dim[None, :] * q_d, mask=mask, other=0.0).to(tl.float32)
    other_q = tl.load(at + other[None, :] * q_d, mask=mask, other=0.0).to(tl.float32)
    c_at = centre + head * DIM
    first = tl.load(c_at + tl.where(front, dim, other), mask=dim < DIM, other=0.0)[None, :]
    second = tl.load(c_at + tl.where(front, other, dim), mask=dim < DIM, other=0.0)[None, :]
    return (own_q * first + tl.where(front[None, :], other_q, -other_q) * second) * LOG2E


@triton.jit
def _two_halves(x):
    """x as a sum of two float16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def fast_fold_kernel(
    query, q_b, q_h, q_d, key_map, factors, middle, shifts, masks, centre, descriptors, scalars, phases, batch,
    HEADS: tl.constexpr, DIM: tl.constexpr, FIELDS: tl.constexpr, FIELDS_PAD: tl.constexpr, TABLE: tl.constexpr,
    DIM_PAD: tl.constexpr, FOLD_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Queries in coded axes as 16-bit integers, and what the scores of the keys' centre follow from.

        r = log2(e) q map[h]     gain = max |r| / 32767     r~ = round(r / gain)     constant = -gain <r~, middle>
        phases as in `_phase`, in units of their sum's 1024th

    query any float [B, H, 1, d], key_map f16 [2, H, d, 4 F] and factors f32 [H, 4 F] (`in_halves`), middle f32
    [H, 4 F], shifts and masks int32 [H, TABLE], centre f32 [H, d]; descriptors int32 [B, H, F, 4] (see
    `key_code`), scalars f32 [B, H, 4] = (gain, constant, unit, unused), phases f32 [B, H, d]. Program (h, g): the
    g-th block of the sequences of head h.
    """
    head, group = tl.program_id(0), tl.program_id(1)
    item = group * FOLD_BLOCK + tl.arange(0, FOLD_BLOCK)
    live = item < batch
    dim = tl.arange(0, DIM_PAD)
    column = tl.arange(0, 4 * FIELDS_PAD)
    own = column < 4 * FIELDS
    weight_at = key_map + (head * DIM + dim[:, None]) * (4 * FIELDS) + column[None, :]
    inside = (dim < DIM)[:, None] & own[None, :]
    weight_high = tl.load(weight_at, mask=inside, other=0.0)
    weight_low = tl.load(weight_at + HEADS * DIM * 4 * FIELDS, mask=inside, other=0.0)
    factor = tl.load(factors + head * 4 * FIELDS + column, mask=own, other=0.0) * LOG2E
    centre_of_piece = tl.load(middle + head * 4 * FIELDS + column, mask=own, other=0.0)
    field = tl.arange(0, FIELDS_PAD)
    shift = tl.load(shifts + head * TABLE + field, mask=field < FIELDS, other=0)
    bits = tl.load(masks + head * TABLE + field, mask=field < FIELDS, other=0)
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
    target = descriptors + row[:, None] * (4 * FIELDS) + column[None, :]
    tl.store(target, tl.reshape(fours, (FOLD_BLOCK, 4 * FIELDS_PAD)), mask=live[:, None] & own[None, :])
    tl.store(scalars + row * 4, gain, mask=live)
    tl.store(scalars + row * 4 + 1, constant, mask=live)
    if HAS_BIAS:
        phase = _phase(query, q_d, q_at, live, centre, head, dim, DIM)
        unit = tl.sum(tl.abs(phase), 1) / PHASE_UNIT + 1e-30
        written = live[:, None] & (dim < DIM)[None, :]
        tl.store(phases + row[:, None] * DIM + dim[None, :], phase / unit[:, None], mask=written)
        tl.store(scalars + row * 4 + 2, unit, mask=live)


@triton.jit
def _read(
    first, end, lane, k_row, k_word, k_place, v_row, v_plane, v_place, k_scale, v_scale,
    LOAD_CODE: tl.constexpr, LOAD_KINDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A lane's part of a block: the scales of its 4 tokens, keys' and values', and the words of `load_code`.

    Past the end, lanes read what the last tokens' lanes read.
    """
    last = tl.maximum(end - 1, 0)
    k_token = tl.minimum(first + lane * 4, last // 4 * 4)
    v_token = tl.minimum(first + lane // 4 * 16, last // 16 * 16)
    kn = tl.load(k_scale + k_token // 4, eviction_policy="evict_first")
    vn = tl.load(v_scale + k_token // 4, eviction_policy="evict_first")
    words = tl.inline_asm_elementwise(
        LOAD_CODE, LOAD_KINDS, (k_row + k_token * 4, k_word, k_place, v_row + v_token, v_plane * 4, v_place),
        dtype=(tl.int32,) * WORDS, is_pure=False, pack=1,
    )  # fmt: skip
    return kn, vn, words


@triton.jit
def _attend_block(
    first, end, lane, kn, vn, words, state, row, masks, gain, constant, unit,
    turns, phase_row, cos, sin, rope_t, angles,
    KEY_CODE: tl.constexpr, KEY_KINDS: tl.constexpr, VALUE_CODE: tl.constexpr, VALUE_KINDS: tl.constexpr,
    BIAS_CODE: tl.constexpr, BIAS_KINDS: tl.constexpr, DIM: tl.constexpr, HAS_BIAS: tl.constexpr, K_WORDS: tl.constexpr, V_FIELDS: tl.constexpr,
):  # fmt: skip
    """The online softmax over one more block: state (top, mass, weight, sums) before and after."""
    top, mass, weight, sums = state
    token = first + lane * 4
    b = (0.0, 0.0, 0.0, 0.0)
    if HAS_BIAS:
        angle = tl.minimum(first + lane // 4 * 2, angles - 1) * rope_t + lane % 4 * (DIM // 8)
        b = tl.inline_asm_elementwise(
            BIAS_CODE, BIAS_KINDS, (turns, phase_row, cos + angle.to(tl.int64) * 4, sin + angle.to(tl.int64) * 4),
            dtype=(tl.float32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
    totals = tl.inline_asm_elementwise(
        KEY_CODE, KEY_KINDS, (row,) + words[: 4 * K_WORDS],  # noqa: RUF005  Triton 3.6 unpacks no tuples
        dtype=(tl.int32,) * 4, is_pure=False, pack=1,
    )  # fmt: skip
    s0 = _score(totals[0], kn, 0, gain, constant, b[0] * unit, token, end)
    s1 = _score(totals[1], kn, 1, gain, constant, b[1] * unit, token, end)
    s2 = _score(totals[2], kn, 2, gain, constant, b[2] * unit, token, end)
    s3 = _score(totals[3], kn, 3, gain, constant, b[3] * unit, token, end)
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
    sums = tl.inline_asm_elementwise(
        VALUE_CODE, VALUE_KINDS,
        (w0 | (w1 << 16), w2 | (w3 << 16), masks, alpha) + words[4 * K_WORDS :] + sums,  # noqa: RUF005
        dtype=(tl.float32,) * V_FIELDS, is_pure=True, pack=1,
    )  # fmt: skip
    return new_top, mass, weight, sums


@triton.jit
def fast_split_kernel(
    descriptors, scalars, phases, turns, cos, sin, rope_t, angles, lengths,
    k_codes, k_b, k_h, k_word, k_scales, ks_b, ks_h,
    v_codes, v_b, v_h, v_plane, v_scales, vs_b, vs_h, k_places, v_places, v_masks,
    part_max, part_sum, part_weight, part_out, tokens, chunk, sinks,
    HEADS: tl.constexpr, DIM: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, V_TABLE: tl.constexpr,
    LOAD_CODE: tl.constexpr, LOAD_KINDS: tl.constexpr,
    KEY_CODE: tl.constexpr, KEY_KINDS: tl.constexpr, VALUE_CODE: tl.constexpr, VALUE_KINDS: tl.constexpr,
    BIAS_CODE: tl.constexpr, BIAS_KINDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    K_WORDS: tl.constexpr, V_WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One range of `chunk` tokens of one sequence and head, with one warp.

        m = max_j (score_j + log2 n'_j)     w_j = 2^(score_j + log2 n'_j - m), in units of 2^-16
        part_sum = sum_j 2^(score_j - m)    part_weight = sum_j w_j    part_out[f, i] = sum_j w_j byte_jfi

    scores in units of log 2; descriptors, scalars and phases as `fast_fold_kernel` leaves them, turns as in
    `Rope.turns`, cos and sin f32 [angles, d], rows rope_t apart, of packed token 0 on; codes and scales as in
    `Packed` with aligned strides, k_places, v_places and v_masks as in `Fields`; part_max, part_sum and
    part_weight f32 [B, H, S], part_out f32 [B, H, S, 4 F'].
    """
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    end = tokens
    if HAS_LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int32) - sinks, 0), tokens)
    begin = split * chunk
    end = tl.minimum(end, begin + chunk)

    lane = tl.arange(0, 32)
    row = (descriptors + pair * (4 * K_FIELDS)).to(tl.int64, bitcast=True)
    k_place = (k_places + head * ((K_WORDS + 3) // 4 * 4)).to(tl.int64, bitcast=True)
    v_place = (v_places + head * ((V_WORDS + 3) // 4 * 4)).to(tl.int64, bitcast=True)
    masks = (v_masks + head * V_TABLE).to(tl.int64, bitcast=True)
    k_row = (k_codes + batch * k_b + head * k_h).to(tl.int64, bitcast=True)
    v_plane0 = (v_codes + batch * v_b + head * v_h).to(tl.int64, bitcast=True)
    v_row = v_plane0 + (lane % 4) * v_plane
    k_scale = (k_scales + batch * ks_b + head * ks_h).to(tl.pointer_type(tl.int32), bitcast=True)
    v_scale = (v_scales + batch * vs_b + head * vs_h).to(tl.pointer_type(tl.int32), bitcast=True)
    turn = turns.to(tl.int64, bitcast=True) + lane * 16
    phase_row = (phases + pair * DIM + lane % 4 * (DIM // 8)).to(tl.int64, bitcast=True)
    cos_at, sin_at = cos.to(tl.int64, bitcast=True), sin.to(tl.int64, bitcast=True)
    top = tl.full((32,), NEGATIVE, tl.float32)
    zero = tl.zeros((32,), tl.float32)
    state = (top, zero, zero, (zero,) * V_FIELDS)
    if EARLY:
        gdc_launch_dependents()
    # The codes do not wait for `fast_fold_kernel`: what there is time for is read before it ends.
    if ONE_BLOCK:
        kn, vn, words = _read(
            begin, end, lane, k_row, k_word, k_place, v_row, v_plane, v_place, k_scale, v_scale,
            LOAD_CODE, LOAD_KINDS, 4 * (K_WORDS + V_WORDS),
        )  # fmt: skip
    if EARLY:
        gdc_wait()
    gain = tl.load(scalars + pair * 4)
    constant = tl.load(scalars + pair * 4 + 1)
    unit = tl.load(scalars + pair * 4 + 2)
    if ONE_BLOCK:
        state = _attend_block(
            begin, end, lane, kn, vn, words, state, row, masks, gain, constant, unit,
            turn, phase_row, cos_at, sin_at, rope_t, angles,
            KEY_CODE, KEY_KINDS, VALUE_CODE, VALUE_KINDS,
            BIAS_CODE, BIAS_KINDS, DIM, HAS_BIAS, K_WORDS, V_FIELDS,
        )  # fmt: skip
    else:
        for first in range(begin, end, 128):
            kn, vn, words = _read(
                first, end, lane, k_row, k_word, k_place, v_row, v_plane, v_place, k_scale, v_scale,
                LOAD_CODE, LOAD_KINDS, 4 * (K_WORDS + V_WORDS),
            )  # fmt: skip
            state = _attend_block(
                first, end, lane, kn, vn, words, state, row, masks, gain, constant, unit,
                turn, phase_row, cos_at, sin_at, rope_t, angles,
                KEY_CODE, KEY_KINDS, VALUE_CODE, VALUE_KINDS,
            BIAS_CODE, BIAS_KINDS, DIM, HAS_BIAS, K_WORDS, V_FIELDS,
            )  # fmt: skip
    top, mass, weight, sums = state

    part = pair * tl.num_programs(1) + split
    warp_top = tl.max(top, 0)
    shrink = tl.exp2(top - tl.maximum(warp_top, 0.5 * NEGATIVE))
    tl.store(part_max + part, warp_top)
    tl.store(part_sum + part, tl.sum(mass * shrink, 0))
    tl.store(part_weight + part, tl.sum(weight * shrink, 0) / UNIT)
    shrink = shrink / UNIT
    target = part_out + part * (4 * V_FIELDS) + tl.arange(0, 4)
    for f in tl.static_range(V_FIELDS):
        tl.store(target + 4 * f, tl.sum(tl.reshape(sums[f] * shrink, (8, 4)), 0))
