"""Codecs: budgets kept, parts of a recipe that do what they say, and better recipes that are better."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turboesm_kernels import reference
from turboesm_kernels.reference import Rope

from turboesm_cli.cache.packed import PackedCodec
from turboesm_cli.codec import bit_allocation
from turboesm_cli.codec.fit import CodecSpec, LayerSpec, fit
from turboesm_cli.codec.moments import layer_moments
from turboesm_cli.codec.recipes import RECIPES, Recipe, parse_recipe
from turboesm_cli.codec.rotations import hadamard, random_orthogonal, square_roots
from turboesm_cli.errors import InputError
from turboesm_cli.models import forward
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.accumulators import Statistics
from turboesm_cli.statistics.batching import to_tokens
from turboesm_cli.statistics.collect import collect

BUDGETS = [2, 2.5, 3, 3.5, 4]
ABLATIONS: list[dict[str, Any]] = [
    {"centre": False},
    {"rotation_k": "none", "rotation_v": "none"},
    {"rotation_k": "hadamard", "rotation_v": "hadamard"},
    {"rotation_k": "svd", "rotation_v": "svd"},
    {"metric": "attention"},
    {"metric": "sensitivity"},
    {"scale": "none"},
    {"scale": "norm"},
    {"sinks": 0},
    {"sinks": 4},
    {"residual": "sign"},
    {"residual": "qjl"},
    {"allocation": "waterfill", "rotation_k": "svd", "rotation_v": "svd"},
    {"allocation": "waterfill", "profile": "layer"},
    {"grid": "uniform"},
    {"exact_first": True},
    {"metric": "sensitivity", "budget": "model"},
    {"metric": "sensitivity", "choose": True},
]


@pytest.fixture(scope="module")
def statistics(tiny: EsmModel, calibration_proteins: list[Protein]) -> Statistics:
    return collect(tiny, calibration_proteins[:40])


def payload(spec: CodecSpec) -> float:
    """Mean payload bits per value over all layers."""
    sides = [side for layer in spec.layers if layer for side in (layer.k, layer.v)]
    return sum(8 * side.nbytes for side in sides) / (2 * len(spec.layers) * spec.head_dim)


def first_coded(spec: CodecSpec) -> LayerSpec:
    layer = next(layer for layer in spec.layers if layer is not None)
    assert layer is not None
    return layer


def key_error(model: EsmModel, statistics: Statistics, spec: CodecSpec) -> float:
    """Relative squared error of sampled keys of the last layer."""
    layer = spec.layers[-1]
    assert layer is not None
    rope = Rope.at(statistics.sample.positions, model.inverse_frequencies)
    x = statistics.sample.keys[-1].transpose(0, 1)[None]
    return float((reference.roundtrip(x, layer.k, rope) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("bits", BUDGETS)
@pytest.mark.parametrize("name", ["flat", "waterfill", "auto"])
def test_budgets_are_kept_and_used(tiny: EsmModel, statistics: Statistics, name: str, bits: float) -> None:
    spec = fit(tiny, statistics, parse_recipe(f"{name}@{bits}"))
    assert bits - 0.26 < payload(spec) <= bits
    assert all(side.nbytes > 0 for layer in spec.layers if layer for side in (layer.k, layer.v))


@pytest.mark.parametrize("bits", [(2, 4), (4, 2), (3.5, 2.5)])
def test_keys_and_values_have_budgets_of_their_own(
    tiny: EsmModel, statistics: Statistics, bits: tuple[float, float]
) -> None:
    layer = first_coded(fit(tiny, statistics, parse_recipe(f"waterfill@{bits[0]}/{bits[1]}")))
    assert (layer.k.nbytes, layer.v.nbytes) == (2 * bits[0], 2 * bits[1])


@pytest.mark.parametrize("name", RECIPES)
def test_choices_are_json_and_predict_an_error(tiny: EsmModel, statistics: Statistics, name: str) -> None:
    spec = fit(tiny, statistics, RECIPES[name])
    choices = json.loads(json.dumps(spec.choices))
    coded = [index for index, layer in enumerate(spec.layers) if layer]
    assert [(c["layer"], c["side"]) for c in choices] == [(index, side) for index in coded for side in "kv"]
    for choice in choices:
        assert all(0 < value < 1 for value in choice["predicted"].values())
        assert min(choice["predicted"], key=choice["predicted"].get) == choice["allocation"]
    assert len(choices[0]["predicted"]) == (2 if name.startswith("auto") else 1)


@pytest.mark.parametrize("name", RECIPES)
def test_fits_repeat_to_the_bit(tiny: EsmModel, statistics: Statistics, name: str) -> None:
    one, other = (first_coded(fit(tiny, statistics, RECIPES[name])) for _ in range(2))
    assert all(torch.equal(one.k.tensors[key], other.k.tensors[key]) for key in one.k.tensors)


@pytest.mark.parametrize("change", ABLATIONS, ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()))
def test_every_part_can_be_switched_alone(tiny: EsmModel, statistics: Statistics, change: dict[str, Any]) -> None:
    spec = fit(tiny, statistics, replace(RECIPES["flat"], **change))
    assert payload(spec) <= 3
    assert key_error(tiny, statistics, spec) < 0.3


def test_more_bits_are_less_error(tiny: EsmModel, statistics: Statistics) -> None:
    for name in ("flat", "waterfill"):
        errors = [key_error(tiny, statistics, fit(tiny, statistics, parse_recipe(f"{name}@{b}"))) for b in BUDGETS]
        assert errors == sorted(errors, reverse=True)


def test_a_mean_costs_nothing_once_it_is_taken_out(tiny: EsmModel, statistics: Statistics) -> None:
    centred = key_error(tiny, statistics, fit(tiny, statistics, RECIPES["flat"]))
    assert centred < key_error(tiny, statistics, fit(tiny, statistics, replace(RECIPES["flat"], centre=False)))


def test_key_covariance_is_that_of_keys_less_their_turned_mean(tiny: EsmModel, statistics: Statistics) -> None:
    moments = layer_moments(tiny, statistics, 1, RECIPES["flat"])
    for side in ("k", "v"):
        found = moments[side].covariance  # type: ignore[index]
        sample = moments[side].sample.double()  # type: ignore[index]
        plain = sample.mT @ sample / sample.shape[1]
        assert torch.allclose(found, plain, atol=0.1 * float(found.diagonal(dim1=1, dim2=2).max()))


def test_paper_has_eight_levels_and_a_sign(tiny: EsmModel, statistics: Statistics) -> None:
    layer = first_coded(fit(tiny, statistics, RECIPES["paper"]))
    levels = layer.k.levels[0, reference.table_slice(4)]
    offsets = torch.diff(levels.view(8, 2))[:, 0]
    assert torch.allclose(offsets, offsets[:1].expand(8), rtol=1e-4)  # one mean absolute residual for all
    assert layer.v.nbytes * 8 == 3 * tiny.shape.head_dim
    assert torch.equal(layer.v.centre, torch.zeros_like(layer.v.centre))


def test_scales_follow_the_size_of_a_vector(tiny: EsmModel, statistics: Statistics) -> None:
    for scale in ("norm", "least-squares"):
        spec = first_coded(fit(tiny, statistics, replace(RECIPES["flat"], scale=scale))).v
        x = torch.randn(1, spec.heads, 9, spec.head_dim, generator=torch.Generator().manual_seed(1))
        small, large = (reference.decode(*reference.encode(x * size, spec), spec) for size in (1, 4))
        assert torch.allclose(large, 4 * small, rtol=1e-4, atol=1e-5)  # two octaves are a whole number of steps


def test_least_squares_is_the_best_factor(tiny: EsmModel, statistics: Statistics) -> None:
    spec = first_coded(fit(tiny, statistics, RECIPES["flat"])).v
    x = torch.randn(1, spec.heads, 200, spec.head_dim, generator=torch.Generator().manual_seed(2))
    codes, scales = reference.encode(x, spec)
    assert scales is not None
    own = (reference.decode(codes, scales, spec) - x).square().sum(-1)
    for step in (-3, 3):
        moved = (reference.decode(codes, scales + step, spec) - x).square().sum(-1)
        assert bool((own <= moved + 1e-6).all())


def test_orthogonal_signs_of_a_vector_are_unbiased() -> None:
    d, draws = 16, 4000
    r = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    factor = d * math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    turned = [random_orthogonal(d, seed) for seed in range(draws)]
    mean = torch.stack([q.T @ (q @ r).sign() for q in turned]).mean(0) * r.norm() / factor
    assert torch.allclose(mean, r, atol=5 * float(r.norm()) / math.sqrt(draws * d))


@pytest.mark.parametrize("bits", [2, 3])
def test_qjl_adds_signs_of_the_residual(tiny: EsmModel, statistics: Statistics, bits: int) -> None:
    recipe = replace(RECIPES["flat"], residual="qjl", bits_k=bits)
    layer = first_coded(fit(tiny, statistics, recipe))
    spec, d = layer.k, tiny.shape.head_dim
    assert (spec.residual_axes, layer.v.residual_axes, spec.nbytes) == (d, 0, d * bits // 8)
    x = statistics.sample.keys[0][:50].transpose(0, 1)[None] - spec.centre[:, None]
    codes, scales = reference.encode(x, spec)
    first = reference.decode(codes, scales, spec, with_residual=False)
    added = reference.decode(codes, scales, spec) - first
    assert float((added * (x - first)).sum()) > 0  # along the residual, on the whole
    assert torch.equal(reference.unpack(reference.pack(codes, spec), spec), codes)


def test_layer_zero_can_be_left_to_its_tokens(tiny: EsmModel, statistics: Statistics) -> None:
    spec = fit(tiny, statistics, RECIPES["auto"])
    assert [layer is None for layer in spec.layers] == [True, False]
    twice = 2 * 2 * tiny.shape.head_dim * 3 // 8  # all of layer 0's bytes go to layer 1
    assert sum(choice["bytes"] for choice in spec.choices) == min(twice, 2 * tiny.shape.head_dim)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": "model"}, "sensitivity"),
        ({"residual": "qjl", "allocation": "waterfill"}, "flat"),
        ({"residual": "sign", "metric": "sensitivity", "budget": "model"}, "flat"),
    ],
)
def test_parts_that_exclude_each_other_are_refused(
    tiny: EsmModel, statistics: Statistics, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        fit(tiny, statistics, replace(RECIPES["flat"], **change))


def test_too_few_tokens_are_refused(tiny: EsmModel, statistics: Statistics) -> None:
    with pytest.raises(InputError, match="too few"):
        fit(tiny, replace(statistics, tokens=10), RECIPES["flat"])


@pytest.mark.parametrize("text", ["best", "flat@1", "flat@3.25", "auto@x", "paper@3.5"])
def test_recipes_nobody_knows_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_recipe(text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-6, 10), min_size=2, max_size=4), st.integers(1, 2))
def test_waterfilling_is_the_best_of_all_widths(variances: list[float], nbytes: int) -> None:
    variances = sorted(variances, reverse=True)
    found = bit_allocation.expected_error(variances, bit_allocation.waterfill(variances, nbytes, 1))
    every = itertools.product(range(9), repeat=len(variances))
    distortion = bit_allocation.GAUSSIAN_DISTORTION
    best = min(
        sum(v * distortion[w] for v, w in zip(variances, widths, strict=True))
        for widths in every
        if sum(widths) <= 8 * nbytes
    )
    assert found == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 5), min_size=4, max_size=4), min_size=1, max_size=3), st.integers(3, 8))
def test_sharing_out_is_the_best_of_all_shares(drops: list[list[float]], steps: int) -> None:
    errors = [[sum(sorted(row, reverse=True)[n:]) for n in range(5)] for row in drops]  # convex, falling
    given_steps = bit_allocation.share_out(errors, steps)
    choices = [c for c in itertools.product(range(1, 5), repeat=len(errors)) if sum(c) <= steps]
    if choices:
        best = min(sum(row[n] for row, n in zip(errors, c, strict=True)) for c in choices)
        assert sum(row[n] for row, n in zip(errors, given_steps, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize("size", [2, 10, 16, 24, 64, 96])
def test_hadamard_is_orthogonal_and_flat(size: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert float(matrix.abs().max()) <= math.sqrt(2 / size) + 1e-12


def test_square_roots_of_a_metric() -> None:
    x = torch.randn(3, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    metric = x.mT @ x
    root, inverse = square_roots(metric)
    assert torch.allclose(root @ inverse, torch.eye(8, dtype=torch.float64).expand(3, 8, 8), atol=1e-9)
    scaled = metric / metric.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    assert torch.allclose(root @ root, scaled, rtol=0.06, atol=0.06)


def decoding_errors(model: EsmModel, proteins: list[Protein], specs: dict[str, CodecSpec]) -> dict[str, float]:
    tokens = to_tokens(proteins, model)
    prompts = [0] * len(proteins)
    with torch.no_grad():
        exact = forward.teacher_forced(model, tokens, prompts, None)
        hidden = {
            name: forward.teacher_forced(model, tokens, prompts, PackedCodec(s, torch.device("cpu")))
            for name, s in specs.items()
        }
    cosines = {
        name: torch.cosine_similarity(exact, h, dim=-1)[tokens.ne(ESM2_ALPHABET.padding)]
        for name, h in hidden.items()
    }
    return {name: 1 - float(cosine.mean()) for name, cosine in cosines.items()}


@pytest.mark.slow
def test_on_a_real_model_auto_is_better_than_flat_than_paper(
    embedded: EsmModel, calibration_proteins: list[Protein], peptides: list[Protein]
) -> None:
    statistics = collect(embedded, calibration_proteins[:40])
    recipes: dict[str, Recipe] = {
        "paper": RECIPES["paper"],
        "flat": RECIPES["flat"],
        "auto2.5": parse_recipe("auto@2.5"),
        "auto3.5": parse_recipe("auto@3.5"),
    }
    specs = {name: fit(embedded, statistics, recipe) for name, recipe in recipes.items()}
    errors = decoding_errors(embedded, calibration_proteins[60:64] + peptides[:2], specs)
    assert errors["auto3.5"] < errors["paper"] / 20
    assert errors["auto2.5"] < errors["flat"] < errors["paper"] / 2
    totals = {n: sum(min(c["predicted"].values()) for c in s.choices) for n, s in specs.items()}
    assert totals["auto3.5"] < totals["auto2.5"] < totals["flat"] < totals["paper"]
