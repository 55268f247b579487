"""What the kernels are timed on is a codec like any other."""

from __future__ import annotations

import pytest
import torch
from turboesm_kernels import dispatch, reference
from turboesm_kernels.reference import Rope

from turboesm_cli.evaluation.kernel_speed import SWEEP
from turboesm_cli.evaluation.synthetic import Shape, held_bytes, make_caches, make_layer, random_cache, rope_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [Shape(2, 40, heads=2), Shape(1, 33, heads=3, dim=16, bits=2)], ids=str)
def test_caches_are_attended_to(shape: Shape) -> None:
    layer, caches = make_caches(shape, CPU)
    assert len(caches) > 1 and not torch.equal(caches[0].k.codes, caches[1].k.codes)
    q = torch.randn(shape.batch, shape.heads, 1, shape.dim)
    expected = dispatch.plain_attend(q.double(), caches[0], layer)
    assert (dispatch.attend(q, caches[0], layer) - expected).norm() <= 1e-3 * expected.norm()
    sinks = shape.batch * shape.heads * shape.dim * 2 * 2
    codes = shape.batch * shape.heads * shape.tokens * (layer.k.spec.nbytes + layer.v.spec.nbytes + 2)
    assert held_bytes(caches[0]) == codes + sinks


def test_packing_fills_a_cache() -> None:
    shape = Shape(1, 24, heads=2)
    layer, rope = make_layer(shape, CPU), rope_of(shape.tokens, shape.dim, CPU)
    held = random_cache(layer, shape, rope)
    k, v = torch.randn(2, shape.batch, shape.heads, shape.tokens, shape.dim)
    dispatch.append(k, v, layer, held, held.sinks)
    wanted = reference.roundtrip(k, layer.k.spec, Rope(rope.cos, rope.sin)), reference.roundtrip(v, layer.v.spec)
    for found, expected in zip(dispatch.expand(held, layer), wanted, strict=True):
        assert (found[:, :, held.sinks :] - expected).norm() <= 1e-2 * expected.norm()


def test_each_shape_is_measured_once() -> None:
    assert len({(str(shape), shape.tokens, shape.bits) for shape in SWEEP}) == len(SWEEP)


def test_a_cpu_is_timed() -> None:
    from turboesm_cli.evaluation import cpu_speed

    shape = Shape(1, 20, heads=2, dim=16)
    rows = list(cpu_speed.bench([shape], threads=[1]))
    times = {row.recipe: row.value for row in rows if row.metric == "us"}
    assert set(times) >= {"lookup", "fp32-sdpa"} and min(times.values()) > 0
    assert all(row.value < 1e-5 for row in rows if row.metric == "relative_error")
    ratio = next(row.value for row in rows if row.metric == "ratio_fp32_sdpa" and row.recipe == "lookup")
    assert ratio == times["fp32-sdpa"] / times["lookup"]
    columns, lines = cpu_speed.table(rows)
    assert len(lines) == 1 and len(lines[0]) == len(columns) and lines[0][:3] == [str(shape), "20", "1 threads"]
