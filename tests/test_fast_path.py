"""The fast path as a whole on a CPU, kernels and inline PTX (`warps`), against the plain reference.

In a child process that has TRITON_INTERPRET set before Triton is imported.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import replace

import pytest
import torch
from interpreter import run_interpreted
from kernel_cases import Case, angles, in_tiles, make, relative_error
from turboesm_kernels import dispatch, reference
from turboesm_kernels.layout import ROOM
from turboesm_kernels.operands import Held, Joint, PreparedLayer
from warps import Device, device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the child process of test_interpreter")
TOLERANCE = 1e-3

__all__ = ["device"]

CASES = [
    Case(tokens=300, ragged=True, sinks=4),
    Case(tokens=300, batch=1, bits=2, centred=False, sinks=0),
    Case(tokens=140, batch=1, bits=3.5, queries=2, ragged=True),
    Case(tokens=140, batch=1, dim=128, ragged=True),
    Case(tokens=140, batch=1, dim=80, wide=True, sinks=2),
    Case(tokens=33, batch=1, dim=32, wide=True),
    Case(tokens=150, batch=1, positions=90, sinks=2, ragged=True),
]


def tiled(case: Case) -> tuple[torch.Tensor, Held, PreparedLayer]:
    q, held, layer = make(case, room=-case.tokens % ROOM)
    return q, in_tiles(held), layer


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case, device: Device) -> None:
    """In ranges of one block, of several, and of all tokens for some rows."""
    from turboesm_kernels import ptx_launch

    q, held, layer = tiled(case)
    expected = dispatch.plain_attend(q.double(), held, layer)
    rows = q.shape[:3].numel()
    for chunk, whole in ((128, 0), (256, 1), (256, rows - 1), (384, 0)):
        found = ptx_launch.attend(q, held, layer, chunk, grouped=False, whole=whole)
        assert relative_error(found, expected) <= TOLERANCE
    assert device.launched[-2:] == ["fast_attend_split_kernel", "combine_kernel"]


@interpreted
@pytest.mark.parametrize("chunk", [128, 256])
@pytest.mark.parametrize(
    "case",
    [Case(tokens=140, batch=1, queries=6, ragged=True), Case(tokens=140, batch=1, dim=128, queries=4, sinks=3)],
    ids=str,
)
def test_groups(case: Case, chunk: int, device: Device) -> None:
    from turboesm_kernels import ptx_launch

    q, held, layer = tiled(case)
    found = ptx_launch.attend(q, held, layer, chunk, grouped=True)
    assert relative_error(found, dispatch.plain_attend(q.double(), held, layer)) <= TOLERANCE
    assert device.launched[-2:] == ["fast_attend_group_kernel", "combine_kernel"]


def step_of(case: Case, parts: int) -> tuple[Joint, Held, PreparedLayer, torch.Tensor]:
    """A projection of one token of each sequence, and where it goes: past the sinks, and for one on the last."""
    _, held, layer = tiled(case)
    every = angles(case, torch.arange(case.tokens + case.sinks))
    packed = every.rows(slice(case.sinks, None))
    packed.ready()
    assert held.lengths is not None
    lengths = held.lengths.clamp(min=case.sinks + 1)
    generator = torch.Generator().manual_seed(3)
    shape = (max(parts, 1), case.batch, 1, (case.queries + 2) * case.heads * case.dim)
    product = torch.randn(shape, generator=generator) / math.sqrt(max(parts, 1))
    joint = Joint(product if parts else product[0], (case.queries * case.heads, case.heads), 0.125, torch.float32)
    return joint, replace(held, rope=packed, lengths=lengths), layer, every_row(every, lengths - 1)


def every_row(every: reference.Rope, starts: torch.Tensor) -> torch.Tensor:
    """Cosines and sines at `starts`, [2, B, 1, 1, d]."""
    return torch.stack([x[starts.long()][:, None, None] for x in (every.cos, every.sin)])


def turned(joint: Joint, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a step makes of a projection: q [B, K, Q, d], k and v [B, K, 1, d], by torch."""
    whole = joint.product.sum(0) if joint.product.dim() == 4 else joint.product
    q, k, v = replace(joint, product=whole).sides
    rope = reference.Rope(*at)
    return rope.rotate(q) * joint.scaling, rope.rotate(k), v


STEPS = [
    (Case(tokens=300, batch=1, ragged=True, sinks=2), False),
    (Case(tokens=90, heads=2, centred=False, ragged=True), False),
    (Case(tokens=140, batch=1, queries=4, ragged=True, sinks=1), True),
    (Case(tokens=140, dim=128, batch=1, queries=2, ragged=True, sinks=0), False),
    (Case(tokens=140, batch=1, positions=90, sinks=2, ragged=True), False),
]


@interpreted
@pytest.mark.parametrize("parts", [None, 0, 3])
@pytest.mark.parametrize(("case", "grouped"), STEPS, ids=str)
def test_a_step_sees_what_has_ended(case: Case, grouped: bool, parts: int | None, device: Device) -> None:
    """Kernels begin before those before them have ended; `parts` None: turned before."""
    from turboesm_kernels import ptx_launch

    if case.positions and parts is not None:
        pytest.skip("positions that are learned turn nothing")
    for chunk, whole in ((128, 0), (256, 0), (256, 1)):
        if whole and (grouped or case.batch * case.heads * case.queries == whole):
            continue
        joint, held, layer, at = step_of(case, parts or 0)  # anew: what is written again unchanged is not hidden
        assert held.lengths is not None
        q, k, v = turned(joint, at)
        codes = reference.untiled(held.v.codes)[..., : case.tokens].clone()
        plain = replace(held, k=copy.deepcopy(held.k), v=replace(copy.deepcopy(held.v), codes=codes))
        dispatch.append(k, v, layer, plain, held.lengths - 1, "torch")
        expected = dispatch.plain_attend(q.double(), plain, layer)
        given, own = ((q, k, v), None) if parts is None else (joint.sides, joint)
        starts = held.lengths - 1
        found = ptx_launch.append_and_attend(*given, held, layer, starts, chunk, grouped, whole, own)
        assert relative_error(found, expected) <= TOLERANCE
        assert device.launched[-3] == "append_and_project_kernel"


@interpreted
@pytest.mark.parametrize("grouped", [False, True])
def test_a_query_that_is_read_too_early_is_seen(
    grouped: bool, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of attention that does not wait for it, nothing is a number."""
    from turboesm_kernels import ptx_launch

    joint, held, layer, _ = step_of(Case(tokens=300, queries=3, ragged=True, sinks=2), 0)
    assert held.lengths is not None
    right = ptx_launch.attend_projected
    monkeypatch.setattr(ptx_launch, "attend_projected", lambda *given: right(*given[:-1], False))
    found = ptx_launch.append_and_attend(*joint.sides, held, layer, held.lengths - 1, 256, grouped, joint=joint)
    assert found.isnan().any()


@interpreted
@pytest.mark.parametrize("rows", [3, 21])
def test_a_layer_sees_what_has_ended(rows: int, device: Device) -> None:
    """From the hidden states through the projection and attention to the norm of what is added."""
    from turboesm_kernels import ptx_launch
    from turboesm_kernels.add_norm import add_norm
    from turboesm_kernels.linear import linear, linear_parts

    case = Case(tokens=20, batch=rows, ragged=True, dtype=torch.float16)
    _, held, layer, at = step_of(case, 0)
    assert held.lengths is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 1, 128, generator=generator).half()
    into, back, norm = (torch.randn(n, 128, generator=generator).half() / 8 for n in (384, 128, 1))
    joint = Joint(linear_parts(x, into, None), (2, 2), 0.125, x.dtype)
    attended = ptx_launch.append_and_attend(*joint.sides, held, layer, held.lengths - 1, 128, False, joint=joint)
    mixed = attended.transpose(1, 2).flatten(2)
    out = linear_parts(mixed, back, None)
    total, normed = add_norm(x, out, norm[0], None, 1e-5)
    q = turned(replace(joint, product=x.double() @ into.double().T), at.double())[0]
    wanted = x.double() + dispatch.plain_attend(q, held, layer).transpose(1, 2).flatten(2) @ back.double().T
    assert relative_error(total, wanted) < 1e-2
    normal = wanted * (wanted.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm[0].double()
    assert relative_error(normed, normal) < 2e-2
    again = linear(normed, back, None, "gelu")
    assert relative_error(again, torch.nn.functional.gelu(normal @ back.double().T)) < 3e-2


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the child process")
def test_interpreter() -> None:
    """Run the tests above: Triton reads TRITON_INTERPRET when it is imported."""
    run_interpreted(__file__)
