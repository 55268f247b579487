"""What is planned is what is held; figures that stream are those of all tokens together."""

from __future__ import annotations

import pytest
import torch

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import PackedCache, bytes_per_sequence, codec_nbytes
from turboesm_cli.codec.blank import blank_spec
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.engine import memory_plan
from turboesm_cli.errors import InputError
from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.streaming import RunningAgreement, RunningDivergence, Spread
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.families import parameter_count


@pytest.mark.parametrize("kind", memory_plan.KINDS)
def test_a_sequence_takes_what_is_planned(tiny: EsmModel, specs: dict[str, CodecSpec], kind: str) -> None:
    if kind == "packed":
        held = PackedCache(tiny, specs["auto"], 3, 50).nbytes
    else:
        held = DenseCache(tiny, 3, 50, FORMATS[kind]).nbytes
    assert 3 * memory_plan.sequence_bytes(specs["auto"], kind, 50) == held


def test_the_largest_batch_is_what_is_left_over(tiny: EsmModel, specs: dict[str, CodecSpec]) -> None:
    weights = sum(weight.numel() for weight in tiny.net.state_dict().values())
    assert parameter_count(tiny.shape) == weights
    found = {
        p.kind: p for p in memory_plan.plans(tiny.shape, specs["auto"], torch.bfloat16, 100, 2**30, results=64)
    }
    assert list(found) == list(memory_plan.KINDS)
    for own in found.values():
        assert own.weights == 2 * weights and own.beside >= 64
        used = own.weights + own.shared + own.workspace
        each = own.sequence + own.beside
        assert used + own.batch * each <= 2**30 * (1 - memory_plan.RESERVED) < used + (own.batch + 1) * each
    assert found["packed"].batch > 3 * found["fp16"].batch > 5 * found["fp32"].batch
    crowded = memory_plan.plans(tiny.shape, specs["auto"], torch.float32, 100, 1000)
    assert {own.batch for own in crowded} == {0}


@pytest.mark.parametrize("name", RECIPES)
def test_shape_and_recipe_say_what_a_sequence_takes(
    tiny: EsmModel, specs: dict[str, CodecSpec], name: str
) -> None:
    blank = blank_spec(tiny.shape, RECIPES[name])
    assert bytes_per_sequence(blank, 300) == bytes_per_sequence(specs[name], 300)
    assert 0.5 < codec_nbytes(blank) / codec_nbytes(specs[name]) <= 1


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1.5 GB", 1_500_000_000), ("512MiB", 2**29)])
def test_sizes_of_memory(text: str, size: int) -> None:
    assert memory_plan.parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-3GiB", "nanGiB", "1e9GiB", "5 B", "24gib"])
def test_what_is_no_size_of_memory(text: str) -> None:
    with pytest.raises(InputError, match="--memory"):
        memory_plan.parse_memory(text)


@pytest.mark.parametrize("n", [1, 2, 19, 4000])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_streamed_quantiles(n: int, fraction: float) -> None:
    values = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) ** 8
    spread = Spread()
    for part in values.split(7):
        spread.add(part)
    assert spread.quantile(fraction) == pytest.approx(metrics.quantile(values, fraction), rel=1 / 4000)


def test_streamed_figures_are_those_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    cosines = 1 - torch.rand(500, dtype=torch.float64, generator=generator) ** 6
    logits = torch.randn(2, 500, 33, generator=generator)
    targets = torch.randint(33, (500,), generator=generator)
    agreement, divergence = RunningAgreement(), RunningDivergence()
    parts = []
    for at in torch.arange(500).split(90):
        agreement.add(cosines[at])
        parts.append(metrics.predictions(logits[0, at], logits[1, at], targets[at]))
        divergence.add(parts[-1])
    expected, found = metrics.agreement([cosines]), agreement.summary()
    assert (found.n, found.minimum) == (expected.n, expected.minimum)
    assert found.mean == pytest.approx(expected.mean, rel=1e-12)
    assert 1 - found.p05 == pytest.approx(1 - expected.p05, rel=1 / 4000)
    whole, streamed = metrics.divergence(parts), divergence.summary()
    assert streamed is not None
    for name in ("n", "kl_mean", "top1_agreement", "perplexity", "reference_perplexity"):
        assert getattr(streamed, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert streamed.kl_p95 == pytest.approx(whole.kl_p95, rel=1 / 4000)
    assert RunningDivergence().summary() is None
