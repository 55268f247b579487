# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,import-untyped,import-not-found"
"""The loops of `cpu_compiled`, compiled by numba for the machine that they run on.

A piece of a code is a mask over a byte, or over a word of `lanes` bytes, and what it adds is linear in the masked
number:

    score_j = n_j (offset + sum_p weight_p (word_pj & mask_p)) + centre_j       the key of token j
    sum_p   = sum_j weight_j (byte_pj & mask_p)                                 the values; a product follows

Both run over tokens, which lie side by side, and LLVM makes vector instructions of that. Everything is float32.
Numbers lie where addresses (int64) say, which a job lists: one signature, so one compiled function for all shapes
and layouts, and no array headers in its way. The order of every sum follows from a sequence's own
length: its bits depend neither on the number of threads nor on the other rows of a batch.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Written out, whatever other modules say of them: numba's cache on disk knows of changes to this file alone.
FLOAT, TERMS, PIECES = 4, 4, 10
SCALE_STEPS_PER_OCTAVE, SCALE_ZERO = 32, 128
(
    QUERIES, Q, OUT, LENGTHS, SINK_K, SINK_V, HEADS, DIM, LANES, SINKS, TOKENS, TURNS, TURNS_ROW, K_AT, K_AT_ROW,
    K_CODES, K_CODES_BATCH, K_CODES_HEAD, K_CODES_ROW, K_SCALES, K_SCALES_BATCH, K_SCALES_HEAD,
    V_CODES, V_CODES_BATCH, V_CODES_HEAD, V_CODES_ROW, V_SCALES, V_SCALES_BATCH, V_SCALES_HEAD,
    K_MAP, K_MIDDLE, K_CENTRE, K_AXES, K_GROUPS, K_PIECES, K_FACTORS,
    V_MAP, V_MIDDLE, V_CENTRE, V_AXES, V_GROUPS, V_PIECES, V_FACTORS,
) = range(43)  # fmt: skip
"""What the numbers of attention's job are: counts, strides in bytes, and addresses, 0 where there is nothing.

Those that differ from call to call come first, in every job.
"""

(
    P_COUNT, P_X, P_START, P_STARTS, P_HEADS, P_DIM, P_AXES, P_LANES, P_ROWS, P_SCALE, P_COS, P_SIN,
    P_AT, P_AT_ROW, P_AT_FIRST, P_CODES, P_CODES_BATCH, P_CODES_HEAD, P_CODES_ROW,
    P_SCALES, P_SCALES_BATCH, P_SCALES_HEAD, P_CENTRE, P_ANALYSIS, P_GRID, P_NORM, P_GROUPS, P_PIECES, P_FACTORS,
) = range(29)  # fmt: skip
"""The same of packing's job, of one side."""

(
    T_QUERIES, T_Q, T_OUT, T_LENGTHS, T_FACTORS, T_IDS, T_IDS_ROW, T_ID_BYTES, T_TOKENS, T_HEADS, T_DIM, T_KINDS,
    T_COS, T_SIN, T_K, T_K_CONST, T_V, T_V_CONST,
) = range(18)  # fmt: skip
"""The same of attention over tokens of which the kind alone is kept."""

NO_SCALE, NORM, LEAST_SQUARES = range(3)

BLOCK = 1024
"""Tokens whose scores a core keeps at hand."""

LOG2_E = np.float32(1.4426950408889634)
LEAST = np.float32(-125.0)
ZERO = np.float32(0.0)
STEP = np.float32(1 / SCALE_STEPS_PER_OCTAVE)
LAST_BYTE = np.float32(255.0)
LARGEST = np.float32(2.0 ** ((255 - SCALE_ZERO) / SCALE_STEPS_PER_OCTAVE))
"""The scale of the last byte."""

LOOSE = {"contract", "reassoc", "nsz", "arcp"}
"""What LLVM may do to sums: reorder and fuse, but not assume that nothing is infinite or NaN."""

compiled = njit(
    nogil=True,
    error_model="numpy",
    fastmath=LOOSE,
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    forceinline=True,
)


@intrinsic
def as_float(typingctx, bits):
    """The float32 whose bits an int32 has."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


def _pointer(kind):
    @intrinsic
    def at(typingctx, address):
        def build(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), build

    return at


floats, ints = _pointer(types.float32), _pointer(types.int32)
bytes_1, bytes_2, bytes_4 = _pointer(types.uint8), _pointer(types.uint16), _pointer(types.uint32)


@compiled
def power_of_two(t):
    """2^t for float32 -125 <= t <= 0, within 2e-7 of it."""
    whole = np.int32(t - np.float32(0.5))
    f = t - np.float32(whole)
    y = np.float32(1.5403530e-4)
    y = y * f + np.float32(1.3333558e-3)
    y = y * f + np.float32(9.6181291e-3)
    y = y * f + np.float32(5.5504109e-2)
    y = y * f + np.float32(2.4022651e-1)
    y = y * f + np.float32(6.9314718e-1)
    y = y * f + np.float32(1.0)
    return y * as_float(np.int32((whole + 127) << 23))


@compiled
def scale_of(byte):
    """`reference.byte_to_scale` of an int32."""
    return LARGEST * power_of_two((np.float32(byte) - LAST_BYTE) * STEP)


@compiled
def term(x, mask, weight):
    return weight * np.float32(np.int32(x & mask))


@compiled
def add_bytes(scores, codes, n, piece, w0, w1, w2, w3):
    """Add to scores [n] what up to 4 terms of bytes [n] are worth."""
    s, c, p = floats(scores), bytes_1(codes), ints(piece)
    m0, m1, m2, m3 = p[2], p[3], p[4], p[5]
    if p[1] <= 2:
        for j in range(n):
            x = np.int32(c[j])
            s[j] += term(x, m0, w0) + term(x, m1, w1)
    elif p[1] == 3:
        for j in range(n):
            x = np.int32(c[j])
            s[j] += term(x, m0, w0) + term(x, m1, w1) + term(x, m2, w2)
    else:
        for j in range(n):
            x = np.int32(c[j])
            s[j] += (term(x, m0, w0) + term(x, m1, w1)) + (term(x, m2, w2) + term(x, m3, w3))


@compiled
def add_pairs(scores, codes, n, piece, w0, w1, w2, w3):
    """The same of words of 2 bytes."""
    s, c, p = floats(scores), bytes_2(codes), ints(piece)
    m0, m1, m2, m3 = p[2], p[3], p[4], p[5]
    for j in range(n):
        x = np.int32(c[j])
        s[j] += (term(x, m0, w0) + term(x, m1, w1)) + (term(x, m2, w2) + term(x, m3, w3))


@compiled
def add_fours(scores, codes, n, piece, w0, w1, w2, w3):
    """The same of words of 4 bytes; the last mask is for the word 8 bits down, so that nothing is negative."""
    s, c, p = floats(scores), bytes_4(codes), ints(piece)
    m0, m1, m2, m3 = p[2], p[3], p[4], p[5]
    for j in range(n):
        x, y = np.int32(c[j]), np.int32(c[j] >> np.uint32(8))
        s[j] += (term(x, m0, w0) + term(x, m1, w1)) + (term(x, m2, w2) + term(y, m3, w3))


@compiled
def add_codes(scores, n, address, row, lanes, count, pieces, factors, axes):
    """Add to scores [n] what the codes of a head's keys are worth, given what each axis is."""
    u = floats(axes)
    for g in range(count):
        piece = pieces + FLOAT * PIECES * g
        p, f = ints(piece), floats(factors + FLOAT * TERMS * g)
        w0, w1, w2, w3 = u[p[6]] * f[0], u[p[7]] * f[1], u[p[8]] * f[2], u[p[9]] * f[3]
        codes = address + row * p[0]
        if lanes == 4:
            add_fours(scores, codes, n, piece, w0, w1, w2, w3)
        elif lanes == 2:
            add_pairs(scores, codes, n, piece, w0, w1, w2, w3)
        else:
            add_bytes(scores, codes, n, piece, w0, w1, w2, w3)


@compiled
def add_rows(out, n, weights, count, table, row):
    """out [n] += weights [count] @ table [count, n], whose rows are `row` bytes apart; count is even."""
    s, w = floats(out), floats(weights)
    for i in range(0, count, 2):
        a, b = floats(table + i * row), floats(table + (i + 1) * row)
        w0, w1 = w[i], w[i + 1]
        for j in range(n):
            s[j] += w0 * a[j] + w1 * b[j]


@compiled
def clear(out, n):
    s = floats(out)
    for j in range(n):
        s[j] = ZERO


@compiled
def dot(one, other, n):
    a, b = floats(one), floats(other)
    total = ZERO
    for i in range(n):
        total += a[i] * b[i]
    return total


@compiled
def scale_scores(scores, n, scales, offset):
    """Scores [n] plus an offset, times their tokens' scales."""
    s, c = floats(scores), bytes_1(scales)
    if scales:
        for j in range(n):
            s[j] = (s[j] + offset) * scale_of(np.int32(c[j]))
    else:
        for j in range(n):
            s[j] += offset


@compiled
def sum_codes(weights, n, address, row, count, pieces, factors, axes):
    """Add to axes [A] the sums over tokens of weights [n] times what the codes of a head's values are."""
    w, u = floats(weights), floats(axes)
    for g in range(count):
        p, f = ints(pieces + FLOAT * PIECES * g), floats(factors + FLOAT * TERMS * g)
        c = bytes_1(address + row * p[0])
        m0, m1, m2, m3 = p[2], p[3], p[4], p[5]
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        if p[1] <= 2:
            for j in range(n):
                x = np.int32(c[j])
                s0 += term(x, m0, w[j])
                s1 += term(x, m1, w[j])
        elif p[1] == 3:
            for j in range(n):
                x = np.int32(c[j])
                s0 += term(x, m0, w[j])
                s1 += term(x, m1, w[j])
                s2 += term(x, m2, w[j])
        else:
            for j in range(n):
                x = np.int32(c[j])
                s0 += term(x, m0, w[j])
                s1 += term(x, m1, w[j])
                s2 += term(x, m2, w[j])
                s3 += term(x, m3, w[j])
        u[p[6]] += s0 * f[0]
        u[p[7]] += s1 * f[1]
        u[p[8]] += s2 * f[2]
        u[p[9]] += s3 * f[3]


@compiled
def softmax(scores, n):
    """Scores [n] to powers of e, the largest of which is 1, in place; their sum."""
    s = floats(scores)
    most = s[0]
    for j in range(n):
        most = max(most, s[j])
    total = ZERO
    for j in range(n):
        y = power_of_two(max((s[j] - most) * LOG2_E, LEAST))
        s[j] = y
        total += y
    return total


@compiled
def scale_weights(weights, n, scales):
    """Weights [n] times the values' scales, in place; their sums before and after."""
    w, c = floats(weights), bytes_1(scales)
    before, after = ZERO, ZERO
    if scales:
        for j in range(n):
            y = w[j] * scale_of(np.int32(c[j]))
            before += w[j]
            after += y
            w[j] = y
        return before, after
    for j in range(n):
        before += w[j]
    return before, before


@compiled
def turn(q, centre, half, phases):
    """What cosines and sines of a token's angles are to be multiplied by for the score of the keys' centre."""
    x, c, p = floats(q), floats(centre), floats(phases)
    for i in range(half):
        p[i] = x[i] * c[i] + x[half + i] * c[half + i]
        p[half + i] = x[half + i] * c[i] - x[i] * c[half + i]


@compiled
def key_scores(job, b, h, q, n, scores, scratch):
    """Scores [n] of a head's packed keys."""
    dim, count, lanes = job[DIM], job[K_AXES], job[LANES]
    axes, phases = scratch, scratch + FLOAT * count
    clear(axes, count)
    add_rows(axes, count, q, dim, job[K_MAP] + FLOAT * h * dim * count, FLOAT * count)
    offset = -dot(axes, job[K_MIDDLE] + FLOAT * h * count, count)
    turn(q, job[K_CENTRE] + FLOAT * h * dim, dim // 2, phases)
    codes = job[K_CODES] + b * job[K_CODES_BATCH] + h * job[K_CODES_HEAD]
    scales = job[K_SCALES] + b * job[K_SCALES_BATCH] + h * job[K_SCALES_HEAD]
    groups = ints(job[K_GROUPS])
    first, last = np.int64(groups[h]), np.int64(groups[h + 1])
    pieces, factors = job[K_PIECES] + FLOAT * PIECES * first, job[K_FACTORS] + FLOAT * TERMS * first
    for start in range(0, n, BLOCK):
        size, part = min(BLOCK, n - start), scores + FLOAT * start
        clear(part, size)
        row = job[K_CODES_ROW]
        add_codes(part, size, codes + start * lanes, row, lanes, last - first, pieces, factors, axes)
        scale_scores(part, size, scales + start if job[K_SCALES] else 0, offset)
        if job[TURNS]:
            add_rows(part, size, phases, dim, job[TURNS] + FLOAT * start, job[TURNS_ROW])
        if job[K_AT]:
            table = job[K_AT] + h * dim * job[K_AT_ROW] + FLOAT * (start + job[SINKS])
            add_rows(part, size, q, dim, table, job[K_AT_ROW])


@compiled
def value_sum(job, b, h, weights, n, out, axes):
    """Add to out [d] the weighted sum of a head's packed values; weights [n] are spent."""
    dim, count = job[DIM], job[V_AXES]
    scales = job[V_SCALES] + b * job[V_SCALES_BATCH] + h * job[V_SCALES_HEAD]
    before, after = scale_weights(weights, n, scales if job[V_SCALES] else 0)
    u, middle = floats(axes), floats(job[V_MIDDLE] + FLOAT * h * count)
    for a in range(count):
        u[a] = -after * middle[a]
    groups = ints(job[V_GROUPS])
    first, last = np.int64(groups[h]), np.int64(groups[h + 1])
    pieces, factors = job[V_PIECES] + FLOAT * PIECES * first, job[V_FACTORS] + FLOAT * TERMS * first
    codes = job[V_CODES] + b * job[V_CODES_BATCH] + h * job[V_CODES_HEAD]
    sum_codes(weights, n, codes, job[V_CODES_ROW], last - first, pieces, factors, axes)
    add_rows(out, dim, axes, count, job[V_MAP] + FLOAT * h * count * dim, FLOAT * dim)
    o, centre = floats(out), floats(job[V_CENTRE] + FLOAT * h * dim)
    for i in range(dim):
        o[i] += before * centre[i]


@compiled
def attend_one(job, b, h, q, out, scratch):
    """One query of one head: q [d] to out [d]."""
    dim, sinks = job[DIM], job[SINKS]
    length = sinks + job[TOKENS]
    if job[LENGTHS]:
        length = min(length, np.int64(ints(job[LENGTHS])[b]))
    clear(out, dim)
    if length <= 0:
        return
    sink = FLOAT * dim * (b * job[HEADS] + h) * sinks
    sinks = min(sinks, length)
    scores = scratch + FLOAT * 2 * (dim + max(job[K_AXES], job[V_AXES]))
    packed, n = scores + FLOAT * sinks, length - sinks
    s, o = floats(scores), floats(out)
    for i in range(sinks):
        s[i] = dot(q, job[SINK_K] + sink + FLOAT * dim * i, dim)
    if n:
        key_scores(job, b, h, q, n, packed, scratch)
    total = softmax(scores, length)
    for i in range(sinks):
        value = floats(job[SINK_V] + sink + FLOAT * dim * i)
        for c in range(dim):
            o[c] += s[i] * value[c]
    if n:
        value_sum(job, b, h, packed, n, out, scratch)
    for c in range(dim):
        o[c] /= total


def attend(job, first, last, scratch):
    """Heads number `first` to `last` - 1 of [B, H] of a job; scratch float32 [2 (d + A) + s + T]."""
    dim, queries, heads = job[DIM], job[QUERIES], job[HEADS]
    for item in range(first * queries, last * queries):
        head = item // queries
        where = FLOAT * dim * item
        attend_one(job, head // heads, head % heads, job[Q] + where, job[OUT] + where, scratch)


@compiled
def kind_of(job, b, j):
    """The kind of token j of sequence b."""
    row = job[T_IDS] + b * job[T_IDS_ROW]
    if job[T_ID_BYTES] == 1:
        return np.int64(bytes_1(row)[j])
    return np.int64(bytes_2(row)[j])


@compiled
def phases_of_kinds(job, b, h, q, phases):
    """For each kind of token what `turn` makes of its key: rows of [N, d]."""
    dim, kinds = job[T_DIM], job[T_KINDS]
    half = dim // 2
    x, p, f = floats(q), floats(phases), floats(job[T_FACTORS] + FLOAT * b * kinds)
    k, c = floats(job[T_K] + FLOAT * h * kinds * dim), floats(job[T_K_CONST] + FLOAT * h * dim)
    for n in range(kinds):
        at = n * dim
        for i in range(half):
            one = f[n] * k[at + i] + c[i]
            two = f[n] * k[at + half + i] + c[half + i]
            p[at + i] = x[i] * one + x[half + i] * two
            p[at + half + i] = x[half + i] * one - x[i] * two


@compiled
def attend_tokens_one(job, b, h, q, out, scratch):
    """One query of one head over the kinds of a sequence's tokens: q [d] to out [d]."""
    dim, kinds, length = job[T_DIM], job[T_KINDS], job[T_TOKENS]
    half = dim // 2
    if job[T_LENGTHS]:
        length = min(length, np.int64(ints(job[T_LENGTHS])[b]))
    clear(out, dim)
    if length <= 0:
        return
    weights, scores = scratch + FLOAT * kinds * dim, scratch + FLOAT * kinds * (dim + 1)
    phases_of_kinds(job, b, h, q, scratch)
    s, p, cos, sin = floats(scores), floats(scratch), floats(job[T_COS]), floats(job[T_SIN])
    for j in range(length):
        at, angle, found = kind_of(job, b, j) * dim, j * dim, ZERO
        for i in range(half):
            found += p[at + i] * cos[angle + i] + p[at + half + i] * sin[angle + i]
        s[j] = found
    total = softmax(scores, length)
    clear(weights, kinds)
    w, o, f = floats(weights), floats(out), floats(job[T_FACTORS] + FLOAT * b * kinds)
    for j in range(length):
        w[kind_of(job, b, j)] += s[j]
    v, c = floats(job[T_V] + FLOAT * h * kinds * dim), floats(job[T_V_CONST] + FLOAT * h * dim)
    for n in range(kinds):
        share = w[n] * f[n] / total
        for i in range(dim):
            o[i] += share * v[n * dim + i]
    for i in range(dim):
        o[i] += c[i]


def attend_tokens(job, first, last, scratch):
    """Heads number `first` to `last` - 1 of [B, H] of a job; scratch float32 [N (d + 1) + T]."""
    dim, queries, heads = job[T_DIM], job[T_QUERIES], job[T_HEADS]
    for item in range(first * queries, last * queries):
        head = item // queries
        where = FLOAT * dim * item
        attend_tokens_one(job, head // heads, head % heads, job[T_Q] + where, job[T_OUT] + where, scratch)


@compiled
def less_centre(job, h, x, at, out):
    """A key or value x [d] less its centre; `at` is its number among the packed tokens."""
    dim = job[P_DIM]
    half = dim // 2
    v, o, c = floats(x), floats(out), floats(job[P_CENTRE] + FLOAT * h * dim)
    if job[P_COS]:
        cos, sin = floats(job[P_COS] + FLOAT * at * dim), floats(job[P_SIN] + FLOAT * at * dim)
        for i in range(half):
            o[i] = v[i] - (c[i] * cos[i] - c[half + i] * sin[i])
            o[half + i] = v[half + i] - (c[half + i] * cos[i] + c[i] * sin[i])
    else:
        for i in range(dim):
            o[i] = v[i] - c[i]
    if job[P_AT]:
        start = job[P_AT] + h * dim * job[P_AT_ROW] + FLOAT * (job[P_AT_FIRST] + at)
        for i in range(dim):
            o[i] -= floats(start + i * job[P_AT_ROW])[0]


@compiled
def start_scale(y, count, norm, kind):
    """`reference.start_scale` of coordinates y [A]."""
    u = floats(y)
    most = ZERO
    for a in range(count):
        most = max(most, abs(u[a]))
    found = np.float32(np.sqrt(dot(y, y, count))) * norm
    if kind == LEAST_SQUARES:
        found += np.float32(0.25) * most
    return max(found, np.float32(1e-12))


@compiled
def byte_of(scale):
    """`reference.scale_to_byte`."""
    steps = np.log2(np.float32(max(scale, np.float32(1e-30)))) * SCALE_STEPS_PER_OCTAVE
    return np.uint8(min(max(np.rint(steps) + SCALE_ZERO, 0.0), 255.0))


@compiled
def put_codes(job, h, codes, address):
    """Write the codes [A], whole numbers in float32, of one token at an address."""
    lanes, step = job[P_LANES], job[P_CODES_ROW]
    c, groups = floats(codes), ints(job[P_GROUPS])
    for row in range(job[P_ROWS]):
        for lane in range(lanes):
            bytes_1(address + row * step)[lane] = np.uint8(0)
    for g in range(groups[h], groups[h + 1]):
        p, f = ints(job[P_PIECES] + FLOAT * PIECES * g), floats(job[P_FACTORS] + FLOAT * TERMS * g)
        for t in range(p[1]):
            word = np.int64(c[p[2 + TERMS + t]] / f[t]) & np.int64(p[2 + t])
            if lanes == 4 and t == 3:
                word <<= 8
            for lane in range(lanes):
                bytes_1(address + step * p[0])[lane] |= np.uint8((word >> (8 * lane)) & 255)


@compiled
def pack_one(job, b, h, x, at, scratch):
    """One token's key or value x [d], to its codes and scale."""
    dim, count, kind = job[P_DIM], job[P_AXES], job[P_SCALE]
    centred, y, codes = scratch, scratch + FLOAT * dim, scratch + FLOAT * (dim + count)
    less_centre(job, h, x, at, centred)
    clear(y, count)
    add_rows(y, count, centred, dim, job[P_ANALYSIS] + FLOAT * h * dim * count, FLOAT * count)
    start = np.float32(1.0)
    if kind != NO_SCALE:
        start = start_scale(y, count, floats(job[P_NORM])[h], kind)
    u, c, grid = floats(y), floats(codes), floats(job[P_GRID] + FLOAT * 6 * h * count)
    with_guess, of_guess = ZERO, ZERO
    for a in range(count):
        code = np.float32(np.floor((u[a] / start) * grid[a] + grid[count + a]))
        code = max(min(code, grid[2 * count + a]), ZERO)
        guess = code * grid[3 * count + a] - grid[4 * count + a]
        with_guess += u[a] * grid[5 * count + a] * guess
        of_guess += guess * guess
        c[a] = code
    place = job[P_CODES] + b * job[P_CODES_BATCH] + h * job[P_CODES_HEAD] + at * job[P_LANES]
    put_codes(job, h, codes, place)
    if kind != NO_SCALE:
        scale = start if kind == NORM else with_guess / max(of_guess, np.float32(1e-30))
        bytes_1(job[P_SCALES] + b * job[P_SCALES_BATCH] + h * job[P_SCALES_HEAD])[at] = byte_of(scale)


def pack(job, first, last, scratch):
    """Heads number `first` to `last` - 1 of [B, H] of a job, all tokens; scratch float32 [d + 2 A]."""
    dim, count, heads = job[P_DIM], job[P_COUNT], job[P_HEADS]
    for item in range(first, last):
        b, h = item // heads, item % heads
        start = job[P_START]
        if job[P_STARTS]:
            start = max(np.int64(ints(job[P_STARTS])[b]) + start, 0)
        for i in range(count):
            pack_one(job, b, h, job[P_X] + FLOAT * dim * (item * count + i), start + i, scratch)


LOOP = types.void(types.CPointer(types.int64), types.int64, types.int64, types.int64)
"""Of `attend` and `pack`: the numbers of a job, which heads, and where there is room for floats."""
