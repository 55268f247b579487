"""The kernels against the plain reference in double precision: every head_dim, layout and shape; equal bits.

On a CPU the portable kernels run in Triton's interpreter, in a child process that has TRITON_INTERPRET set before
Triton is imported; with a GPU the larger set runs there on every backend that can.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import decoder_folders
import pytest
import torch
from interpreter import run_interpreted
from kernel_cases import Case, angles, in_tiles, make, make_spec, relative_error
from turboesm_kernels import cpu_compiled, dispatch, reference, token_layer, verify
from turboesm_kernels.dispatch import BackendError
from turboesm_kernels.layout import ROOM, Profile
from turboesm_kernels.operands import Held, Joint, PreparedLayer
from turboesm_kernels.prepared import grid_steps
from turboesm_kernels.reference import Packed, Rope, Side
from turboesm_kernels.token_tables import TokenTables

from turboesm_cli.cache.packed import PackedCache
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.sizes import token_dtype
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.loading import load_model
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Relative error; bfloat16's own rounding is 2e-3."""

SIDES: tuple[Side, Side] = ("k", "v")
JUNK = 0xA5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the child process of test_interpreter")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = [
    Case(dim=16, tokens=31, kind="flat", bits=3),
    Case(dim=16, tokens=33, kind="table", bits=2.5, ragged=True),
    Case(dim=24, tokens=33, kind="flat", bits=3, sinks=2),
    Case(dim=24, tokens=1, kind="table", bits=3, queries=3),
    Case(dim=32, tokens=65, kind="uniform", bits=3, ragged=True),
    Case(dim=32, tokens=31, kind="flat", bits=4, scale="none", centred=False, sinks=0),
    Case(dim=64, tokens=1, kind="uniform"),
    Case(dim=64, tokens=31, kind="uniform", bits=2, queries=2),
    Case(dim=64, tokens=33, kind="flat", bits=3, queries=16, dtype=torch.float16),
    Case(dim=64, tokens=1000, kind="uniform", bits=3.5, ragged=True, batch=3),
    Case(dim=64, tokens=1023, kind="table", bits=4, dtype=torch.bfloat16),
    Case(dim=64, tokens=40, kind="flat-uniform", bits=3, scale="norm"),
    Case(dim=128, tokens=33, kind="uniform", ragged=True),
    Case(dim=64, tokens=200, kind="uniform", ragged=True, sinks=4, positions=204),
    Case(dim=24, tokens=33, kind="flat", queries=3, batch=7, positions=20, dtype=torch.bfloat16),
    Case(dim=16, tokens=40, kind="uniform", sinks=2, positions=30),
    Case(dim=80, tokens=50, wide=True, ragged=True),
    Case(dim=200, tokens=20),
]
LARGE = SMALL + [
    Case(
        dim=dim, tokens=tokens, kind=kind, bits=bits, queries=queries, batch=3, heads=3, ragged=ragged, sinks=sinks
    )
    for dim in (16, 24, 32, 64, 128)
    for kind, bits in (
        ("uniform", 3),
        ("uniform", 2),
        ("uniform", 3.5),
        ("table", 4),
        ("flat", 3),
        ("flat-uniform", 3),
    )
    for tokens, queries, ragged, sinks in (
        (1, 1, False, 0),
        (1023, 1, True, 1),
        (1000, 1, False, 4),
        (33, 5, True, 2),
    )
]
LARGE += [Case(dim=256, tokens=100, queries=queries, batch=9, ragged=True) for queries in (1, 4)]
LARGE += [
    Case(dim=dim, tokens=tokens, bits=bits, queries=queries, batch=3, heads=3, ragged=True, sinks=4, wide=True)
    for dim in (32, 36, 80, 96, 112)
    for tokens, bits, queries in ((1, 3, 1), (1000, 2, 1), (1023, 3, 4), (400, 3.5, 1))
]


def check(case: Case, backend: dispatch.Backend, device: str = "cpu") -> None:
    """Right within the tolerance, and the same bits twice, with poison around what is valid."""
    q, held, layer = made(case, device, backend == "ptx")
    poison(q)
    first = dispatch.attend(q, held, layer, backend)
    poison(q)
    error = relative_error(first, dispatch.plain_attend(q.double(), held, layer))
    assert error <= TOLERANCE[case.dtype]
    assert torch.equal(first, dispatch.attend(q, held, layer, backend))


def made(case: Case, device: str, tiled: bool) -> tuple[torch.Tensor, Held, PreparedLayer]:
    """`make` with room as a cache has it, and values in the order of the fast path or of the others."""
    q, held, layer = make(case, device, room=-case.tokens % ROOM)
    return q, in_tiles(held) if tiled and layer.v.spec.can_tile else held, layer


def poison(q: torch.Tensor) -> None:
    """Leave NaN in the memory that the next buffers will be given."""
    for size in (q.numel(), 64 * q.numel(), 1 << 16):
        torch.full((size,), torch.nan, device=q.device)


@interpreted
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_portable(case: Case) -> None:
    check(case, "triton")


@pytest.mark.parametrize("case", [case for case in SMALL if "uniform" in case.kind], ids=str)
def test_lookup(case: Case) -> None:
    if case.scale != "none":
        check(replace(case, dtype=torch.float32), "lookup")


COMPILED = [
    *(case for case in SMALL if "uniform" in case.kind),
    *(
        Case(dim=dim, tokens=33 + dim, queries=queries, batch=3, ragged=ragged, sinks=sinks, bits=bits)
        for dim in (16, 24, 32, 64, 128)
        for queries, ragged, sinks, bits in ((1, True, 0, 3), (5, True, 4, 2.5), (2, False, 1, 4))
    ),
    Case(dim=32, tokens=70, kind="flat-uniform", bits=1, sinks=3),
    Case(dim=64, tokens=70, kind="flat-uniform", bits=8),
    Case(dim=16, tokens=2500, batch=1, kind="flat-uniform", bits=7),
    Case(dim=24, tokens=9, kind="uniform", scale="none", centred=False, sinks=0),
    Case(dim=32, tokens=40, queries=3, positions=20, ragged=True, dtype=torch.bfloat16),
]
compiled = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")


@compiled
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled(case: Case) -> None:
    check(case, "compiled")


@compiled
@pytest.mark.skipif(INTERPRETED, reason="there, triton comes first")
@pytest.mark.parametrize(
    "case", [Case(dim=16, batch=3, ragged=True, tokens=70), Case(queries=2, batch=3)], ids=str
)
def test_compiled_bits_depend_on_a_row_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the number of threads, the rest of the batch, the room behind it, or how the query lies in memory."""
    q, held, layer = make(case, room=5)
    assert dispatch.choose(q, held, layer) == "compiled"
    monkeypatch.setattr(cpu_compiled, "FEW_NUMBERS", 0)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4, 1):
            torch.set_num_threads(threads)
            found.append(dispatch.attend(q, held, layer))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    wide = torch.full((*q.shape[:-1], 2 * q.shape[-1]), torch.nan)
    wide[..., ::2] = q
    assert torch.equal(dispatch.attend(wide[..., ::2], held, layer), found[0])
    for row in range(case.batch):
        one = slice(row, row + 1)
        length = case.tokens + case.sinks if held.lengths is None else int(held.lengths[row])
        alone = replace(_rows_of(held, one, max(0, length - case.sinks)), lengths=None)
        assert length < case.sinks or torch.equal(dispatch.attend(q[one], alone, layer)[0], found[0][row])


def _rows_of(held: Held, rows: slice, tokens: int) -> Held:
    """Some sequences of a cache, their first packed tokens: views."""
    k, v = (
        Packed(
            packed.codes[rows, :, :, :tokens], None if packed.scales is None else packed.scales[rows, :, :tokens]
        )
        for packed in (held.k, held.v)
    )
    sinks = (None if x is None else x[rows] for x in (held.sink_k, held.sink_v))
    return Held(k, v, held.rope, held.lengths, *sinks)


@compiled
def test_compiled_short_sequences() -> None:
    """None at all gets 0; one shorter than the sinks, its own sinks alone."""
    q, held, layer = make(Case(tokens=8, batch=3, sinks=3, ragged=True))
    held = replace(held, lengths=torch.tensor([0, 2, 9], dtype=torch.int32))
    out = dispatch.attend(q, held, layer, "compiled")
    assert (out[0] == 0).all()
    assert relative_error(out, dispatch.plain_attend(q.double(), held, layer)) < 1e-5


@compiled
def test_compiled_reads_any_memory_order() -> None:
    q, held, layer = make(Case(tokens=20))
    assert held.k.scales is not None and held.v.scales is not None
    spread = [x.mT.contiguous().mT for x in (held.k.scales, held.v.codes, held.v.scales)]
    k_codes = held.k.codes.transpose(3, 4).contiguous().transpose(3, 4)
    other = replace(held, k=Packed(k_codes, spread[0]), v=Packed(spread[1], spread[2]))
    found = dispatch.attend(q, other, layer, "compiled")
    assert torch.equal(found, dispatch.attend(q, held, layer, "compiled"))
    before = k_codes.clone()
    dispatch.append(q[:, :, :1], q[:, :, :1], layer, other, 1)
    assert not torch.equal(before, k_codes)


@compiled
@pytest.mark.parametrize(
    "case",
    [
        Case(dim=16, tokens=40, heads=5, batch=3, ragged=True),
        Case(dim=24, tokens=7, batch=1, kind="flat-uniform", bits=4, scale="norm", sinks=0, ragged=True),
        Case(dim=64, tokens=33, sinks=3, positions=20, ragged=True),
        Case(dim=80, tokens=21, queries=3, dtype=torch.bfloat16, wide=True, ragged=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_prepared_step_does_what_single_calls_do(
    case: Case, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, call after call, over buffers whose rest is junk; what sinks hold may change in between."""
    for few in ("FEW_NUMBERS", "FEW_PACKED"):
        monkeypatch.setattr(cpu_compiled, few, 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, held, layer = make(case, room=9)
    step = cpu_compiled.Step.of(layer, held)
    assert step is not None and held.lengths is not None
    generator = torch.Generator().manual_seed(1)
    for turn in range(3):
        longest = int(held.lengths.max())
        alone = replace(held, lengths=held.lengths.clone())
        assert torch.equal(step.reading.attend(q, held.lengths, longest), cpu_compiled.attend(q, alone, layer))
        k, v = torch.randn(2, case.batch, case.heads, 1, case.dim, generator=generator).to(case.dtype)
        for x in (held.sink_k, held.sink_v):
            if x is not None:
                x.add_(0.5)
        starts = held.lengths - 1
        copied = [copy.deepcopy(side) for side in (held.k, held.v)]
        cpu_compiled.append(k, v, layer, replace(held, k=copied[0], v=copied[1]), starts)
        step.writing.append(k, v, starts)
        for mine, other in zip((held.k, held.v), copied, strict=True):
            assert torch.equal(mine.codes, other.codes) and torch.equal(mine.scales, other.scales)  # type: ignore[arg-type]
        q, held.lengths[:] = -q, (held.lengths - turn).clamp_min(1)


@compiled
def test_compiled_keeps_nan_and_its_place() -> None:
    """A NaN shows; a token that has no room is refused, since nothing would stop it from being written."""
    q, held, layer = make(Case(tokens=20))
    assert dispatch.attend(q * torch.nan, held, layer, "compiled").isnan().all()
    past = torch.tensor([1, 21], dtype=torch.int32)
    for start, x in ((past, q), (21, q), (1, q[:1]), (1, q[..., :32])):
        with pytest.raises(ValueError):
            dispatch.append(x, x, layer, held, start, "compiled")


@pytest.mark.skipif(INTERPRETED, reason="there, triton comes first")
def test_without_numba_bytes_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    q, held, layer = make(Case(tokens=20))
    monkeypatch.setattr(cpu_compiled, "find_spec", lambda name: None)
    cpu_compiled.problem.cache_clear()
    try:
        assert dispatch.choose(q, held, layer) == "lookup"
        with pytest.raises(BackendError, match="numba is not installed"):
            dispatch.attend(q, held, layer, "compiled")
        check_pack(Case(dim=64, tokens=1, ragged=True), dispatch.append)
    finally:
        cpu_compiled.problem.cache_clear()


@compiled
def test_compiled_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder for numba's cache: compiled each time. A numba that fails: the reason, and another backend."""
    import numba

    q, held, layer = make(Case(tokens=20))
    right, asked = numba.cfunc, []

    def readonly(signature: object, cache: bool = False, **how: object) -> object:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return right(signature, **how)

    def broken(*arguments: object, **how: object) -> object:
        raise TypeError("no such machine")

    try:
        for replacement, reason in ((readonly, None), (broken, "no such machine")):
            cpu_compiled.problem.cache_clear()
            cpu_compiled.loop_of.cache_clear()
            monkeypatch.setattr(numba, "cfunc", replacement)
            monkeypatch.setattr(cpu_compiled, "LOOPS", ("pack",))  # the one that compiles sooner
            assert reason in (None, cpu_compiled.problem()) or reason in str(cpu_compiled.problem())
            if reason and not INTERPRETED:
                assert dispatch.choose(q, held, layer) == "lookup"
        assert asked == [True, False]
    finally:
        cpu_compiled.problem.cache_clear()
        cpu_compiled.loop_of.cache_clear()


@compiled
def test_loops_are_written_with_the_numbers_of_others() -> None:
    from turboesm_kernels import cpu_loops, cpu_masks

    assert (cpu_loops.FLOAT, cpu_loops.TERMS, cpu_loops.PIECES) == (4, cpu_masks.TERMS, cpu_masks.PIECES)
    assert (cpu_loops.SCALE_STEPS_PER_OCTAVE, cpu_loops.SCALE_ZERO) == (
        reference.SCALE_STEPS_PER_OCTAVE,
        reference.SCALE_ZERO,
    )
    kinds = {"none": cpu_loops.NO_SCALE, "norm": cpu_loops.NORM, "least-squares": cpu_loops.LEAST_SQUARES}
    assert [kinds[name] for name in cpu_compiled.SCALES] == [0, 1, 2]
    assert cpu_loops.HEADS == 6 and cpu_loops.P_HEADS == 4  # after as many that differ from call to call
    layer = make(Case(tokens=4))[2]
    assert layer.k.loops is not None and layer.v.loops is not None
    assert cpu_loops.K_MAP + 2 * len(layer.k.loops.reading) == cpu_loops.V_FACTORS + 1
    assert cpu_loops.P_CENTRE + len(layer.k.loops.writing) == cpu_loops.P_FACTORS + 1


@interpreted
@pytest.mark.parametrize(
    "case",
    [Case(tokens=100, batch=1), Case(tokens=70, batch=9, heads=5, bits=2.5), Case(dim=128, tokens=33, queries=4)],
    ids=str,
)
def test_fast_fold(case: Case) -> None:
    """The part of the fast path that holds no PTX: integer queries."""
    from turboesm_kernels import ptx_launch

    q, _, layer = make(case)
    fields = layer.k.fields
    assert fields is not None
    poison(q)
    found = ptx_launch.project_query(q, layer, fields, early=False)
    gain, constant = found.scalars.unbind(-1)
    low, high = found.descriptors.view(torch.int8).flatten(4).unbind(3)
    folded = 256 * high.int() + low
    wanted = (q @ fields.map) / math.log(2)
    assert torch.allclose(folded * gain[..., None], wanted, atol=0.51 * gain.max().item())
    offset = -(folded * gain[..., None] * fields.middle[:, None]).sum(-1)
    assert torch.allclose(constant, offset, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dim", "tokens"), [(64, 200), (128, 128), (64, 33), (64, 1)])
def test_turns_of_a_block(dim: int, tokens: int) -> None:
    """The matrix product that `ptx_text.bias_code` does, fragment by fragment, gives the centre's scores."""
    from turboesm_kernels.bits import phase_map

    g = torch.Generator().manual_seed(0)
    rope = Rope.at(torch.arange(tokens) + 3, 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    q, centre = torch.randn(2, dim, generator=g).double()
    phases = q @ phase_map(centre)
    expected = phases @ rope.half.double()
    first = tokens // 129 * 128
    found = torch.full((128,), torch.nan, dtype=torch.float64)
    turns = rope.turns.double().sum(0)  # [d / 16, 32, 4, 2]
    even, odd = phases.chunk(2)
    for column in range(8):
        at = min(first + 2 * column, tokens - 1)
        x, y = rope.cos[at, : dim // 2].double(), rope.sin[at, : dim // 2].double()
        cosine, sine = even * x + odd * y, odd * x - even * y
        for lane in range(32):  # lane 4 g + i has of the product's row g the pairs of i, of row g + 8 likewise
            pairs = (dim // 8 * (lane % 4) + torch.arange(dim // 8)).view(-1, 2)
            for half in range(2):
                part = turns[:, lane, half::2]  # [d / 16, 2, 2]
                value = (part[..., 0] * cosine[pairs] + part[..., 1] * sine[pairs]).sum()
                token = 16 * (lane // 4) + half + 2 * column
                found[token] = value if lane % 4 == 0 else found[token] + value
    there = torch.arange(128) < tokens - first
    assert torch.allclose(found[there], expected[first : first + 128], atol=2e-5)


@interpreted
def test_empty_sequence_gets_zero() -> None:
    q, held, layer = make(Case(tokens=8, batch=2, ragged=True))
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    out = dispatch.attend(q, replace(held, lengths=lengths), layer, "triton")
    assert (out[0] == 0).all()
    assert relative_error(out, dispatch.plain_attend(q.double(), replace(held, lengths=lengths), layer)) < 1e-3


@interpreted
def test_sequence_shorter_than_the_sinks() -> None:
    q, held, layer = make(Case(tokens=8, batch=2, sinks=3, ragged=True))
    held = replace(held, lengths=torch.tensor([2, 9], dtype=torch.int32))
    out = dispatch.attend(q, held, layer, "triton")
    assert relative_error(out, dispatch.plain_attend(q.double(), held, layer)) < 1e-3


@interpreted
def test_some_rows_may_be_in_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the fast path leaves them: the first rows whole, the others divided."""
    from turboesm_kernels import triton_launch

    q, held, layer = make(Case(tokens=700, batch=3, queries=2, ragged=True, sinks=2))
    seen: list[triton_launch.Partials] = []
    combine = triton_launch.combine
    for chunk in (768, 256):
        with monkeypatch.context() as changed:
            changed.setattr(triton_launch, "chunk_of", lambda q, tokens, block, own=chunk: own)
            changed.setattr(triton_launch, "combine", lambda q, held, layer, partials: seen.append(partials))
            triton_launch.attend(q, held, layer)
    once, thrice = seen
    assert (once.splits, thrice.splits) == (1, 3)
    expected = dispatch.plain_attend(q.double(), held, layer)
    for whole in (0, 1, 7, 11):
        parts = (
            torch.cat((getattr(once, name)[:whole], getattr(thrice, name)[3 * whole :]))
            for name in ("top", "mass", "out")
        )
        found = combine(q, held, layer, triton_launch.Partials(*parts, splits=3, whole=whole))
        assert relative_error(found, expected) < 1e-3


@interpreted
def test_strided_query() -> None:
    q, held, layer = make(Case(tokens=20, queries=2))
    wide = torch.full((*q.shape[:-1], 2 * q.shape[-1]), torch.nan)
    wide[..., ::2] = q
    assert torch.equal(
        dispatch.attend(wide[..., ::2], held, layer, "triton"), dispatch.attend(q, held, layer, "triton")
    )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the child process")
def test_interpreter() -> None:
    """Run the tests above on the CPU: Triton reads TRITON_INTERPRET when it is imported."""
    run_interpreted(__file__)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("backend", ["triton", "ptx"])
def test_on_gpu(case: Case, backend: dispatch.Backend) -> None:
    q, held, layer = made(case, "cuda", backend == "ptx")
    try:
        dispatch.choose(q, held, layer, backend)
    except BackendError:
        pytest.skip("not served by this backend")
    check(case, backend, "cuda")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens"),
    [(256, 20, 1024), (64, 20, 1024), (1, 1, 1), (79, 20, 300), (3000, 33, 5000), (1, 20, 40_000)],
)
def test_ranges(batch: int, heads: int, tokens: int, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that one warp goes over fill the device to the last warp; the others are divided into whole blocks."""
    from turboesm_kernels import ptx_launch

    monkeypatch.setattr(ptx_launch, "processors", lambda q: 132)
    q = torch.empty(batch, heads, 1, 64, device="meta")
    chunk, whole = ptx_launch.ranges_of(q, tokens, grouped)
    assert chunk % reference.TURN == 0 and 0 < chunk <= ptx_launch.LONGEST * reference.TURN
    assert whole % (132 * ptx_launch.WARPS) == 0 and whole < batch * heads
    assert not whole or (chunk > reference.TURN and tokens <= ptx_launch.LONGEST * reference.TURN and not grouped)
    if (batch, tokens, grouped) == (256, 1024, False):
        assert (chunk, whole) == (256, 3 * 132 * 12)  # 3.2 waves of warps


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("chunk", [128, 384])
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=1023, batch=3, ragged=True, sinks=4),
        Case(tokens=1, bits=2, sinks=0),
        Case(tokens=700, dim=128, centred=False),
        Case(tokens=3000, batch=2, ragged=True, bits=3.5),
        Case(tokens=1023, batch=9, ragged=True, sinks=4, positions=1024, dtype=torch.bfloat16),
        Case(tokens=384, batch=70, sinks=2, positions=300),
        Case(tokens=700, dim=128, queries=4, ragged=True, batch=3, dtype=torch.bfloat16),
        Case(tokens=300, queries=3, ragged=True, sinks=2, positions=200),
        Case(tokens=700, dim=80, batch=3, ragged=True, sinks=4, wide=True),
        Case(tokens=500, dim=96, batch=3, ragged=True, sinks=4, wide=True, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_ranges_on_gpu(case: Case, chunk: int) -> None:
    """The fast path in ranges of one block, and of several; grouped queries apart."""
    check_ranges(case, chunk, grouped=False)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("chunk", [128, 384])
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=700, dim=128, queries=4, ragged=True, batch=3, dtype=torch.bfloat16),
        Case(tokens=1023, dim=128, bits=2, queries=3, batch=5, ragged=True, sinks=4),
        Case(tokens=1, dim=64, queries=3, batch=2),
        Case(tokens=555, dim=64, queries=16, centred=False, batch=2),
        Case(tokens=400, dim=96, queries=7, batch=3, ragged=True, sinks=4, wide=True, dtype=torch.bfloat16),
        Case(tokens=300, dim=32, queries=4, batch=70, bits=4, seed=2, wide=True),
    ],
    ids=str,
)
def test_groups_on_gpu(case: Case, chunk: int) -> None:
    """The same where one product serves four queries."""
    check_ranges(case, chunk, grouped=True)


def check_ranges(case: Case, chunk: int, grouped: bool) -> None:
    from turboesm_kernels import ptx_launch

    q, held, layer = made(case, "cuda", tiled=True)
    assert not grouped or ptx_launch.can_group(q, layer)
    rows = q.shape[:3].numel()
    for whole in (0,) if grouped or chunk == 128 else (0, 1, rows // 2, rows - 1):
        check_ranges_of(case, q, held, layer, chunk, grouped, whole)


def check_ranges_of(
    case: Case, q: torch.Tensor, held: Held, layer: PreparedLayer, chunk: int, grouped: bool, whole: int
) -> None:
    """`whole` rows are gone over by one warp each."""
    from turboesm_kernels import ptx_launch

    attend = partial(ptx_launch.attend, grouped=grouped, whole=whole)
    poison(q)
    found = attend(q, held, layer, chunk)
    assert relative_error(found, dispatch.plain_attend(q.double(), held, layer)) <= TOLERANCE[case.dtype]
    assert torch.equal(found, attend(q, held, layer, chunk))
    if held.lengths is None:
        return
    k, v = torch.randn(2, case.batch, case.heads, 1, case.dim, device="cuda").to(case.dtype)
    seen: list[torch.Tensor] = []
    for _ in range(20):  # the codes are read as soon as they may be: not before they are packed
        poison(q)
        seen.append(ptx_launch.append_and_attend(q, k, v, held, layer, held.lengths - 1, chunk, grouped, whole))
        expected = attend(q, held, layer, chunk)
        assert relative_error(seen[-1], expected) < 1e-6 or seen[-1].dtype != torch.float32
        assert relative_error(seen[-1], expected) <= TOLERANCE[case.dtype]
        k, v = -k, -v
    assert all(torch.equal(result, seen[at % 2]) for at, result in enumerate(seen))


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("scales", [(40, 100, 150, 150), (150, 150, 100, 40)], ids=["rising", "falling"])
def test_scores_of_other_blocks_on_gpu(scales: tuple[int, ...]) -> None:
    """Blocks whose greatest scores lie many octaves apart: the fast path empties its sums, or weights vanish."""
    from turboesm_kernels import ptx_launch

    q, held, layer = made(Case(tokens=400, batch=2, heads=4, queries=4), "cuda", tiled=True)
    q = 2.5 * q
    q[:, :, 1] *= 0.1  # this one's sums are not emptied when others' are
    assert held.k.scales is not None
    for block, scale in enumerate(scales):
        held.k.scales[:, :, 128 * block : 128 * (block + 1)] = scale
    expected = dispatch.plain_attend(q.double(), held, layer)
    for chunk in (128, 512):
        for grouped in (False, True):
            assert relative_error(ptx_launch.attend(q, held, layer, chunk, grouped), expected) <= 1e-3


@pytest.mark.gpu
@no_gpu
def test_in_a_graph() -> None:
    q, held, layer = made(Case(tokens=512, batch=2), "cuda", tiled=True)
    eager = dispatch.attend(q, held, layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dispatch.attend(q, held, layer)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, eager)


def test_values_in_tiles_are_left_to_the_fast_path_and_the_reference() -> None:
    """None of the others takes them for planes; nor does what packs without Triton."""
    q, held, layer = make(Case(tokens=33, ragged=True))
    tiled = in_tiles(held)
    assert tiled.v.tiled and tiled.tokens == held.tokens
    assert torch.equal(reference.untiled(tiled.v.codes)[..., :33], held.v.codes)
    assert torch.equal(dispatch.attend(q, tiled, layer), dispatch.attend(q, held, layer, "torch"))
    for backend in ("triton", "compiled", "lookup"):
        with pytest.raises(BackendError, match=r"tiles|CUDA device|not installed"):
            dispatch.attend(q, tiled, layer, backend)  # type: ignore[arg-type]
    before = tiled.v.codes.clone()
    for backend in (None, "torch", "lookup", "compiled"):
        with pytest.raises(BackendError, match="tiles"):
            dispatch.append(q[:, :, :1], q[:, :, :1], layer, tiled, 1, backend)  # type: ignore[arg-type]
    assert torch.equal(tiled.v.codes, before)
    swapped = replace(tiled, v=replace(tiled.v, codes=tiled.v.codes.transpose(3, 4)))
    for wrong in (swapped, replace(held, k=replace(held.k, codes=tiled.v.codes))):
        with pytest.raises(ValueError):
            dispatch.attend(q, wrong, layer, "torch")


def test_plain_backend_without_triton() -> None:
    q, held, layer = make(Case(tokens=17, ragged=True))
    expected = dispatch.plain_attend(q.double(), held, layer)
    assert relative_error(dispatch.attend(q, held, layer, "torch"), expected) < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="there, triton can run")
@pytest.mark.parametrize("backend", ["triton", "ptx"])
def test_backend_that_cannot_run_says_why(backend: dispatch.Backend) -> None:
    q, held, layer = make(Case(tokens=4))
    with pytest.raises(BackendError, match=r"CUDA device|not installed"):
        dispatch.attend(q, held, layer, backend)


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="no backend"):
        dispatch.attend(*make(Case(tokens=4)), "cuda")  # type: ignore[arg-type]


def wrong_query(held: Held) -> tuple[torch.Tensor, Held]:
    return torch.zeros(2, 3, 1, 64), held


def wrong_codes(held: Held) -> tuple[torch.Tensor, Held]:
    return torch.zeros(2, 2, 1, 64), replace(held, k=replace(held.k, codes=held.k.codes[..., :2]))


def no_scales(held: Held) -> tuple[torch.Tensor, Held]:
    return torch.zeros(2, 2, 1, 64), replace(held, v=replace(held.v, scales=None))


def no_rope(held: Held) -> tuple[torch.Tensor, Held]:
    return torch.zeros(2, 2, 1, 64), replace(held, rope=None)


def many_queries(held: Held) -> tuple[torch.Tensor, Held]:
    return torch.zeros(2, 2, 17, 64), held


@pytest.mark.parametrize("wrong", [wrong_query, wrong_codes, no_scales, no_rope, many_queries])
def test_wrong_inputs_are_refused(wrong: object) -> None:
    _, held, layer = make(Case(tokens=8))
    q, held = wrong(held)  # type: ignore[operator]
    with pytest.raises(ValueError):
        dispatch.attend(q, held, layer, "torch")


def check_pack(case: Case, pack: Callable[..., None], device: str = "cpu", tiled: bool = False) -> None:
    """The codes of the reference but for ties, written where they belong and nowhere else; `tiled`: values."""
    specs = {side: make_spec(side, case, device) for side in SIDES}
    layer = PreparedLayer.of(specs["k"], specs["v"])
    g = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.heads, case.tokens, case.dim)
    x = {side: _tokens_first(torch.randn(shape, generator=g).to(case.dtype).to(device)) for side in SIDES}
    room, first = 7, 3
    rope = angles(case, torch.arange(case.tokens + room) + 2, device)
    body = slice(first, first + case.tokens)
    expected = {side: reference.compress(x[side], specs[side], rope.rows(body)) for side in SIDES}
    sinks = torch.zeros(case.batch, case.heads, 2, case.dim, device=device)
    held = Held(*(_filled(expected[side], room) for side in SIDES), rope, None, sinks, sinks)
    held = in_tiles(held) if tiled else held
    start = first + held.sinks
    where = start if case.ragged is False else torch.full((case.batch,), start, dtype=torch.int32, device=device)
    pack(x["k"], x["v"], layer, held, where)
    for side, into in (("k", held.k), ("v", replace(held.v, codes=reference.untiled(held.v.codes)))):
        found = reference.unpack(into.codes[:, :, :, body], specs[side])
        wanted = reference.unpack(expected[side].codes, specs[side])
        assert (found != wanted).float().mean() < 1e-4
        if into.scales is not None:
            assert (into.scales[:, :, body].int() - expected[side].scales.int()).abs().max() <= 1
        after = into.codes[:, :, :, body.stop : body.stop + room - first]
        assert (into.codes[:, :, :, :first] == JUNK).all() and (after == JUNK).all()
        assert not into.codes[:, :, :, body.stop + room - first :].any()  # of the last tile


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """The same [B, H, T, d], laid out as a projection leaves it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _filled(like: Packed, room: int) -> Packed:
    """Buffers of junk for `room` tokens more."""
    codes, scales = (
        None if x is None else torch.full(grown, JUNK, dtype=torch.uint8, device=x.device)
        for x, grown in (
            (like.codes, [n + room * (i == 3) for i, n in enumerate(like.codes.shape)]),
            (like.scales, [] if like.scales is None else [*like.scales.shape[:2], like.codes.shape[3] + room]),
        )
    )
    assert codes is not None
    return Packed(codes, scales)


PACKED = [
    Case(dim=16, tokens=33, kind="flat", bits=3, sinks=0),
    Case(dim=24, tokens=31, kind="table", bits=3),
    Case(dim=32, tokens=1, kind="uniform", bits=2.5, ragged=True),
    Case(dim=64, tokens=70, kind="uniform", bits=3),
    Case(dim=64, tokens=1, kind="flat", bits=3, ragged=True),
    Case(dim=64, tokens=40, kind="flat", bits=4, scale="none"),
    Case(dim=64, tokens=40, kind="table", bits=4, scale="norm"),
    Case(dim=128, tokens=17, kind="uniform", bits=3),
    Case(dim=64, tokens=20, kind="flat", bits=7),
    Case(dim=64, tokens=9, kind="flat-uniform", bits=8, dtype=torch.bfloat16),
    Case(dim=64, tokens=9, kind="flat-uniform", bits=1, dtype=torch.float16),
    Case(dim=64, tokens=1, batch=35, kind="uniform", ragged=True, dtype=torch.bfloat16),
    Case(dim=32, tokens=1, batch=35, kind="uniform"),
    Case(dim=64, tokens=70, kind="uniform", positions=60),
    Case(dim=64, tokens=1, batch=35, kind="uniform", ragged=True, positions=9),
    Case(dim=80, tokens=20, wide=True),
    Case(dim=200, tokens=5),
]


def check_sinks(
    case: Case, pack: Callable[..., None], start: int, device: str = "cpu", tiled: bool = False
) -> None:
    """Tokens from a sink on: those of them that are sinks kept whole, the rest packed as by themselves."""
    specs = {side: make_spec(side, case, device) for side in SIDES}
    layer = PreparedLayer.of(specs["k"], specs["v"])
    g = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.heads, case.tokens, case.dim)
    k, v = (_tokens_first(torch.randn(shape, generator=g).to(case.dtype).to(device)) for _ in SIDES)
    rope = angles(case, torch.arange(case.tokens + 7) + 3, device)
    like = [reference.compress(x, specs[side], rope.rows(slice(case.tokens))) for side, x in (("k", k), ("v", v))]

    def empty() -> Held:
        sinks = torch.full((2, case.batch, case.heads, 3, case.dim), torch.nan, device=device).half()
        held = Held(*(_filled(each, 4) for each in like), rope, None, *sinks)
        return in_tiles(held) if tiled else held

    found, wanted = empty(), empty()
    pack(k, v, layer, found, start)
    kept = min(3 - start, case.tokens)
    if case.tokens > kept:
        pack(k[:, :, kept:], v[:, :, kept:], layer, wanted, 3)
    for x, sinks in ((k, found.sink_k), (v, found.sink_v)):
        assert sinks is not None and torch.equal(sinks[:, :, start : start + kept], x[:, :, :kept].half())
        assert sinks[:, :, :start].isnan().all() and sinks[:, :, start + kept :].isnan().all()
    for one, other in ((found.k, wanted.k), (found.v, wanted.v)):
        assert torch.equal(one.codes, other.codes)
        assert one.scales is None or (other.scales is not None and torch.equal(one.scales, other.scales))


FROM_SINKS = [
    Case(dim=16, tokens=33, kind="flat", bits=3),
    Case(dim=24, tokens=2, kind="table", bits=3),
    Case(dim=64, tokens=70, kind="uniform", bits=3, dtype=torch.bfloat16),
    Case(dim=64, tokens=40, kind="flat", bits=4, scale="none"),
    Case(dim=64, tokens=20, kind="uniform", positions=60),
    Case(dim=80, tokens=1, batch=5, wide=True),
    Case(dim=200, tokens=5),
]


def in_order(cases: list[Case]) -> pytest.MarkDecorator:
    """Cases with values in planes, and those that can have them with values in tiles."""
    both = [
        (case, tiled) for case in cases for tiled in (False, True) if not tiled or make_spec("v", case).can_tile
    ]
    ids = [f"{case}{'-tiled' * tiled}" for case, tiled in both]
    return pytest.mark.parametrize(("case", "tiled"), both, ids=ids)


@interpreted
@in_order(PACKED)
def test_pack(case: Case, tiled: bool) -> None:
    from turboesm_kernels.pack import pack  # needs Triton

    check_pack(case, pack, tiled=tiled)


@interpreted
@pytest.mark.parametrize("start", [0, 2])
@in_order(FROM_SINKS)
def test_pack_from_sinks(case: Case, tiled: bool, start: int) -> None:
    from turboesm_kernels.pack import pack  # needs Triton

    check_sinks(case, pack, start, tiled=tiled)


@interpreted
def test_a_cache_looks_at_where_prompts_go_once(
    tiny: EsmModel, specs: dict[str, CodecSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, some of its sequences, and a copy: each into its own buffers, as the plain reference packs."""
    from turboesm_kernels.pack import Target

    def target(layer: PreparedLayer, held: Held, backend: dispatch.Backend | None = None) -> Target | None:
        if backend == "torch":
            return None
        made.append(layer)
        return Target.of(layer, held)

    def prompt(cache: PackedCache, count: int) -> None:
        cache.begin(count)
        for layer in range(2):
            k, v = torch.randn(2, cache.batch, 2, count, 16, generator=torch.Generator().manual_seed(count))
            cache.append(layer, k, v, torch.zeros(cache.batch, count, dtype=torch.int64))

    made: list[PreparedLayer] = []
    monkeypatch.setattr(dispatch, "target", target)
    plain, cache = (PackedCache(tiny, specs["flat"], 3, 40, backend) for backend in ("torch", None))
    assert specs["flat"].recipe.sinks == 1
    for own in (plain, cache):
        prompt(own, 9)
        prompt(own, 7)
        one = own.rows(1, 2)
        prompt(one, 4)
        prompt(one, 2)
    assert len(made) == 2 * 2
    before = {name: tensor.clone() for name, tensor in cache.tensors.items()}
    prompt(copy.deepcopy(cache).rows(2, 3), 5)
    for name, tensor in cache.tensors.items():
        assert torch.equal(tensor, before[name])
        assert (tensor != plain.tensors[name]).float().mean() < 0.01, name


@interpreted
def test_what_does_not_fit_its_target_is_refused() -> None:
    """A kernel writes wherever addresses say."""
    from turboesm_kernels.pack import Target

    _, held, layer = make(Case(dim=16, tokens=8, sinks=2))
    k = torch.randn(len(held.k.codes), layer.k.spec.heads, 4, 16)
    target, before = Target.of(layer, held), held.k.codes.clone()
    assert held.v.scales is not None and held.rope is not None
    for scales in (held.v.scales[:1], held.v.scales[:, :, :4], held.v.scales.int()):
        with pytest.raises(ValueError, match="scales must be"):
            Target.of(layer, replace(held, v=replace(held.v, scales=scales)))
    with pytest.raises(ValueError, match="sines"):
        Target.of(layer, replace(held, rope=Rope(held.rope.cos, held.rope.sin[:4])))
    starts = torch.zeros(len(k), dtype=torch.int32)
    one = k[:, :, :1]
    for x, start in ((k[:, :, :2], starts), (one, starts[0]), (one, starts[:-1]), (one, starts.float())):
        with pytest.raises(ValueError, match="one token"):
            target.put(x, x, start)
    others = (k[:1].repeat(9, 1, 1, 1), k[:, :1], k[..., :8], k[:, :, :2], k.to("meta"))
    for keys, values, start in (
        *((x, x, 0) for x in others[:3]),
        *((k, x, 0) for x in others),
        (k, k, 7),
        (k, k, -1),
    ):
        with pytest.raises(ValueError, match=r"the c|do not fit"):
            target.put(keys, values, start)
    assert torch.equal(held.k.codes, before)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("backend", ["lookup", "torch", pytest.param("compiled", marks=compiled)])
@pytest.mark.parametrize("case", FROM_SINKS, ids=str)
def test_pack_from_sinks_without_triton(case: Case, backend: dispatch.Backend, start: int) -> None:
    check_sinks(case, partial(dispatch.append, backend=backend), start)


def test_sinks_that_do_not_fit_are_refused_before_anything_is_written() -> None:
    _, held, layer = make(Case(tokens=8, sinks=2))
    k = torch.randn(2, 2, 4, 64)
    before = held.k.codes.clone()
    for wrong in (replace(held, sink_v=None), replace(held, sink_k=k[:1, :, :2], sink_v=k[:1, :, :2])):
        with pytest.raises(ValueError, match="sinks"):
            dispatch.append(k, k, layer, wrong, 0)
    assert torch.equal(held.k.codes, before)


@pytest.mark.parametrize("backend", ["lookup", pytest.param("compiled", marks=compiled)])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_pack_without_triton(case: Case, backend: dispatch.Backend) -> None:
    check_pack(case, partial(dispatch.append, backend=backend))


ATTENDED = """
from interpreter import run_interpreted
from kernel_cases import Case, make
from turboesm_kernels import dispatch
print(dispatch.attend(*make(Case(tokens=200, dim=16, heads=4)), "compiled").numpy().tobytes().hex())
"""


@compiled
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the child process")
def test_loops_give_the_same_bits_compiled_and_from_the_cache(tmp_path: Path) -> None:
    """Where loops call others, numba links a process that compiled them to other code than it keeps."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    found = [
        subprocess.run(
            [sys.executable, "-c", ATTENDED], env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbc")) and found[0].stdout == found[1].stdout != ""


@compiled
def test_compiled_packs_a_token_the_same_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of a prefill by two threads are those of its tokens one by one."""
    _, held, layer = make(Case(tokens=9, dim=32))
    other = _rows_of(held, slice(None), 9)
    other = replace(other, k=_copy(other.k), v=_copy(other.v))
    k, v = torch.randn(2, 2, 2, 9, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(cpu_compiled, "FEW_PACKED", 0)
    dispatch.append(k, v, layer, held, 1, "compiled")
    for i in range(9):
        starts = torch.full((2,), 1 + i, dtype=torch.int32)
        dispatch.append(k[:, :, i : i + 1], v[:, :, i : i + 1], layer, other, starts, "compiled")
    for one, two in ((held.k, other.k), (held.v, other.v)):
        assert torch.equal(one.codes, two.codes)
        assert one.scales is not None and two.scales is not None and torch.equal(one.scales, two.scales)


def _copy(packed: Packed) -> Packed:
    return Packed(torch.zeros_like(packed.codes), None if packed.scales is None else packed.scales.clone())


@pytest.mark.gpu
@no_gpu
@in_order(
    [
        *PACKED,
        Case(dim=64, tokens=1024, batch=4),
        Case(dim=256, tokens=100),
        Case(dim=256, tokens=1, kind="table"),
    ]
)
def test_pack_on_gpu(case: Case, tiled: bool) -> None:
    from turboesm_kernels.pack import pack

    check_pack(case, pack, "cuda", tiled)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("start", [0, 2])
@in_order([*FROM_SINKS, Case(dim=256, tokens=100), Case(dim=128, tokens=40)])
def test_pack_from_sinks_on_gpu(case: Case, tiled: bool, start: int) -> None:
    from turboesm_kernels.pack import pack

    check_sinks(case, pack, start, "cuda", tiled)


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=70, batch=19, heads=3, ragged=True),
        Case(tokens=33, batch=2, heads=2, dim=128, queries=4, sinks=3, ragged=True),
        Case(tokens=140, batch=20, queries=2, ragged=True, sinks=2, positions=100),
        Case(tokens=9, batch=2, heads=2, dim=144, wide=True, ragged=True),
        Case(tokens=9, batch=19, heads=2, dim=192, bits=1, queries=2, ragged=True),
    ],
    ids=str,
)
def test_before_the_codes_are_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step makes in one launch is what packing, projecting and scoring give."""
    from turboesm_kernels import pack, ptx_launch, triton_launch

    q, held, layer = made(case, "cpu", tiled=True)
    _, apart, _ = made(case, "cpu", tiled=True)
    assert held.lengths is not None and layer.k.fields is not None
    k, v = torch.randn(2, case.batch, case.heads, 1, case.dim, generator=torch.Generator().manual_seed(9))
    starts = (held.lengths - 1).clamp(min=0)
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(ptx_launch, "attend_projected", lambda *given: seen.append(given))
    poison(q)
    ptx_launch.append_and_attend(q, k, v, held, layer, starts)
    pack.pack(k, v, layer, apart, starts)
    for found, wanted in ((held.k, apart.k), (held.v, apart.v)):
        assert torch.equal(found.codes, wanted.codes)
        assert found.scales is not None and wanted.scales is not None and torch.equal(found.scales, wanted.scales)
    folded, bias = seen[0][3:5]
    assert isinstance(folded, ptx_launch.Folded)
    alone = ptx_launch.project_query(q, layer, layer.k.fields, early=False)
    assert torch.equal(folded.descriptors, alone.descriptors) and torch.equal(folded.scalars, alone.scalars)
    if case.positions:
        assert isinstance(bias, torch.Tensor)
        assert torch.allclose(bias, triton_launch.position_scores(q, held, layer), atol=1e-5)


def joint_of(case: Case, parts: int, device: str) -> Joint:
    """A projection of `case.queries` heads for each key/value head; `parts` 0: in none."""
    generator = torch.Generator().manual_seed(7)
    width = (case.queries + 2) * case.heads * case.dim
    shape = (max(parts, 1), case.batch, 1, width)
    product = torch.randn(shape, generator=generator) / math.sqrt(max(parts, 1))
    product = product if parts else product[0].to(case.dtype)
    return Joint(product.to(device), (case.queries * case.heads, case.heads), 0.125, case.dtype)


JOINT = [
    Case(tokens=70, batch=19, heads=3, ragged=True),
    Case(tokens=33, dim=128, queries=4, sinks=3, ragged=True),
    Case(tokens=40, batch=3, dim=80, wide=True, ragged=True, centred=False, dtype=torch.bfloat16),
    Case(tokens=9, dim=144, queries=2, wide=True, ragged=True, sinks=0),
]


def check_joint(case: Case, parts: int, device: str, attend: Callable[..., object]) -> list[tuple[object, ...]]:
    """A projection given as it is, and turned first: what `attend` gives, and what the launch leaves behind."""
    from turboesm_kernels import ptx_launch
    from turboesm_kernels.rotary import rotate

    found = []
    joint = joint_of(case, parts, device)
    for at_once in (True, False):
        _, held, layer = made(case, device, tiled=True)
        held = replace(held, rope=angles(case, torch.arange(case.tokens) + case.sinks, device))
        assert held.lengths is not None and held.rope is not None
        held.lengths.clamp_(min=case.sinks + 1)
        starts = held.lengths - 1
        poison(joint.product)
        if at_once:
            given = (*joint.sides, held, layer, starts)
            result = attend(*given, joint=joint)
        else:
            every = angles(case, torch.arange(case.tokens + case.sinks), device)
            q, k, v = rotate(joint, every, starts)
            q = q.unflatten(1, (case.heads, -1)).flatten(2, 3)
            result = attend(q, k, v, held, layer, starts)
        found.append((result, held, layer))
    (_, one, layer), (_, other, _) = found
    for mine, theirs, side in ((one.k, other.k, layer.k), (one.v, other.v, layer.v)):
        apart = reference.unpack(mine.codes, side.spec) != reference.unpack(theirs.codes, side.spec)
        assert apart.float().mean() < 1e-4  # where a number lies on the edge of two codes
        assert (mine.scales.int() - theirs.scales.int()).abs().max() <= 1  # type: ignore[union-attr]
    assert ptx_launch.unserved_reason(layer) is None
    return found


@interpreted
@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("case", JOINT, ids=str)
def test_a_projection_is_turned_as_it_is_packed(case: Case, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from turboesm_kernels import ptx_launch

    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(ptx_launch, "attend_projected", lambda *given: seen.append(given))
    check_joint(case, parts, "cpu", ptx_launch.append_and_attend)
    (q, _, _, folded, *_), (other_q, _, _, other, *_) = seen
    assert q.dtype == other_q.dtype == case.dtype and q.shape == other_q.shape  # type: ignore[attr-defined]
    assert relative_error(q, other_q) < (1e-3 if case.dtype == torch.bfloat16 else 1e-6)  # type: ignore[arg-type]
    assert torch.allclose(folded.scalars, other.scalars, rtol=1e-2, atol=1e-3)  # type: ignore[attr-defined]


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("case", [*JOINT[:3], Case(tokens=600, batch=40, heads=5, ragged=True)], ids=str)
def test_a_projection_is_turned_as_it_is_packed_on_gpu(case: Case, parts: int) -> None:
    from turboesm_kernels import ptx_launch

    def attend(*given: Any, **named: Any) -> torch.Tensor:
        torch.cuda.synchronize()  # starts are to be older than the kernel before
        return ptx_launch.append_and_attend(*given, **named)

    for _ in range(5):
        (found, *_), (expected, *_) = check_joint(case, parts, "cuda", attend)
        assert found.dtype == case.dtype and relative_error(found, expected) < 5e-3  # type: ignore[attr-defined,arg-type]


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("parts", [0, 4])
@pytest.mark.parametrize(
    ("case", "grouped"),
    [
        (Case(tokens=500, batch=70, heads=20, ragged=True, sinks=2, dtype=torch.bfloat16), False),
        (Case(tokens=100, batch=3, heads=20, ragged=True, sinks=4, dtype=torch.float16), False),
        (Case(tokens=500, batch=30, heads=8, dim=128, queries=4, ragged=True, dtype=torch.bfloat16), True),
    ],
    ids=str,
)
def test_queries_that_a_step_turns_are_waited_for(case: Case, grouped: bool, parts: int) -> None:
    """Layer after layer in a graph, where kernels begin before those before them end; each time other numbers."""
    from turboesm_kernels import ptx_launch
    from turboesm_kernels.rotary import rotate

    joints = [joint_of(case, parts, "cuda") for _ in range(6)]
    inputs = [made(case, "cuda", tiled=True)[1:] for _ in joints]
    rope = angles(case, torch.arange(case.tokens + case.sinks), "cuda")
    packed_rope = rope.rows(slice(case.sinks, None))
    packed_rope.ready()
    given = []
    for held, layer in inputs:
        assert held.lengths is not None
        held.lengths.clamp_(min=case.sinks + 1)
        layer.k.ready()
        layer.v.ready()
        given.append((replace(held, rope=packed_rope), layer, held.lengths - 1))

    def step() -> list[torch.Tensor]:
        return [
            ptx_launch.append_and_attend(*joint.sides, *own, grouped=grouped, joint=joint)
            for joint, own in zip(joints, given, strict=True)
        ]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for turn in range(5):
        for joint in joints:
            joint.product.normal_().mul_(1 + turn)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        for out, joint, own in zip(found, joints, given, strict=True):
            q, k, v = rotate(joint, rope, own[-1])
            q = q.unflatten(1, (case.heads, -1)).flatten(2, 3)
            torch.cuda.synchronize()
            expected = ptx_launch.append_and_attend(q, k, v, *own, grouped=grouped)
            assert relative_error(out, expected) < 5e-3


CHECKED = [
    Case(dim=16, kind="flat"),
    Case(dim=64, kind="uniform"),
    Case(dim=64, kind="table", bits=4, scale="none"),
]


@interpreted
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_selfcheck(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds nothing to say of the kernels, and says what is wrong with broken ones."""
    from turboesm_kernels import pack, verify

    layers = [make(case)[2]]
    assert verify.problem(layers) is None
    monkeypatch.setattr(verify, "SEQUENCES", 2)  # what is broken is seen in few tokens, too
    monkeypatch.setattr(verify, "TOKENS", reference.TURN + 16)
    plain = dispatch.plain_attend
    with monkeypatch.context() as broken:
        broken.setattr(dispatch, "attend", lambda q, held, layer, backend=None: 1.1 * plain(q, held, layer))
        assert "attention kernel" in (verify.problem(layers) or "")
    right = pack.pack

    def without_scales(k: torch.Tensor, v: torch.Tensor, layer: PreparedLayer, held: Held, start: object) -> None:
        right(k, v, layer, held, start)  # type: ignore[arg-type]
        for packed in (held.k, held.v):
            packed.scales.zero_() if packed.scales is not None else packed.codes.zero_()

    for broken_pack in (without_scales, lambda *arguments: None):
        monkeypatch.setattr(pack, "pack", broken_pack)
        assert "packs" in (verify.problem(layers) or "")
    monkeypatch.setattr(pack, "pack", None)
    assert "compile or start" in (verify.problem(layers) or "")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Case(kind="flat", bits=3), Case(kind="flat", bits=4)),
        (Case(dim=24, kind="flat-uniform", bits=3), Case(dim=24, kind="flat-uniform", bits=4)),
        (Case(kind="uniform"), Case(kind="uniform", centred=False)),
        (Case(kind="uniform"), Case(kind="uniform", scale="none")),
        (Case(kind="uniform"), Case(kind="uniform", positions=40)),
        (Case(kind="uniform", bits=2), Case(kind="uniform", bits=3)),
    ],
    ids=str,
)
def test_selfcheck_sees_every_kind_of_layer(one: Case, other: Case, monkeypatch: pytest.MonkeyPatch) -> None:

    layers = [PreparedLayer.of(make_spec("k", case), make_spec("v", case)) for case in (one, other, one)]
    assert len(verify.kinds_of(layers)) == 2
    answers = iter((None, "wrong"))
    monkeypatch.setattr(verify, "layer_problem", lambda layer, dtype, sinks, queries, parts: next(answers))
    assert verify.problem(layers) == "wrong"


def test_selfcheck_compiles_the_kernels_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails there is left to the check."""
    from turboesm_kernels import compiling

    layers = [PreparedLayer.of(make_spec("k", case), make_spec("v", case)) for case in CHECKED]
    runs: list[PreparedLayer] = []
    monkeypatch.setattr(compiling, "compile_ahead", lambda run: run())
    monkeypatch.setattr(verify.KernelRun, "of", lambda layer, dtype, sinks, queries, parts: runs.append(layer))
    verify.compile_all(layers, torch.float32, 1)
    assert [id(layer) for layer in runs] == [id(layer) for layer in layers]
    monkeypatch.setattr(verify.KernelRun, "of", None)
    verify.compile_all(layers, torch.float32, 1)


@interpreted
def test_selfcheck_says_nothing_of_kernels_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from turboesm_kernels import pack, verify

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(pack, "pack", full)
    with pytest.raises(torch.OutOfMemoryError):
        verify.problem([make(CHECKED[0])[2]])


def check_joint_prefill(path: Path, proteins: list[Protein], dtype: torch.dtype, device: str = "cpu") -> None:
    """Prefill of prompts of several lengths with the joint projection: what the layers' own projections give."""
    from turboesm_cli.cache.dense import DenseCache
    from turboesm_cli.cache.formats import FORMATS
    from turboesm_cli.models import forward

    class Recorder(DenseCache):
        def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, tokens: torch.Tensor) -> None:
            seen.append(torch.stack((k, v)))

    model = load_model(str(path), device)
    model = model.to(model.device, dtype)
    tokens = to_tokens(proteins[:3], model)[:, :14]
    tokens[1, 9:] = ESM2_ALPHABET.padding
    runs = []
    for joined in (False, True):
        seen: list[torch.Tensor] = []
        cache = Recorder(model, len(tokens), tokens.shape[1], FORMATS["fp32"])
        with torch.no_grad():
            joint = forward.JointProjection(model, tokens.shape[1]) if joined else None
            hidden = forward.prefill(model, tokens, cache, joint)
        real = tokens.ne(ESM2_ALPHABET.padding)
        of_tokens = torch.stack(seen).permute(2, 4, 0, 1, 3, 5)  # [B, T, layers, keys and values, H, d]
        runs.append((hidden[real], of_tokens[real]))
    for expected, found in zip(*runs, strict=True):
        assert found.dtype == dtype
        assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 2e-2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_prefill(tiny_path: Path, peptides: list[Protein], dtype: torch.dtype) -> None:
    check_joint_prefill(tiny_path, peptides, dtype)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_prefill_on_gpu(tiny_path: Path, peptides: list[Protein], dtype: torch.dtype) -> None:
    check_joint_prefill(tiny_path, peptides, dtype, "cuda")


@interpreted
@pytest.mark.parametrize("grouped", [False, True])
def test_a_cache_may_take_projections(tiny_path: Path, grouped: bool) -> None:
    """A step hands it what it would turn itself, and takes heads back in their order."""
    from turboesm_kernels.rotary import rotate

    from turboesm_cli.cache.dense import DenseCache
    from turboesm_cli.cache.formats import FORMATS
    from turboesm_cli.models import forward

    class Taking(DenseCache):
        def takes_joint(self, layer: int) -> bool:
            return layer > 0

        def append_and_attend_joint(self, layer: int, joint: Joint) -> torch.Tensor:
            rope = forward.rope_at(model, 0, self.capacity)
            q, k, v = rotate(joint, rope, self.starts)
            given = joint.sides
            assert given[0].shape == (2, k.shape[1], joint.heads[0] // k.shape[1], k.shape[3])
            for turned, raw in ((q[:, :, 0], given[0].flatten(1, 2)), (v, given[2])):
                assert turned.shape == raw.shape
            out = self.append_and_attend(layer, q.unflatten(1, (k.shape[1], -1)).flatten(2, 3), k, v, self.starts)
            taken.append(layer)
            return out

    path = tiny_path
    if grouped:
        path = tiny_path.parent / "grouped"
        decoder_folders.save_tiny(path, "llama 2:1")
    model = load_model(str(path), "cpu")
    tokens = torch.randint(4, 20, (3, 2))
    found = []
    for kind in (DenseCache, Taking):
        taken: list[int] = []
        cache = kind(model, 2, len(tokens), FORMATS["fp32"])
        joint = forward.JointProjection(model, len(tokens))
        with torch.no_grad():
            found.append([forward.step(model, each, cache, joint) for each in tokens])
    assert taken == [layer for _ in tokens for layer in range(1, model.shape.layers)]
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-6


def check_rotation(device: str, dtype: torch.dtype) -> None:
    """Queries, keys and values of a joint projection, from positions that differ from sequence to sequence."""
    from turboesm_kernels.rotary import rotate

    batch, tokens, heads, dim, scaling = 3, 5, 3, 24, 0.3
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(batch, tokens, 3 * heads * dim, generator=generator).to(dtype)
    starts = torch.tensor([0, 4, 2], dtype=torch.int32)
    every = Rope.at(torch.arange(9), 10000 ** (-torch.arange(0, dim, 2) / dim))
    at = starts.long()[:, None] + torch.arange(tokens)
    own = Rope(every.cos[at][:, None], every.sin[at][:, None])
    q, k, v = joint.double().view(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    moved = Rope(every.cos.to(device), every.sin.to(device))
    poison(joint)
    found = rotate(Joint(joint.to(device), (heads, heads), scaling, dtype), moved, starts.to(device))
    for one, wanted in zip(found, (own.rotate(q) * scaling, own.rotate(k), v), strict=True):
        assert one.dtype == dtype and one.shape == (batch, heads, tokens, dim)
        assert relative_error(one.cpu(), wanted) < TOLERANCE[dtype]
    whole = torch.cat((q, k, v), 1).transpose(1, 2).flatten(2)
    parts = torch.stack([torch.randn(whole.shape, generator=generator) for _ in range(3)])
    parts[0] += (whole - parts.sum(0)).float()
    found = rotate(Joint(parts.to(device), (heads, heads), scaling, dtype), moved, starts.to(device))
    for one, wanted in zip(found, (own.rotate(q) * scaling, own.rotate(k), v), strict=True):
        assert one.dtype == dtype and one.shape == (batch, heads, tokens, dim)
        assert relative_error(one.cpu(), wanted) < TOLERANCE[dtype]


@interpreted
def test_rotation() -> None:
    check_rotation("cpu", torch.float32)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_on_gpu(dtype: torch.dtype) -> None:
    check_rotation("cuda", dtype)


def check_tokens(
    dim: int, length: int, drops: bool, heads: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Against softmax attention over the keys and values that the kinds of token stand for.

    One sequence has tokens of all kinds, one of a single kind, one none at all.
    """
    from turboesm_kernels import token_kernels

    generator = torch.Generator().manual_seed(dim + length)
    count, lengths = 33, torch.tensor([length, max(1, length - 5), 0])
    k, v = torch.randn(2, heads, count, dim, generator=generator)
    k_const, v_const = torch.randn(2, heads, dim, generator=generator)
    sigma = torch.rand(count, generator=generator)
    tables = TokenTables(k, v, k_const, v_const, sigma, 1e-5, drops)
    q = torch.randn(3, heads, 2, dim, generator=generator).to(dtype)
    ids = torch.randint(count, (3, length + 2), generator=generator).to(torch.uint8)
    ids[1] = count - 1
    unmasked = torch.tensor([1.0, 0.7, 0.9])
    rope = Rope.at(torch.arange(length + 2), 10000 ** (-torch.arange(0, dim, 2) / dim))
    s = sigma / (unmasked if drops else torch.ones(3))[:, None]
    factor = (s * (s * s + 1e-5).rsqrt())[:, None, :, None].double()
    index = ids.long()[:, None, :, None].expand(-1, heads, -1, dim)
    keys = rope.rotate((factor * k + k_const[:, None]).gather(2, index))
    values = (factor * v + v_const[:, None]).gather(2, index)
    expected = reference.attend(q.double(), keys, values, lengths.clamp_min(1))
    moved = TokenTables(*(x.to(device) for x in (k, v, k_const, v_const, sigma)), 1e-5, drops)
    at = Rope(rope.cos.to(device), rope.sin.to(device))
    given = q.to(device), ids.to(device)[:, : length + 1], moved, unmasked.to(device), at, lengths.int().to(device)
    poison(given[0])
    found = token_kernels.attend(*given)
    assert found.dtype == dtype and (found[2] == 0).all()
    tolerance = 1e-4 if dtype == torch.float32 else TOLERANCE[dtype]
    for row in range(2):
        assert relative_error(found[row].cpu(), expected[row]) < tolerance
    assert torch.equal(token_kernels.attend(*given), found)
    plain = token_layer.attend_tokens(q, ids, tables, unmasked, rope, lengths.clamp_min(1))
    assert relative_error(plain[:2], expected[:2]) < tolerance


TOKENS = [(16, 1, True, 3), (24, 70, True, 20), (64, 64, False, 3), (64, 200, True, 3), (16, 1030, True, 2)]


@compiled
@pytest.mark.parametrize(("dim", "count"), [(16, 33), (10, 300)])
@pytest.mark.parametrize("drops", [True, False])
def test_compiled_tokens(dim: int, count: int, drops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As plain torch does it, in any company and by any number of threads; no token at all gives 0."""
    generator = torch.Generator().manual_seed(dim)
    heads, queries, tokens = 3, 2, 40
    k, v = torch.randn(2, heads, count, dim, generator=generator)
    k_const, v_const = torch.randn(2, heads, dim, generator=generator)
    tables = TokenTables(k, v, k_const, v_const, torch.rand(count, generator=generator), 1e-5, drops)
    q = torch.randn(3, heads, queries, dim, generator=generator)
    ids = torch.randint(count, (3, tokens + 4), generator=generator).to(getattr(torch, token_dtype(count)))[
        :, :tokens
    ]
    unmasked, lengths = torch.tensor([1.0, 0.7, 0.9]), torch.tensor([tokens, 0, 7])
    rope = Rope.at(torch.arange(tokens + 9), 10000 ** (-torch.arange(0, dim, 2) / dim))
    found = token_layer.attend_tokens(q, ids, tables, unmasked, rope, lengths)
    assert cpu_compiled.attends_tokens(q, tables) and (found[1] == 0).all()
    monkeypatch.setattr(cpu_compiled, "FEW_NUMBERS", 0)
    assert torch.equal(token_layer.attend_tokens(q, ids, tables, unmasked, rope, lengths), found)
    for row in (0, 2):
        one, length = slice(row, row + 1), int(lengths[row])
        alone = token_layer.attend_tokens(q[one], ids[one, :length], tables, unmasked[one], rope)
        assert torch.equal(alone[0], found[row])
    monkeypatch.setattr(cpu_compiled, "attends_tokens", lambda q, tables: False)
    plain = token_layer.attend_tokens(q, ids, tables, unmasked, rope, lengths.clamp_min(1))
    assert relative_error(found[[0, 2]], plain[[0, 2]]) < 1e-5


@pytest.mark.parametrize("positions", [0, 400])
def test_attention_over_tokens_is_checked(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 3, 30, 16, generator=generator)
    const = torch.randn(3, 16, generator=generator)
    tables = TokenTables(k, v, const, -const, torch.rand(30, generator=generator), 1e-5, True)
    if positions:
        at = torch.randn(3, positions, 16, generator=generator)
        tables = replace(tables, k_at=at, v_at=-at, across=torch.rand(30, positions, generator=generator))
    assert verify.token_problem(tables, queries=2) is None
    real = token_layer.attend_tokens

    def wrong(q: torch.Tensor, *given: object) -> torch.Tensor:
        return real(q, *given) * (1.02 if q.dtype == torch.float32 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(token_layer, "attend_tokens", wrong)
    assert "off by 0.02" in (verify.token_problem(tables) or "")


@interpreted
@pytest.mark.parametrize(("dim", "length", "drops", "heads"), TOKENS)
def test_tokens(dim: int, length: int, drops: bool, heads: int) -> None:
    check_tokens(dim, length, drops, heads)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "length", "drops", "heads"),
    [*TOKENS, (64, 1024, True, 20), (128, 500, True, 33), (64, 5000, False, 7), (256, 300, True, 20)],
)
def test_tokens_on_gpu(dim: int, length: int, drops: bool, heads: int, dtype: torch.dtype) -> None:
    check_tokens(dim, length, drops, heads, "cuda", dtype)


def test_a_side_without_a_coded_axis_has_no_fields() -> None:
    spec = make_spec("v", Case(dim=64, heads=1))
    nothing = replace(spec, profiles=(Profile((0,) * 64, 4, 4),), profile_of_head=(0,))
    assert PreparedLayer.of(make_spec("k", Case(dim=64, heads=1)), nothing).v.fields is None


def test_a_grid_is_recognised_through_float32s_rounding() -> None:
    """Fitted 8-bit levels are off by up to 1.13e-5 steps; a table that is no grid is off by far more."""
    spec = make_spec("k", Case(dim=64, tokens=1, kind="uniform", bits=4))
    width = spec.profiles[0].widths[0]
    at = reference.table_slice(width)
    steps = (spec.levels[:, at][:, -1] - spec.levels[:, at][:, 0]) / (2**width - 1)
    for off, is_grid in ((1.2e-5, True), (1e-2, False)):
        levels = spec.levels.double()
        levels[:, at][:, 5] += off * steps.double()
        assert (grid_steps(replace(spec, levels=levels)) is not None) == is_grid
