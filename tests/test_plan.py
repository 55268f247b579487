"""What is planned is what is held; figures that stream are those of all tokens together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import PackedCache
from turboesm_cli.codec.bundle import read_bundle
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.header import read_header
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.codec.sizes import planned_size
from turboesm_cli.commands.planning import shape_of
from turboesm_cli.engine import memory_plan
from turboesm_cli.errors import BundleError, InputError, ModelError
from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.streaming import RunningAgreement, RunningDivergence, Spread
from turboesm_cli.models import decoder_weights, random_shapes
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.families import parameter_count
from turboesm_cli.models.names import torch_cache
from turboesm_cli.models.random_decoders import random_decoder
from turboesm_cli.models.shapes import Shape

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.tqz"))


@pytest.mark.parametrize("kind", memory_plan.KINDS)
def test_a_sequence_takes_what_is_planned(tiny: EsmModel, specs: dict[str, CodecSpec], kind: str) -> None:
    if kind == "packed":
        held = PackedCache(tiny, specs["auto"], 3, 50).nbytes
    else:
        held = DenseCache(tiny, 3, 50, FORMATS[kind]).nbytes
    assert 3 * memory_plan.sequence_bytes(specs["auto"].size, kind, 50) == held


def test_the_largest_batch_is_what_is_left_over(tiny: EsmModel, specs: dict[str, CodecSpec]) -> None:
    weights = sum(weight.numel() for weight in tiny.net.state_dict().values())
    assert parameter_count(tiny.shape) == weights
    found = {p.kind: p for p in memory_plan.plans(tiny.shape, specs["auto"].size, 2, 100, 2**30, results=64)}
    assert list(found) == list(memory_plan.KINDS)
    for own in found.values():
        assert own.weights == 2 * weights and own.beside >= 64
        used = own.weights + own.shared + own.workspace
        each = own.sequence + own.beside
        assert used + own.batch * each <= 2**30 * (1 - memory_plan.RESERVED) < used + (own.batch + 1) * each
    assert found["packed"].batch > 3 * found["fp16"].batch > 5 * found["fp32"].batch
    crowded = memory_plan.plans(tiny.shape, specs["auto"].size, 4, 100, 1000)
    assert {own.batch for own in crowded} == {0}


@pytest.mark.parametrize("name", RECIPES)
def test_shape_and_recipe_say_what_a_sequence_takes(
    tiny: EsmModel, specs: dict[str, CodecSpec], name: str
) -> None:
    blank = planned_size(tiny.shape, RECIPES[name])
    assert blank.sequence_bytes(300) == specs[name].size.sequence_bytes(300)
    assert 0.5 < blank.shared_bytes / specs[name].size.shared_bytes <= 1


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_header_says_how_large_the_tensors_are(path: Path) -> None:
    header, bundle = read_header(path), read_bundle(path)
    assert header.size == bundle.size
    assert (header.shape, header.calibration, header.recipe) == (
        bundle.shape,
        bundle.calibration,
        bundle.spec.recipe,
    )
    layers = [layer for layer in bundle.spec.layers if layer is not None]
    tensors = [tensor for layer in layers for side in (layer.k, layer.v) for tensor in side.tensors.values()]
    assert header.size.shared_bytes == sum(tensor.nbytes for tensor in tensors)


def test_a_header_of_tensors_that_were_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "changed.tqz"
    data = bytearray(GOLDEN[0].read_bytes())
    data[data.index(b"layers.1.k.analysis") + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="damaged"):
        read_header(path)


def test_formats_have_the_sizes_of_their_dtypes() -> None:
    for form in FORMATS.values():
        assert form.itemsize == form.dtype.itemsize


@pytest.mark.parametrize("name", random_shapes.SHAPES)
def test_random_weights_are_counted_without_any(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shape, rows, _, rest = random_shapes.SHAPES[name]
    small = Shape(2, 64, 4, 16, 2 if shape.own_key_value_heads else None, context=32)
    monkeypatch.setitem(random_shapes.SHAPES, "small", (small, min(rows, 40), 96, rest))
    model = decoder_weights.build(random_decoder("small"))
    assert random_shapes.whole_shape("small") == model.shape


def test_a_name_that_is_two_models_is_refused_in_plans_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t6_8M").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="an official model and also a folder here"):
        shape_of("t6_8M", "cpu")


def test_downloads_lie_where_torch_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME", ""):
        monkeypatch.delenv("TORCH_HOME", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if name:
            monkeypatch.setenv(name, str(tmp_path))
        assert torch_cache() == Path(torch.hub.get_dir()) / "checkpoints"


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
