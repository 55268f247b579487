"""The fast kernel's inline PTX, text by text and all together, on a CPU: `ptx_machine` runs it as written.

What Triton makes of the rest of `ptx_kernels.fast_attend_split_kernel` is written out here in numpy, in the same
order.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import Case, in_tiles, make, relative_error
from ptx_faults import RACES, WRONG_RESULTS, plant
from ptx_machine import Array, MachineError, RaceError, Warp, parse, render
from turboesm_kernels import dispatch, ptx_text, reference
from turboesm_kernels.layout import TILE
from turboesm_kernels.operands import Held, PreparedLayer
from turboesm_kernels.prepared import Fields
from turboesm_kernels.ptx_text import DIGIT_ROW, DIGITS
from turboesm_kernels.reference import TURN, Rope

pytest.importorskip("triton")  # `ptx_launch` imports it
from turboesm_kernels import ptx_launch

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4
K_OWN, V_OWN = 4 * LANE, G // 4 * 64 + T * 16  # a lane's first token in a block
NEGATIVE, HEADROOM, UNIT = np.float32(-1e30), np.float32(7.9), np.float32(65536.0)
LOG2E = math.log2(math.e)
LARGEST_QUERY = 32639
TOLERANCE = 1e-3
"""Relative error, as of the kernels' other tests."""

Inputs = tuple[torch.Tensor, Held, PreparedLayer]

SHAPES = [
    Case(tokens=4, bits=2),
    Case(tokens=4, bits=2, seed=2),  # heads of different profiles: fields of mask 0
    Case(tokens=4, bits=3),  # an odd number of fields
    Case(tokens=4, bits=3.5),
    Case(tokens=4, bits=4, centred=False),
    Case(tokens=4, dim=128, bits=2, seed=2),
    Case(tokens=4, dim=128, bits=3),
    Case(tokens=4, dim=128, bits=4),
    Case(tokens=4, dim=32, wide=True),
    Case(tokens=4, dim=80, wide=True),
]
either = pytest.mark.parametrize("one_block", [True, False], ids=["one", "several"])


class Kernel:
    """The texts for a layer's shape, and a warp that has begun with one head."""

    def __init__(self, inputs: Inputs, one_block: bool, head: int = 0, fault: str = "") -> None:
        self.query, self.held, self.layer = inputs
        self.head, self.one_block, self.warp = head, one_block, Warp()
        k, v, self.dim = self.layer.k.fields, self.layer.v.fields, self.layer.k.head_dim
        assert k is not None and v is not None
        self.k, self.v = k, v
        self.code = ptx_launch.kernel_code(self.dim, k.shape, v.shape, self.layer.k.centred, one_block)
        self.texts = {
            name.removesuffix("_CODE"): text for name, text in self.code.items() if name.endswith("_CODE")
        }
        if fault:
            self.texts = plant(fault, self.texts)
        self.k_masks, self.v_masks = (
            self.hold(fields.masks) + 4 * fields.masks.shape[1] * head for fields in (k, v)
        )

    def hold(self, tensor: torch.Tensor, writable: bool = False) -> int:
        """The address of a tensor, of which all that it is a view of can be read."""
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).numpy()
        return self.warp.hold(whole, writable) + tensor.storage_offset() * tensor.element_size()

    def do(self, name: str, *inputs: Array | float) -> list[Array]:
        """Run a text."""
        return self.warp.run(self.texts[name], self.code[f"{name}_KINDS"], *inputs)

    def open(self) -> None:
        """The first text: it gives the address of shared memory."""
        rope = self.held.rope
        centred = self.layer.k.centred and rope is not None
        turns = self.hold(rope.turns) if centred else 0
        block_turn = self.hold(rope.block_turn) if centred else 0
        (self.shared,) = self.do("OPEN", LANE, self.k_masks, self.v_masks, turns, block_turn)
        self.place = self.shared + 16 * LANE

    def ask(self, whole: Array) -> None:
        """Let the row's query be these integers."""
        self.row = self.warp.hold(digits(whole))
        if not self.one_block:
            self.do("ROW", LANE, self.shared, self.row)

    def scores(self, words: Array) -> Array:
        """Products of the query and the lanes' words [W, 4, 32] of keys: [4, 32], of tokens 4 l .. 4 l + 3."""
        query = self.row if self.one_block else self.shared + self.code["QUERY"]
        masks = self.k_masks if self.one_block else self.shared + self.code["K_MASKS"]
        return np.stack(self.do("SCORE", LANE, query + G % 2 * 4 * self.code["K_TABLE"], masks, *flat(words)))

    def sums(self, weights: Array, words: Array, old: Array) -> Array:
        """Accumulators [n, 32] after a block with a lane's weights [4, 32] and words [W, 4, 32] of values."""
        to = self.shared + K_OWN
        place = self.shared + np.minimum(G % 4, DIGITS - 1) * DIGIT_ROW + V_OWN
        masks = self.v_masks if self.one_block else self.shared + self.code["V_MASKS"]
        return np.stack(self.do("SUM", *weights, to, place, masks, *flat(words), *old))

    def no_sums(self) -> Array:
        return np.zeros((self.code["SUMS"], 32), "i4")

    def empty(self, asked: bool, alpha: float, sums: Array) -> Array:
        """Accumulators after their sums were moved, if asked to."""
        return np.stack(self.do("EMPTY", int(asked), alpha, LANE, self.shared, *sums))

    def emit(self, sums: Array) -> Array:
        """Sums [fields padded to 2, 4] in units of a weight of 1, as they end up in global memory."""
        out = torch.full((self.code["V_ROWS"],), torch.nan)
        self.do("EMIT", LANE, self.shared, self.hold(out, writable=True), *sums)
        return out.view(-1, 4).numpy()

    def read_keys(self, row: int, first: int, end: int) -> Array:
        """A lane's words of the block from token `first` on, [W, 4, 32]."""
        return self._read("KEYS", row, first + K_OWN, end, self.held.k.codes.stride(2))

    def read_values(self, row: int, first: int, end: int) -> Array:
        """A lane's words of the block from token `first` on, [W, 4, 32]; `row`: of byte lane 0."""
        return self._read("VALUES", row + G % 4 * TILE, first + V_OWN, end, self.held.v.codes.stride(2))

    def _read(self, name: str, row: Array | int, token: Array, end: int, stride: int) -> Array:
        words = self.do(name, row + 4 * token, stride, (token < end).astype(int))
        return np.stack(words).reshape(-1, 4, 32)

    def turn(self, begin: int, batch: int = 0) -> list[Array]:
        """Begin with the centre's scores at a range's first token; the coefficients, for one block."""
        rope, half, eighth = self.held.rope, self.dim // 2, self.code["PAIRED_DIM"] // 8
        assert rope is not None
        pair = eighth * T
        at = np.minimum(begin + 2 * G, len(rope.cos) - 1) * rope.cos.stride(0) + pair
        angles = self.do("ANGLES", self.hold(rope.cos) + 4 * at, self.hold(rope.sin) + 4 * at)
        query = self.query[batch, self.head, 0].float().numpy() * np.float32(LOG2E)
        centre = self.layer.k.centre[self.head].numpy()
        q, r, c, d = query[:half], query[half:], centre[:half], centre[half:]
        none = np.zeros(4 * eighth - half, "f4")
        coefficients = [np.concatenate((x, none)) for x in (q * c + r * d, r * c - q * d)]
        phase = [x[pair + i] for x in coefficients for i in range(eighth)]
        return self.do("TURN", *angles, *phase, self.place)

    def bias(self, state: list[Array]) -> Array:
        """The centre's scores of a block, [4, 32]: of the only one, or of the next."""
        if self.one_block:
            (there,) = self.do("WAIT", self.place)
            return np.stack(self.do("BIAS", there, *state))
        return np.stack(self.do("BIAS", self.place, self.shared + T * (self.code["PAIRED_DIM"] // 2)))


def flat(words: Array) -> Array:
    return words.reshape(-1, 32)


def digits(whole: Array) -> Array:
    """A row of `fast_project_query_kernel`'s descriptors: low bytes of integers, then high ones."""
    return np.stack((whole & 0xFF, (whole + 128) >> 8)).astype("u1")


def random_words(rng: np.random.Generator, fields: Fields) -> Array:
    """Any words [W, 4, 32] for a code of these fields."""
    return rng.integers(0, 2**32, (len(fields.shape), 4, 32)).astype("u4")


def field_bytes(words: Array, fields: Fields, head: int) -> Array:
    """What fields take out of words [W, ...]: int64 [F, ..., 4 bytes]."""
    of_field = words[np.repeat(np.arange(len(fields.shape)), fields.shape)]
    masks = fields.masks[head, : fields.count].numpy().view("u4")
    masked = of_field & masks.reshape(-1, *[1] * (words.ndim - 1))
    return np.ascontiguousarray(masked)[..., None].view("u1").astype("i8")


def value_bytes(words: Array, fields: Fields, head: int) -> Array:
    """Bytes int64 [F, 4 byte lanes, 128 tokens] of the lanes' words of values."""
    masked = field_bytes(words, fields, head)  # [F, registers, lanes, bytes]
    by_token = np.zeros((len(masked), 4, TURN), "i8")
    token = V_OWN[None, :, None] + 4 * np.arange(4)[:, None, None] + np.arange(4)
    by_token[:, np.broadcast_to(G % 4, (4, 32))[..., None], token] = masked
    return by_token


def exact_sums(sums: Array) -> Array:
    """Integers [fields padded to 2, 4] that accumulators stand for, see `ptx_text.sum_code`."""
    parts = sums.astype("i8").reshape(-1, 2, 2, 32)  # pair, field of it, column's last bit, lane
    found = np.zeros((*parts.shape[:2], 4), "i8")
    for half in range(2):
        for digit in range(DIGITS):
            column = 4 * half + digit
            lanes = 4 * (4 * half + np.arange(4)) + column // 2
            found += 256**digit * parts[:, :, column % 2, lanes]
    return found.reshape(-1, 4)


def sums_of(weights: Array, words: Array, fields: Fields, head: int) -> Array:
    """What `exact_sums` should be: of weights [4, 32]."""
    found = value_bytes(words, fields, head) @ weights.T.reshape(-1)
    return np.concatenate((found, np.zeros((fields.count % 2, 4), "i8")))


def mixed(case: Case) -> Inputs:
    """Inputs in buffers aligned as the fast path asks for; keys and values have codes of different shapes."""
    other = replace(case, bits=2 if case.bits == 3.5 else 3.5, seed=case.seed + 5)
    query, held, layer = make(case, room=-case.tokens % 16)
    _, values, other_layer = make(other, room=-case.tokens % 16)
    return query, in_tiles(replace(held, v=values.v)), replace(layer, v=other_layer.v)


made = cache(mixed)
"""Of a case, once for all tests that leave it as it is."""


def opened(case: Case, one_block: bool, head: int, fault: str = "") -> Kernel:
    """A kernel ready for its first block, and a query of nothing."""
    kernel = Kernel(made(case), one_block, head, fault)
    kernel.open()
    kernel.ask(np.zeros(4 * kernel.code["K_TABLE"], "i8"))
    return kernel


def check_scores(case: Case, one_block: bool, fault: str = "") -> None:
    rng = np.random.default_rng(0)
    for head in range(case.heads):
        kernel = Kernel(made(case), one_block, head, fault)
        kernel.open()
        whole = rng.integers(-LARGEST_QUERY, LARGEST_QUERY + 1, 4 * kernel.code["K_TABLE"])
        whole[4 * kernel.k.count :] = 0
        whole[:4] = LARGEST_QUERY, -LARGEST_QUERY, 128, -128
        kernel.ask(whole)
        for words in (random_words(rng, kernel.k), np.full((len(kernel.k.shape), 4, 32), 0xFFFFFFFF, "u4")):
            expected = np.einsum(
                "ftlb,fb->tl", field_bytes(words, kernel.k, head), whole.reshape(-1, 4)[: kernel.k.count]
            )
            assert (kernel.scores(words) == expected).all()


def check_sums(case: Case, one_block: bool, fault: str = "") -> None:
    """Over one block; and where there are more, over three."""
    rng = np.random.default_rng(1)
    for head in range(case.heads):
        kernel = opened(case, one_block, head, fault)
        sums, expected = kernel.no_sums(), 0
        for _ in range(1 if one_block else 3):
            weights, words = rng.integers(0, 2**24, (4, 32)), random_words(rng, kernel.v)
            sums = kernel.sums(weights, words, sums)
            expected = expected + sums_of(weights, words, kernel.v, head)
            assert (exact_sums(sums) == expected).all()
        assert np.allclose(kernel.emit(sums), expected / 65536, rtol=1e-6, atol=0)


def check_emptying(case: Case, one_block: bool, fault: str = "") -> None:
    """Where it is not asked for, nothing changes; where it is, what was summed shrinks, and sums begin at 0."""
    rng = np.random.default_rng(2)
    for head in range(case.heads):
        kernel = opened(case, False, head, fault)
        sums, exact, expected = kernel.no_sums(), 0, 0.0
        for alpha in (None, 0.125, 0.7, None, 1e-3):
            if alpha is None:
                assert (kernel.empty(False, 0.5, sums) == sums).all()
            else:
                sums = kernel.empty(True, alpha, sums)
                assert not sums.any()
                expected, exact = (expected + exact) * np.float32(alpha), 0
            weights, words = rng.integers(0, 2**24, (4, 32)), random_words(rng, kernel.v)
            sums = kernel.sums(weights, words, sums)
            exact = exact + sums_of(weights, words, kernel.v, head)
            assert (exact_sums(sums) == exact).all()
        assert np.allclose(kernel.emit(sums), (expected + exact) / 65536, rtol=1e-6, atol=0)


def check_centre(case: Case, one_block: bool, fault: str = "") -> None:
    """One block after another, or each as a range of its own; within what float32's angles are off by."""
    found = []
    for begin in range(0, case.tokens, TURN):
        if begin == 0 or one_block:
            kernel = opened(case, one_block, 1, fault)
            state = kernel.turn(begin)
            kernel.do("WAIT", kernel.shared)
        found.append(kernel.bias(state).T.reshape(-1))
    assert np.allclose(np.concatenate(found)[: case.tokens], centre_scores(kernel), rtol=0, atol=5e-5)


def check_loads(case: Case, one_block: bool, fault: str = "") -> None:
    """A lane's bytes of each plane; nothing is read for lanes past the end, which may be beyond the memory."""
    kernel = opened(case, one_block, 0, fault)
    for batch in range(case.batch):
        keys, values = kernel.held.k.codes[batch, 1], kernel.held.v.codes[batch, 1]
        k_row, v_row = kernel.hold(keys), kernel.hold(values)
        values = reference.untiled(kernel.held.v.codes)[batch, 1, :, : case.tokens]
        for first in range(0, case.tokens, TURN):
            k_words, v_words = (
                kernel.read_keys(k_row, first, case.tokens),
                kernel.read_values(v_row, first, case.tokens),
            )
            for lane in range(32):
                token, left = first + K_OWN[lane], max(0, case.tokens - first - K_OWN[lane])
                own = np.ascontiguousarray(k_words[:, :, lane]).view("u1").reshape(-1, 4, 4)[:, :left]
                assert (own == keys[:, token : token + 4].numpy()).all()
                token, left = first + V_OWN[lane], max(0, case.tokens - first - V_OWN[lane])
                own = np.ascontiguousarray(v_words[:, :, lane]).view("u1")[:, :left]
                assert (own == values[G[lane] % 4 :: 4, token : token + 16].numpy()).all()
    kernel.read_keys(0, 0, end=0)
    with pytest.raises(MachineError, match="outside"):
        kernel.read_keys(0, 0, end=1)


def centre_scores(kernel: Kernel, batch: int = 0) -> Array:
    """<q, R_j c> of each packed token j, in units of log 2."""
    rope = kernel.held.rope
    assert rope is not None
    turned = Rope(rope.cos.double(), rope.sin.double()).rotate(kernel.layer.k.centre[kernel.head].double())
    return (turned @ kernel.query[batch, kernel.head, 0].double()).numpy() * LOG2E


@either
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_scores(case: Case, one_block: bool) -> None:
    check_scores(case, one_block)


@either
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_sums(case: Case, one_block: bool) -> None:
    check_sums(case, one_block)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_emptying(case: Case) -> None:
    check_emptying(case, False)


@either
@pytest.mark.parametrize(("dim", "tokens"), [(64, 600), (128, 300), (64, 128), (64, 1), (80, 400), (36, 300)])
def test_centre(dim: int, tokens: int, one_block: bool) -> None:
    check_centre(Case(dim=dim, tokens=tokens, sinks=3, wide=True), one_block)


@either
@pytest.mark.parametrize("case", [Case(tokens=300, bits=3.5), Case(tokens=45, dim=128)], ids=str)
def test_loads(case: Case, one_block: bool) -> None:
    check_loads(case, one_block)


@cache
def warp_max_code() -> tuple[str, str]:
    """The text in `ptx_kernels._warp_max`, and the kinds of its operands."""
    source = Path(ptx_text.__file__).with_name("ptx_kernels.py").read_text()
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "_warp_max")
    call = next(n for n in ast.walk(function) if isinstance(n, ast.Call) and len(n.args) == 3)
    text, kinds = (n.value for n in call.args[:2] if isinstance(n, ast.Constant))
    return text, kinds


@pytest.mark.parametrize("low", [-1e30, -5.0, 3.0])
def test_greatest_of_a_warp(low: float) -> None:
    x = np.random.default_rng(3).uniform(low, min(low + 4, -1.0) if low < 0 else 7.0, 32).astype("f4")
    (found,) = Warp().run(*warp_max_code(), x)
    assert (found == x.max()).all()


@dataclass(frozen=True)
class Part:
    """What `ptx_kernels.fast_attend_split_kernel` leaves of a range; how often it emptied its sums."""

    top: float
    mass: float
    weight: float
    out: Array
    emptied: int


@dataclass
class Softmax:
    """The state of `ptx_kernels._weigh`, and what it does, step by step.

    No second `reference.attend`, which the results are compared with: the texts are fed what the kernel feeds
    them, weights that are dithered integers relative to a maximum so far, and told when to empty their sums.
    """

    end: int
    gain: np.float32
    constant: np.float32
    one: Array
    mass: Array
    weight: Array

    def weigh(self, token: Array, totals: Array, kn: Array, vn: Array, bias: Array) -> tuple[Array, float, bool]:
        """A block's weights [4, 32], what shrank and whether sums must be emptied; scale bytes kn, vn [4, 32]."""
        score = (totals.astype("f4") * self.gain + self.constant) * np.exp2(steps(kn)) + bias
        score = np.where(token + np.arange(4)[:, None] < self.end, score, NEGATIVE)
        x = score + steps(vn)
        (greatest,) = Warp().run(*warp_max_code(), x.max(0))
        grown = greatest > self.one + HEADROOM
        new_one = np.where(grown, greatest, self.one)
        safe = np.maximum(new_one, np.float32(0.5) * NEGATIVE)
        alpha = np.exp2(self.one - safe)
        weights = (np.exp2(x - safe) * UNIT + dithers()).astype("i4")
        empty = grown & (self.one > np.float32(0.5) * NEGATIVE)
        self.mass = self.mass * alpha + np.exp2(score - safe).sum(0)
        self.weight = self.weight * alpha + weights.sum(0).astype("f4")
        self.one = new_one
        assert score.dtype == np.float32 and (empty == empty[0]).all() and weights.max() < 2**24
        return weights, alpha[0], bool(empty[0])


def steps(byte: Array) -> Array:
    """log2 of a scale."""
    return (byte.astype("f4") - reference.SCALE_ZERO) / np.float32(reference.SCALE_STEPS_PER_OCTAVE)


def dithers() -> Array:
    """As `ptx_kernels._dithers`, [4, 32]."""
    first = LANE.astype("f4") * np.float32(0.4721359)
    every = first - np.floor(first) + np.array([[0], [0.6180340], [0.2360680], [0.8541020]], "f4")
    return every - np.floor(every)


def scale_bytes(scales: torch.Tensor, token: Array, end: int) -> Array:
    """As `ptx_kernels._scales`, [4, 32]: scales of a row, 0 past the end."""
    whole = np.zeros((4, 32), "u1")
    for lane in np.flatnonzero(token < end):
        own = scales[token[lane] : token[lane] + 4].numpy()
        whole[: len(own), lane] = own
    return whole


def split(inputs: Inputs, batch: int, head: int, begin: int, chunk: int, fault: str = "") -> Part:
    """One range, as `ptx_kernels.fast_attend_split_kernel` goes over it."""
    one_block = chunk == TURN
    kernel = Kernel(inputs, one_block, head, fault)
    held, centred = kernel.held, kernel.layer.k.centred
    end = held.tokens
    if held.lengths is not None:
        end = min(max(int(held.lengths[batch]) - held.sinks, 0), end)
    end = min(end, begin + chunk)
    k_scales, v_scales = held.k.scales[batch, head], held.v.scales[batch, head]
    k_row, v_row = kernel.hold(held.k.codes[batch, head]), kernel.hold(held.v.codes[batch, head])
    kernel.open()
    k_words, v_words = kernel.read_keys(k_row, begin, end), kernel.read_values(v_row, begin, end)
    whole, gain, constant = fold(kernel, batch)
    softmax = Softmax(end, gain, constant, np.full(32, NEGATIVE), *np.zeros((2, 32), "f4"))
    sums, emptied, bias = kernel.no_sums(), 0, np.zeros((4, 32), "f4")
    if centred:
        state = kernel.turn(begin, batch)
    if centred and one_block:
        bias = kernel.bias(state)
    kernel.ask(whole)
    for first in [begin] if one_block else range(begin, end, TURN):
        if centred and not one_block:
            bias = kernel.bias([])
        totals = kernel.scores(k_words)
        token = first + K_OWN
        scales = (scale_bytes(own, token, end) for own in (k_scales, v_scales))
        if not one_block:
            k_words = kernel.read_keys(k_row, first + TURN, end)
        weights, alpha, empty = softmax.weigh(token, totals, *scales, bias)
        if not one_block:
            sums = kernel.empty(empty, alpha, sums)
            emptied += empty
        sums = kernel.sums(weights, v_words, sums)
        if not one_block:
            v_words = kernel.read_values(v_row, first + TURN, end)
    weight = softmax.weight.sum() / UNIT
    return Part(softmax.one.max(), softmax.mass.sum(), weight, kernel.emit(sums), emptied)


def fold(kernel: Kernel, batch: int) -> tuple[Array, np.float32, np.float32]:
    """As `ptx_kernels.fast_project_query_kernel`: the query's integers, its gain and its constant."""
    wanted = (kernel.query[batch, kernel.head, 0].double() @ kernel.k.map[kernel.head].double()).numpy() * LOG2E
    gain = np.abs(wanted).max() / LARGEST_QUERY + 1e-30
    whole = np.floor(wanted / gain + 0.5).astype("i8")
    constant = -gain * (whole * kernel.k.middle[kernel.head].numpy()).sum()
    return whole, np.float32(gain), np.float32(constant)


def finish(inputs: Inputs, batch: int, head: int, parts: list[Part]) -> torch.Tensor:
    """As `triton_kernels.combine_kernel`, in float64: parts that each have a maximum and a mass of their own."""
    query, held, layer = inputs
    fields = layer.v.fields
    assert fields is not None
    top = max(part.top for part in parts)
    total, mass = torch.zeros(layer.k.head_dim, dtype=torch.float64), 0.0
    for part in parts:
        own = torch.from_numpy(part.out).double().flatten() @ fields.map[head].double()
        own = own + part.weight * fields.offset[head].double() + part.mass * layer.v.centre[head].double()
        total, mass = total + 2.0 ** float(part.top - top) * own, mass + 2.0 ** float(part.top - top) * part.mass
    if held.sink_k is not None and held.sink_v is not None:
        there = held.sinks if held.lengths is None else min(held.sinks, int(held.lengths[batch]))
        scores = held.sink_k[batch, head, :there].double() @ query[batch, head, 0].double() * LOG2E
        own = torch.exp2(scores - float(top))
        total, mass = total + own @ held.sink_v[batch, head, :there].double(), mass + float(own.sum())
    return total / mass


def attend(inputs: Inputs, batch: int, head: int, chunk: int, fault: str = "") -> tuple[torch.Tensor, int]:
    """A row's attention in ranges of `chunk` tokens, and how often sums were emptied."""
    every = [split(inputs, batch, head, begin, chunk, fault) for begin in range(0, inputs[1].tokens, chunk)]
    return finish(inputs, batch, head, every), sum(part.emptied for part in every)


def peaked(case: Case, at: int, octaves: float) -> Inputs:
    """Inputs where one key, token `at`, has a score that much above others'."""
    _, held, layer = mixed(case)
    scales = held.k.scales
    assert scales is not None
    scales.fill_(32)
    scales[:, :, at] = 150
    codes = reference.unpack(held.k.codes, layer.k.spec)
    key = reference.decode(codes, scales, layer.k.spec)[:, :, at : at + 1]
    return key * (octaves / LOG2E / key.square().sum(-1, keepdim=True)), held, layer


def error(inputs: Inputs, batch: int, head: int, chunk: int, fault: str = "") -> tuple[float, int]:
    """How far a row's attention is off, and how often sums were emptied."""
    found, emptied = attend(inputs, batch, head, chunk, fault)
    expected = dispatch.plain_attend(inputs[0].double(), *inputs[1:])
    return relative_error(found, expected[batch, head, 0]), emptied


@pytest.mark.parametrize("chunk", [128, 256, 512])
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=333, bits=2, ragged=True, sinks=2),
        Case(tokens=391, bits=3, sinks=0),
        Case(tokens=1, bits=3.5),
        Case(tokens=300, bits=4, centred=False),
        Case(tokens=261, dim=128, bits=3, seed=1),
        Case(tokens=290, dim=96, bits=3, seed=1, wide=True),
    ],
    ids=str,
)
def test_attention(case: Case, chunk: int) -> None:
    for batch, head in ((0, 1), (1, 0)):
        assert error(made(case), batch, head, chunk)[0] <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "octaves"),
    [
        (Case(tokens=500, centred=False), 12),
        (Case(tokens=411, dim=128, bits=2, seed=2, centred=False), 12),
        (Case(tokens=500), 20),
        (Case(tokens=411, dim=128, bits=3.5), 60),
    ],
    ids=str,
)
def test_attention_to_scores_that_rise(case: Case, octaves: float) -> None:
    """By more than weights have room for: sums must be emptied between."""
    off, emptied = error(peaked(case, 301, octaves), 0, 1, 512)
    assert off <= TOLERANCE and emptied


@pytest.mark.parametrize("dim", [64, 128])
def test_weights_of_the_check_before_use(dim: int) -> None:
    """What `verify` asks of one sequence: no query, and values' scales that rise by 8 octaves after a block."""
    query, held, layer = mixed(Case(dim=dim, tokens=384))
    assert held.v.scales is not None
    held.v.scales[:, :, :TURN], held.v.scales[:, :, TURN:] = 0, 255
    inputs = torch.zeros_like(query), held, layer
    assert error(inputs, 0, 0, TURN)[0] <= 1e-5
    off, emptied = error(inputs, 0, 0, 3 * TURN)
    assert off <= 1e-5 and emptied


WRONG = [
    ("popc.b32 $0, $1;", "unknown instruction"),
    ("mov.b32 $1, 0;", "cannot be written"),
    ("mov.b32 $0, x;", "x is no b32"),
    ("ld.global.b32 $0, [$1];", "is no u64"),
    ("ld.global.b32 $0, [$2+8];", "outside"),
    ("ld.global.b32 $0, [$2+2];", "not aligned"),
    ("st.global.b32 [$2], $1;", "only read"),
    (".reg .pred p; setp.lt.u32 p, $1, 9; @p bra end; mov.b32 $0, 0; end:", "lanes part"),
    (".reg .pred p; setp.lt.u32 p, $1, 9; @p bar.warp.sync 0xffffffff;", "not all lanes"),
    (".shared .align 16 .b8 held[128]; mov.u32 $0, held; ld.shared.b32 $0, [$0];", "nothing was written"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_the_machine_is_strict(text: str, said: str) -> None:
    warp = Warp()
    with pytest.raises(MachineError, match=said):
        warp.run(f"{{{text}}}", "=&r,r,l", LANE, warp.hold(np.zeros(2, "u4")))


@pytest.mark.parametrize("one_block", [True, False], ids=["one", "several"])
def test_rendering_undoes_parsing(one_block: bool) -> None:
    for text in Kernel(made(SHAPES[0]), one_block).texts.values():
        assert parse(render(*parse(text))) == parse(text)


def test_a_fault_that_the_text_has_no_place_for_is_named() -> None:
    with pytest.raises(LookupError, match="the turns are not waited for"):
        plant("the turns are not waited for", {"WAIT": "{ bar.warp.sync 0xffffffff; }"})


RACES_BY_CHUNK = {
    128: ["the turns are not waited for", "weights are read before all are written"],
    512: [
        "the query's copies are not waited for",
        "the query's copies are in no group",
        "the query is read before other lanes' copies are there",
        "weights are read before all are written",
    ],
}


@pytest.mark.parametrize(("chunk", "fault"), [(n, fault) for n, own in RACES_BY_CHUNK.items() for fault in own])
def test_what_orders_lanes_is_needed(fault: str, chunk: int) -> None:
    with pytest.raises(RaceError):
        attend(made(Case(tokens=300)), 0, 1, chunk, fault)


UNSEEN_IN_ATTENTION = "weights are written before all are read"


def test_weights_are_read_before_the_next_are_written() -> None:
    """The first barrier of `sum_code`; in the kernel those of `load_code` come between too."""
    with pytest.raises(RaceError):
        check_sums(SHAPES[0], False, UNSEEN_IN_ATTENTION)


SEEN_BY = {
    check_scores: ["the query's high digit counts 255", "the query stands in columns of g, not of g / 2"],
    check_sums: [
        "a weight's middle digit and the next one's low one change places",
        "a weight's high digit is its middle one",
        "a weight's middle digit counts 128",
        "sums of the wrong lanes are joined",
        "sums are set to 0 by the wrong lanes",
    ],
    check_emptying: [
        "sums are emptied where it is not asked for",
        "sums of earlier emptyings are forgotten",
        "sums before the last emptying are forgotten at the end",
    ],
    check_loads: [
        "each word of keys is the first",
        "each word of values is the first",
        "keys past the end are read",
    ],
    check_centre: [
        "tables are copied by the wrong lanes",
        "the first angles turn the other way",
        "the next block's angles turn the other way",
        "the coefficients' low parts are their high ones",
        "the centre's scores go to each other's tokens",
    ],
}


@pytest.mark.parametrize(
    ("check", "fault"), [(check, fault) for check, own in SEEN_BY.items() for fault in own],
    ids=lambda x: x.__name__ if callable(x) else x,
)  # fmt: skip
def test_faults_are_seen(check: Callable[..., None], fault: str) -> None:
    with pytest.raises((AssertionError, MachineError)):
        check(Case(tokens=300), False, fault)


def test_each_fault_is_planted_somewhere() -> None:
    in_attention = {fault for own in RACES_BY_CHUNK.values() for fault in own}
    assert in_attention | {UNSEEN_IN_ATTENTION} == set(RACES)
    assert {fault for own in SEEN_BY.values() for fault in own} == set(WRONG_RESULTS)
