"""The kernel for grouped queries on a CPU: its inline PTX text by text, and all together, on `ptx_machine`.

What Triton makes of the rest of `grouped_kernels.fast_attend_group_kernel` is written out here in numpy, in the
same order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from kernel_cases import Case, in_tiles, make, relative_error
from ptx_machine import Array, MachineError, RaceError, Warp
from turboesm_kernels import dispatch, reference
from turboesm_kernels.grouped_text import (
    KEY_WORDS,
    QUERIES,
    VALUE_WORDS,
    Slots,
    any_query,
    over_groups,
    spread_code,
)
from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.ptx_text import DIGIT_ROW, DIGITS
from turboesm_kernels.reference import SCALE_STEPS_PER_OCTAVE, SCALE_ZERO, TURN, Rope

pytest.importorskip("triton")  # `grouped_launch` imports it
from turboesm_kernels import grouped_launch
from turboesm_kernels.grouped_text import QUERY_ROW

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4
K_OWN, V_OWN = 4 * G, 16 * T  # a lane's first token in a block
TOKEN = K_OWN + 32 * np.arange(4)[:, None, None] + np.arange(4)[:, None]  # of a lane's scores: [4 s, 4 i, 32]
NEGATIVE, HEADROOM, UNIT = np.float32(-1e30), np.float32(7.9), np.float32(65536.0)
LOG2E = np.log2(np.e)
LARGEST_QUERY = 32639
TOLERANCE = 1e-3
"""Relative error, as of the kernels' other tests."""

Inputs = tuple[torch.Tensor, Held, PreparedLayer]

SHAPES = [
    Case(tokens=300, bits=2, queries=4),
    Case(tokens=300, bits=2, seed=2, queries=4),  # heads of different profiles: fields of mask 0
    Case(tokens=300, bits=3, queries=3),  # an odd number of fields
    Case(tokens=300, bits=3.5, queries=4),
    Case(tokens=300, dim=128, bits=3, queries=4),
    Case(tokens=300, dim=128, bits=2.5, seed=2, queries=4),
    Case(tokens=300, dim=80, wide=True, queries=2),
    Case(tokens=300, dim=32, wide=True, bits=4, centred=False, queries=4),
]


class Kernel:
    """The texts for a layer's shape, and a warp that has begun with one head."""

    def __init__(self, inputs: Inputs, head: int = 0) -> None:
        self.query, self.held, self.layer = inputs
        self.head, self.warp = head, Warp()
        k, v, self.dim = self.layer.k.fields, self.layer.v.fields, self.layer.k.head_dim
        assert k is not None and v is not None
        self.k, self.v = k, v
        self.k_slots, self.v_slots = Slots(k.shape, KEY_WORDS), Slots(v.shape, VALUE_WORDS)
        self.code = grouped_launch.kernel_code(self.dim, k.shape, v.shape, self.layer.k.centred)
        (k_masks, places), (v_masks, _) = k.of_keys, v.of_values
        self.places = self.hold(places) + 4 * T * self.k_slots.row
        rope = self.held.rope
        self.centred = self.layer.k.centred and rope is not None
        block_turn = self.hold(rope.block_turn) if self.centred and rope is not None else 0
        self.turns = self.hold(rope.group_turns) + 16 * LANE if self.centred and rope is not None else 0
        masks = (self.hold(own) + own[0].numel() * 4 * head for own in (k_masks, v_masks))
        (self.shared,) = self.do("OPEN", LANE, *masks, block_turn)
        self.place = self.shared + 16 * LANE

    def hold(self, tensor: torch.Tensor, writable: bool = False) -> int:
        """The address of a tensor, of which all that it is a view of can be read."""
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).numpy()
        return self.warp.hold(whole, writable) + tensor.storage_offset() * tensor.element_size()

    def do(self, name: str, *inputs: Array | float) -> list[Array]:
        """Run a text."""
        return self.warp.run(self.code[f"{name}_CODE"], self.code[f"{name}_KINDS"], *inputs)

    def ask(self, whole: Array) -> None:
        """Let the queries be these integers [Q, 4 P]."""
        digits = np.stack((whole & 0xFF, (whole + 128) >> 8), 1).astype("u1")
        column = np.minimum(G // 2, len(whole) - 1) * 2 + G % 2
        self.do("ROW", LANE, self.shared, self.places, self.warp.hold(digits) + column * whole.shape[1])

    def scores(self, words: Array) -> Array:
        """Products of queries and the lanes' words of keys: [4 s, 4 i, 32], of query t."""
        query = self.shared + self.code["QUERY"] + LANE * 4 * self.k_slots.row
        masks = self.shared + self.code["K_MASKS"] + T * 4 * self.k_slots.row
        return np.stack(self.do("SCORE", query, masks, *words)).reshape(4, 4, 32)

    def sums(self, weights: Array, words: Array, old: Array) -> Array:
        """Accumulators [n, 32] after a block with a lane's weights [4, 4, 32] and words of values."""
        self.do("PUT", self.shared + T * QUERY_ROW + K_OWN, *weights.reshape(16, 32))
        place = self.shared + G // 4 * QUERY_ROW + np.minimum(G % 4, DIGITS - 1) * DIGIT_ROW + V_OWN
        masks = self.shared + self.code["V_MASKS"] + G // 4 * 4 * self.v_slots.row
        return np.stack(self.do("SUM", place, masks, *words, *old))

    def no_sums(self) -> Array:
        return np.zeros((self.code["SUMS"], 32), "i4")

    def emit(self, sums: Array, queries: int) -> Array:
        """Sums [Q, fields padded to 2, 4] in units of a weight of 1, as they end up in global memory."""
        fields = -(-self.v.count // 2) * 2
        out = torch.full((queries, fields, 4), torch.nan)
        at = self.hold(out, writable=True) + 4 * (G % 4)
        of_lane = [T // 2, 2 + T // 2]
        places = [at + 16 * fields * np.minimum(own, queries - 1) for own in of_lane]
        self.do("EMIT", LANE, self.shared, *places, *((own < queries).astype(int) for own in of_lane), *sums)
        return out.numpy()

    def read_keys(self, row: int, first: int, end: int) -> Array:
        return np.stack(self.do("KEYS", LANE, row, self.held.k.codes.stride(2), first, end))

    def read_values(self, row: int, first: int, end: int) -> Array:
        return np.stack(self.do("VALUES", LANE, row, self.held.v.codes.stride(2), first, end))

    def turn(self, begin: int, batch: int = 0) -> None:
        """Begin with the centre's scores at a range's first token."""
        rope, half, eighth = self.held.rope, self.dim // 2, self.code["PAIRED_DIM"] // 8
        assert rope is not None
        pair = eighth * T
        at = np.minimum(begin + G % 2, len(rope.cos) - 1) * rope.cos.stride(0) + pair
        angles = self.do("ANGLES", self.hold(rope.cos) + 4 * at, self.hold(rope.sin) + 4 * at)
        own = np.minimum(G // 2, self.query.shape[2] - 1)
        query = self.query[batch, self.head].float().numpy()[own].T * np.float32(LOG2E)  # [d, 32]
        centre = self.layer.k.centre[self.head].numpy()[:, None]
        q, r, c, d = query[:half], query[half:], centre[:half], centre[half:]
        none = np.zeros((4 * eighth - half, 32), "f4")
        coefficients = [np.concatenate((x, none)) for x in (q * c + r * d, r * c - q * d)]
        phase = [x[pair + i, LANE] for x in coefficients for i in range(eighth)]
        self.do("TURN", *angles, *phase, self.place)

    def bias(self) -> Array:
        """The centre's scores of the next block, [4 s, 4 i, 32], of query t."""
        rotation = self.shared + T * (self.code["PAIRED_DIM"] // 2)
        return np.stack(self.do("BIAS", self.place, rotation, self.turns)).reshape(4, 4, 32)


def padded_to_words(case: Case) -> Inputs:
    """Inputs in buffers aligned as the fast path asks for."""
    query, held, layer = make(case, room=-case.tokens % 16)
    return query, in_tiles(held), layer


made = cache(padded_to_words)


def masked_bytes(kernel: Kernel, side: str, tokens: slice) -> Array:
    """What fields take out of the first sequence's codes: int64 [F, 4 bytes, tokens]."""
    packed, fields = (kernel.held.k, kernel.k) if side == "k" else (kernel.held.v, kernel.v)
    codes = reference.untiled(packed.codes)[0, kernel.head] if side == "v" else packed.codes[0, kernel.head]
    words = codes.permute(0, 2, 1) if side == "k" else codes.unflatten(0, (-1, 4))
    of_field = words.numpy()[np.repeat(np.arange(len(fields.shape)), fields.shape)][..., tokens]
    masks = fields.masks[kernel.head, : fields.count].numpy().view("u1").reshape(-1, 4, 1)
    return (of_field & masks).astype("i8")


def queries_of(rng: np.random.Generator, kernel: Kernel) -> Array:
    whole = rng.integers(-LARGEST_QUERY, LARGEST_QUERY + 1, (kernel.query.shape[2], 4 * kernel.k.masks.shape[1]))
    whole[:, :4] = LARGEST_QUERY, -LARGEST_QUERY, 128, -128
    return whole


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_scores(case: Case) -> None:
    rng = np.random.default_rng(0)
    for head in range(case.heads):
        kernel = Kernel(made(case), head)
        whole = queries_of(rng, kernel)
        kernel.ask(whole)
        row = kernel.hold(kernel.held.k.codes[0, head])
        for first in (0, TURN):
            own = masked_bytes(kernel, "k", slice(first, first + TURN))
            expected = np.einsum("fbt,qfb->qt", own, whole.reshape(len(whole), -1, 4)[:, : len(own)])
            found = kernel.scores(kernel.read_keys(row, first, first + TURN))
            assert (found == expected[np.minimum(T, case.queries - 1), TOKEN]).all()


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_sums(case: Case) -> None:
    """Over two blocks; emptied between, each query by a factor of its own; and where it is not asked for, not."""
    rng = np.random.default_rng(1)
    for head in range(case.heads):
        kernel = Kernel(made(case), head)
        kernel.ask(queries_of(rng, kernel))
        row = kernel.hold(kernel.held.v.codes[0, head])
        sums, expected = kernel.no_sums(), np.zeros(())
        alpha = np.array([0.125, 1.0, 0.7, 1e-3], "f4")
        for first in (0, TURN):
            weights = rng.integers(0, 2**24, (QUERIES, TURN))
            own = masked_bytes(kernel, "v", slice(first, first + TURN))
            sums = kernel.sums(weights[T, TOKEN], kernel.read_values(row, first, first + TURN), sums)
            expected = expected + np.einsum("fbt,qt->qfb", own, weights)
            assert (np.stack(kernel.do("EMPTY", 0, 0.5, LANE, kernel.shared, *sums)) == sums).all()
            if first == 0:
                sums = np.stack(kernel.do("EMPTY", 1, alpha[T], LANE, kernel.shared, *sums))
                assert not sums.any()
                expected = expected * alpha[:, None, None].astype("f8")
        found = kernel.emit(sums, case.queries)
        assert np.allclose(found[:, : kernel.v.count], expected[: case.queries] / 65536, rtol=1e-6, atol=0)
        assert not found[:, kernel.v.count :].any()


@pytest.mark.parametrize(("dim", "tokens"), [(64, 600), (128, 300), (64, 128), (64, 1), (80, 400), (36, 300)])
def test_centre(dim: int, tokens: int) -> None:
    case = Case(dim=dim, tokens=tokens, sinks=3, wide=True, queries=4)
    for begin in (0, TURN):
        kernel = Kernel(made(case), 1)
        kernel.ask(queries_of(np.random.default_rng(2), kernel))
        kernel.turn(begin)
        expected = np.stack([centre_scores(kernel, query) for query in range(4)])
        for first in range(begin, tokens, TURN):
            found, token = kernel.bias(), TOKEN + first
            there = token < tokens
            wanted = expected[np.broadcast_to(T, token.shape)[there], token[there]]
            assert np.allclose(found[there], wanted, rtol=0, atol=1e-4)


def centre_scores(kernel: Kernel, query: int, batch: int = 0) -> Array:
    """<q, R_j c> of each packed token j, in units of log 2."""
    rope = kernel.held.rope
    assert rope is not None
    turned = Rope(rope.cos.double(), rope.sin.double()).rotate(kernel.layer.k.centre[kernel.head].double())
    found: Array = (turned @ kernel.query[batch, kernel.head, query].double()).numpy() * LOG2E
    return found


def test_nothing_is_read_past_the_end() -> None:
    """Nor of words that there are none of: 6 words of keys come in groups of 4."""
    kernel = Kernel(made(Case(tokens=300, bits=3, queries=4)))
    assert len(kernel.k.shape) % 4
    kernel.read_keys(0, 0, end=0)
    kernel.read_values(0, 0, end=0)
    with pytest.raises(MachineError, match="outside"):
        kernel.read_keys(0, 0, end=1)


def test_what_lanes_exchange() -> None:
    x = np.random.default_rng(3).normal(size=32).astype("f4")
    assert (Warp().run(over_groups("max"), "=&f,f", x)[0] == x.reshape(8, 4).max(0)[T]).all()
    assert np.allclose(Warp().run(over_groups("add"), "=&f,f", x)[0], x.reshape(8, 4).sum(0)[T], atol=1e-5)
    assert [int(Warp().run(any_query(), "=&r,r", own[T])[0].max()) for own in np.eye(4, dtype=int)] == [1] * 4
    assert (
        np.stack(Warp().run(spread_code(), "=&r,=&r,=&r,=&r,r,r", LANE, LANE)) == [8 * s + G for s in range(4)]
    ).all()


def attend(inputs: Inputs, batch: int, head: int, chunk: int) -> tuple[torch.Tensor, int]:
    """A head's attention [Q, d] in ranges of `chunk` tokens, and how often sums were emptied."""
    query, held, layer = inputs
    end = held.tokens
    if held.lengths is not None:
        end = min(max(int(held.lengths[batch]) - held.sinks, 0), end)
    parts, emptied = [], 0
    for begin in range(0, held.tokens, chunk):
        part, empties = split(inputs, batch, head, begin, min(end, begin + chunk))
        parts.append(part)
        emptied += empties
    fields = layer.v.fields
    assert fields is not None
    found = []
    for q in range(query.shape[2]):
        top = max(part[0][q] for part in parts)
        total, mass = torch.zeros(layer.k.head_dim, dtype=torch.float64), 0.0
        for one, own_mass, weight, out in parts:
            own = torch.from_numpy(out[q]).double().flatten() @ fields.map[head].double()
            own = own + float(weight[q]) * fields.offset[head].double()
            own = own + float(own_mass[q]) * layer.v.centre[head].double()
            factor = 2.0 ** float(one[q] - top)
            total, mass = total + factor * own, mass + factor * float(own_mass[q])
        if held.sink_k is not None and held.sink_v is not None:
            there = held.sinks if held.lengths is None else min(held.sinks, int(held.lengths[batch]))
            scores = held.sink_k[batch, head, :there].double() @ query[batch, head, q].double() * LOG2E
            own = torch.exp2(scores - float(top))
            total, mass = total + own @ held.sink_v[batch, head, :there].double(), mass + float(own.sum())
        found.append(total / mass)
    return torch.stack(found), emptied


Part = tuple[Array, Array, Array, Array]
"""Of a range, by query: `one`, mass, weight, sums."""


def split(inputs: Inputs, batch: int, head: int, begin: int, end: int) -> tuple[Part, int]:
    """One range, as `grouped_kernels.fast_attend_group_kernel` goes over it; how often it emptied its sums."""
    kernel = Kernel(inputs, head)
    held, queries = kernel.held, inputs[0].shape[2]
    assert held.k.scales is not None and held.v.scales is not None
    k_row, v_row = kernel.hold(held.k.codes[batch, head]), kernel.hold(held.v.codes[batch, head])
    whole, gain, constant = fold(kernel, batch)
    if kernel.centred:
        kernel.turn(begin, batch)
    kernel.ask(whole)
    own = np.minimum(T, queries - 1)
    one, mass, weight = np.full(32, NEGATIVE), np.zeros(32, "f4"), np.zeros(32, "f4")
    sums, emptied = kernel.no_sums(), 0
    for first in range(begin, end, TURN):
        totals = kernel.scores(kernel.read_keys(k_row, first, end))
        bias = kernel.bias() if kernel.centred else np.zeros((4, 4, 32), "f4")
        kn, vn = (spread(scales[batch, head], first, end) for scales in (held.k.scales, held.v.scales))
        scores = (totals.astype("f4") * gain[own] + constant[own]) * np.exp2(steps(kn)) + bias
        scores = np.where(first + TOKEN < end, scores, NEGATIVE).astype("f4")
        greatest = (scores + steps(vn)).max((0, 1))
        (greatest,) = Warp().run(over_groups("max"), "=&f,f", greatest)
        grown = greatest > one + HEADROOM
        new_one = np.where(grown, greatest, one)
        safe = np.maximum(new_one, np.float32(0.5) * NEGATIVE)
        alpha = np.exp2(one - safe)
        weights = (np.exp2(scores + steps(vn) - safe) * UNIT + dithers(first // TURN)).astype("i4")
        assert weights.max() < 2**24
        (empty,) = Warp().run(any_query(), "=&r,r", (grown & (one > np.float32(0.5) * NEGATIVE)).astype(int))
        mass = mass * alpha + np.exp2(scores - safe).sum((0, 1))
        weight = weight * alpha + weights.sum((0, 1)).astype("f4")
        one = new_one
        sums = np.stack(kernel.do("EMPTY", empty, alpha, LANE, kernel.shared, *sums))
        emptied += int(empty[0])
        sums = kernel.sums(weights, kernel.read_values(v_row, first, end), sums)
    joined = (Warp().run(over_groups("add"), "=&f,f", x)[0][:queries] for x in (mass, weight))
    return (one[:queries], next(joined), next(joined) / UNIT, kernel.emit(sums, queries)), emptied


def fold(kernel: Kernel, batch: int) -> tuple[Array, Array, Array]:
    """As `ptx_kernels.fast_project_query_kernel`: queries' integers, gains and constants."""
    wanted = (kernel.query[batch, kernel.head].double() @ kernel.k.map[kernel.head].double()).numpy() * LOG2E
    gain = np.abs(wanted).max(1) / LARGEST_QUERY + 1e-30
    whole = np.floor(wanted / gain[:, None] + 0.5).astype("i8")
    constant = -gain * (whole * kernel.k.middle[kernel.head].numpy()).sum(1)
    return whole, gain.astype("f4"), constant.astype("f4")


def spread(scales: torch.Tensor, first: int, end: int) -> Array:
    """Scale bytes of a lane's tokens, [4 s, 4 i, 32]; past a word of 4 that the end is in, 0."""
    own = np.zeros(TURN, "u1")
    there = scales[first : -(-end // 4) * 4].numpy()[:TURN]
    own[: len(there)] = there
    return own[TOKEN]


def steps(byte: Array) -> Array:
    """log2 of a scale."""
    return (byte.astype("f4") - SCALE_ZERO) / np.float32(SCALE_STEPS_PER_OCTAVE)


def dithers(block: int) -> Array:
    """As `grouped_kernels._dithers`, [4 i, 32]."""
    first = G.astype("f4") * np.float32(0.4721359) + np.float32(block) * np.float32(0.7770876)
    every = first - np.floor(first) + np.array([[0], [0.6180340], [0.2360680], [0.8541020]], "f4")
    return (every - np.floor(every)).astype("f4")


@pytest.mark.parametrize("chunk", [128, 384])
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=333, bits=2, ragged=True, sinks=2, queries=4),
        Case(tokens=391, bits=3, sinks=0, queries=3),
        Case(tokens=1, bits=3.5, queries=2),
        Case(tokens=261, dim=128, bits=3, seed=1, queries=4),
        Case(tokens=290, dim=96, bits=3, seed=1, wide=True, centred=False, queries=4),
    ],
    ids=str,
)
def test_attention(case: Case, chunk: int) -> None:
    inputs = made(case)
    expected = dispatch.plain_attend(inputs[0].double(), *inputs[1:])
    for batch, head in ((0, 1), (1, 0)):
        found, _ = attend(inputs, batch, head, chunk)
        assert relative_error(found, expected[batch, head]) <= TOLERANCE


def test_attention_to_scores_that_rise() -> None:
    """By more than weights have room for, for one query earlier than for another: sums must be emptied between."""
    case = Case(tokens=500, dim=128, centred=False, queries=4)
    query, held, layer = padded_to_words(case)
    assert held.k.scales is not None
    held.k.scales[:, :, :TURN], held.k.scales[:, :, TURN:] = 64, 128
    held.k.scales[:, :, 300:] = 192
    inputs = torch.stack([query[:, :, 0] * factor for factor in (0.01, 1.0, 4.0, 8.0)], 2), held, layer
    found, emptied = attend(inputs, 0, 1, 512)
    expected = dispatch.plain_attend(inputs[0].double(), held, layer)[0, 1]
    assert emptied >= 2
    for own, wanted in zip(found, expected, strict=True):
        assert relative_error(own, wanted) <= TOLERANCE


@pytest.mark.parametrize("dim", [64, 128])
def test_weights_of_the_check_before_use(dim: int) -> None:
    """What `verify` asks of one sequence: values' scales that rise by 8 octaves after a block."""
    query, held, layer = padded_to_words(Case(dim=dim, tokens=384, queries=4))
    assert held.v.scales is not None
    held.v.scales[:, :, :TURN], held.v.scales[:, :, TURN:] = 0, 255
    inputs = query * torch.arange(4)[:, None], held, layer
    expected = dispatch.plain_attend(inputs[0].double(), held, layer)
    for chunk in (TURN, 3 * TURN):
        found, emptied = attend(inputs, 0, 0, chunk)
        assert relative_error(found, expected[0, 0]) <= TOLERANCE and bool(emptied) == (chunk > TURN)


@pytest.mark.parametrize("share", [0.02, 0.145, 0.3, 0.49])
def test_weights_far_below_the_greatest_keep_their_sum(share: float) -> None:
    """One token has all weight but `share` of a weight's unit for each of the others, which are many."""
    inputs = many_small_weights(share)
    found, _ = attend(inputs, 0, 0, inputs[1].tokens)
    expected = dispatch.plain_attend(inputs[0].double(), *inputs[1:])[0, 0]
    assert relative_error(found, expected) <= TOLERANCE


def many_small_weights(share: float) -> Inputs:
    case = Case(tokens=4096, batch=1, queries=3, sinks=0, centred=False)
    _, held, layer = padded_to_words(case)
    k_scales, v_scales = held.k.scales, held.v.scales
    assert k_scales is not None and v_scales is not None
    k_scales.fill_(SCALE_ZERO)
    v_scales.fill_(SCALE_ZERO)
    held.k.codes.copy_(held.k.codes[:, :, :, 1:2].expand_as(held.k.codes).clone())  # all tokens alike
    held.v.codes.copy_(held.v.codes[:, :, :, :1, :, 1:2].expand_as(held.v.codes).clone())
    first = reference.decode(reference.unpack(held.k.codes, layer.k.spec), k_scales, layer.k.spec)[0, 0, 1]
    octaves = 16 - np.log2(share)
    k_scales[:, :, 1] = SCALE_ZERO + SCALE_STEPS_PER_OCTAVE  # twice as long a key
    query = (first * (octaves / LOG2E / first.square().sum())).expand(1, 2, 3, -1).contiguous()
    return query, held, layer


@pytest.mark.parametrize("at", [0, 1])
def test_weights_meet_in_no_order_but_the_barriers(at: int) -> None:
    """Without either of the barriers around a block's weights lanes race."""
    case = SHAPES[0]
    kernel = Kernel(made(case))
    kernel.ask(queries_of(np.random.default_rng(4), kernel))
    fence = "bar.warp.sync 0xffffffff;"
    pieces = kernel.code["PUT_CODE"].split(fence)
    kernel.code = {**kernel.code, "PUT_CODE": fence.join(pieces[: at + 1]) + fence.join(pieces[at + 1 :])}
    kernel.code["SUM_CODE"] = kernel.code["SUM_CODE"].replace(fence, "")
    words, weights = np.zeros((kernel.code["V_COUNT"], 32), "u4"), np.ones((4, 4, 32), int)
    with pytest.raises(RaceError):
        for _ in range(2):
            kernel.sums(weights, words, kernel.no_sums())


def test_slots() -> None:
    slots = Slots((2, 3, 1, 1, 4), 4)
    assert slots.group_of == [0, 0, 0, 1, 1, 1, 1]
    assert [slots.field(member, 1) for member in range(4)] == [1, 3, None, None]
    assert [slots.field(member, 6) for member in range(4)] == [10, None, None, None]
    assert slots.pairs == [(0, 1), (2, 3), (4, 5), (6, None)] and slots.row == 12
    assert replace(slots, together=2).group_of == [0, 0, 0, 1, 2, 2, 2, 2]
