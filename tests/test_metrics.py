"""Metrics against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.timing import measure


def test_cosine_by_hand() -> None:
    reference = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    candidate = torch.tensor([[0.0, 2.0], [3.0, 4.0], [-1.0, -1.0]])
    values = metrics.cosines(reference, candidate)
    assert values.tolist() == pytest.approx([0.0, 1.0, -1.0])
    found = metrics.agreement([values[:2], values[2:]])
    assert (found.n, found.mean, found.minimum) == (3, pytest.approx(0.0), pytest.approx(-1.0))
    assert found.p05 == pytest.approx(-0.9)
    assert found.error == pytest.approx(1.0)


def test_kl_and_perplexity_by_hand() -> None:
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    candidate = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = metrics.divergence([metrics.predictions(reference, candidate, torch.tensor([0, 1]))])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert found.kl_mean == pytest.approx(expected / 2)
    assert found.top1_agreement == pytest.approx(0.5)
    assert found.perplexity == pytest.approx((0.25 * 0.1) ** -0.5)
    assert found.reference_perplexity == pytest.approx((0.5 * 0.1) ** -0.5)


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError):
        metrics.agreement([])
    with pytest.raises(ValueError):
        metrics.divergence([])
    empty = metrics.predictions(torch.empty(0, 20), torch.empty(0, 20), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError):
        metrics.divergence([empty])


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(0, 1))
def test_quantile_is_torchs(values: list[float], fraction: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    assert metrics.quantile(tensor, fraction) == pytest.approx(float(tensor.quantile(fraction)), abs=1e-12)


def test_timing_counts_only_repeats_after_warm_up() -> None:
    calls: list[int] = []
    took = measure(lambda: calls.append(1), torch.device("cpu"), warmup=2, repeats=5)
    assert len(calls) == 7 and took.n == 5
    assert took.p20 <= took.median <= took.p80
