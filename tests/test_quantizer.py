"""Scalar quantizers against published tables, and what must hold for any distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboesm_cli.codec import scalar_quantizers

MAX_LEVELS = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
"""Positive levels for N(0, 1): J. Max, "Quantizing for minimum distortion" (1960), table I."""

MAX_UNIFORM = {1: (1.596, 0.3634), 2: (0.9957, 0.1188), 3: (0.5860, 0.03744), 4: (0.3352, 0.01154)}
"""Steps and distortions of equally spaced levels for N(0, 1): the same, table II."""


@pytest.fixture(scope="module")
def gaussian() -> torch.Tensor:
    """A histogram [1, BINS] of N(0, 1) without noise."""
    edges = torch.linspace(
        -scalar_quantizers.RANGE, scalar_quantizers.RANGE, scalar_quantizers.BINS + 1, dtype=torch.float64
    )
    return torch.diff(torch.special.ndtr(edges))[None]


def distortion(table: scalar_quantizers.Table, counts: torch.Tensor) -> float:
    centres = (torch.arange(scalar_quantizers.BINS, dtype=torch.float64) + 0.5) * (
        2 * scalar_quantizers.RANGE / scalar_quantizers.BINS
    ) - scalar_quantizers.RANGE
    cells = torch.searchsorted(table.thresholds[0].double(), centres)
    return float((counts[0] * (centres - table.levels[0].double()[cells]) ** 2).sum() / counts.sum())


@pytest.mark.parametrize("width", MAX_LEVELS)
def test_lloyd_max_levels_are_the_published_ones(gaussian: torch.Tensor, width: int) -> None:
    levels = scalar_quantizers.lloyd_max(gaussian, width).levels[0]
    expected = torch.tensor(MAX_LEVELS[width])
    assert torch.allclose(levels, torch.cat((-expected.flip(0), expected)), rtol=0.03)  # the bins cost a little


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_lloyd_max_distortion_is_the_table_that_allocation_uses(gaussian: torch.Tensor, width: int) -> None:
    found = distortion(scalar_quantizers.lloyd_max(gaussian, width), gaussian)
    assert found == pytest.approx(scalar_quantizers.GAUSSIAN_DISTORTION[width], rel=0.02)


@pytest.mark.parametrize("width", MAX_UNIFORM)
def test_uniform_steps_and_distortions_are_the_published_ones(gaussian: torch.Tensor, width: int) -> None:
    table = scalar_quantizers.uniform_grid(gaussian, width)
    step, error = MAX_UNIFORM[width]
    assert torch.diff(table.levels[0]).tolist() == pytest.approx([step] * (2**width - 1), rel=0.03)
    assert distortion(table, gaussian) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_sign_bit_helps_less_than_a_bit_of_table(gaussian: torch.Tensor, width: int) -> None:
    table = scalar_quantizers.lloyd_max(gaussian, width)
    signed = scalar_quantizers.with_sign(gaussian, table)
    assert signed.levels.shape == (1, 2 ** (width + 1))
    assert bool((torch.diff(signed.thresholds) >= 0).all())
    better = distortion(scalar_quantizers.lloyd_max(gaussian, width + 1), gaussian)
    assert better <= distortion(signed, gaussian) + 1e-12 < distortion(table, gaussian)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from([0.2, 1.0, 3.0]))
def test_tables_ascend_and_levels_lie_in_their_cells(seed: int, width: int, spread: float) -> None:
    values = torch.randn(2, 500, generator=torch.Generator().manual_seed(seed)) ** 3 * spread
    table = scalar_quantizers.lloyd_max(scalar_quantizers.histogram(values), width)
    assert bool((torch.diff(table.levels) > 0).all())
    assert bool(
        (table.levels[:, :-1] <= table.thresholds).all() and (table.thresholds <= table.levels[:, 1:]).all()
    )


def test_one_value_is_no_trouble() -> None:
    for make in (scalar_quantizers.lloyd_max, scalar_quantizers.uniform_grid):
        table = make(scalar_quantizers.histogram(torch.zeros(3, 10)), 3)
        assert bool(table.levels.isfinite().all() and table.thresholds.isfinite().all())


def test_what_lies_outside_counts_at_the_ends() -> None:
    counts = scalar_quantizers.histogram(torch.tensor([[-100.0, 100.0, 0.0]]))
    assert counts[0, 0] == counts[0, -1] == 1 and counts.sum() == 3
