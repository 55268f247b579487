"""Statistics + a recipe -> the codec of a model: for each layer and head, how keys and values are coded.

moments -> expected errors by size -> bytes of each layer and side -> codes to choose from -> the best
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from turboesm_kernels.layout import BYTE
from turboesm_kernels.reference import Rope, Side, SideSpec, roundtrip, table_slice

from turboesm_cli.codec import bit_allocation
from turboesm_cli.codec.moments import Moments, layer_moments
from turboesm_cli.codec.recipes import Allocation, Recipe
from turboesm_cli.codec.sides import basis_of, fit_side
from turboesm_cli.codec.sizes import CodecSize, SideSize, budget_steps, lanes_of, side_bytes
from turboesm_cli.errors import InputError
from turboesm_cli.models.protocol import Model
from turboesm_cli.statistics.accumulators import Statistics
from turboesm_cli.statistics.sensitivity import SIDES


@dataclass(frozen=True)
class LayerSpec:
    """How one layer's keys and values are coded."""

    k: SideSpec
    v: SideSpec


@dataclass(frozen=True, eq=False)
class CodecSpec:
    """The codec of a model: a LayerSpec for each layer, or None where a layer keeps tokens instead.

    heads    of keys and values
    kinds    of tokens that there are, where a layer keeps them
    choices  for each coded layer and side: layer, side, bytes per vector, allocation, and predicted: what each
             allocation that was tried is expected to add to the mean 1 - cosine of final hidden states
    """

    recipe: Recipe
    layers: tuple[LayerSpec | None, ...]
    heads: int
    head_dim: int
    choices: tuple[dict[str, Any], ...] = ()
    kinds: int = 256

    @cached_property
    def size(self) -> CodecSize:
        """How large it is, and its caches are."""
        layers = (None if layer is None else (size_of(layer.k), size_of(layer.v)) for layer in self.layers)
        return CodecSize(tuple(layers), self.heads, self.head_dim, self.kinds, self.recipe.sinks)


def size_of(spec: SideSpec) -> SideSize:
    """The sizes of a side's code."""
    return SideSize(
        spec.side,
        spec.heads,
        spec.head_dim,
        spec.analysis.shape[-1],
        spec.nbytes,
        spec.lanes,
        max(width for profile in spec.profiles for width in profile.widths),
        spec.scale != "none",
        0 if spec.centre_at is None else spec.centre_at.shape[1],
    )


def without_residual(side: SideSpec) -> SideSpec:
    """The side as it decodes when the residual's sign is left out: both codes of a level stand for the level."""
    levels = side.levels.clone()
    for width in {width for profile in side.profiles for width in profile.widths if width}:
        pairs = levels[:, table_slice(width)].unflatten(1, (-1, 2))
        levels[:, table_slice(width)] = pairs.mean(-1, keepdim=True).expand_as(pairs).flatten(1)
    return replace(side, levels=levels)


def fit(model: Model, statistics: Statistics, recipe: Recipe) -> CodecSpec:
    """The codec that `recipe` makes of a model's statistics.

    Raises InputError where there are too few tokens, or where parts of the recipe exclude each other.
    """
    _check(model, statistics, recipe)
    layers: list[LayerSpec | None] = [None] * recipe.exact_first
    choices: list[dict[str, Any]] = []
    for index, sizes in zip(_coded(model, recipe), _sizes(model, statistics, recipe), strict=True):
        moments = layer_moments(model, statistics, index, recipe)
        specs = {}
        for side, nbytes in zip(SIDES, sizes, strict=True):
            codes = _candidates(side, moments[side], nbytes, recipe)
            predicted = {name: _predict(model, statistics, index, code, recipe) for name, code in codes.items()}
            best = min(codes, key=lambda name: predicted[name])
            specs[side] = codes[best]
            choices.append(
                {"layer": index, "side": side, "bytes": nbytes, "allocation": best, "predicted": predicted}
            )
        layers.append(LayerSpec(specs["k"], specs["v"]))
    shape = model.shape
    return CodecSpec(
        recipe, tuple(layers), shape.key_value_heads, shape.head_dim, tuple(choices), len(model.alphabet)
    )


MOST_TOKENS = 4096
"""Kinds of token that a cache can keep in place of keys and values: beyond, tables outgrow what that saves."""


def require_tokens(model: Model, tokens: int) -> None:
    """Raise InputError where so many tokens are too few for a model's codec: 16 for each axis of a head."""
    needed = 16 * model.shape.head_dim
    if tokens < needed:
        raise InputError(
            f"{tokens:,} tokens are too few to calibrate {model.name}; give at least {needed:,} residues"
        )


def _check(model: Model, statistics: Statistics, recipe: Recipe) -> None:
    require_tokens(model, statistics.tokens)
    if recipe.budget == "model" and recipe.metric != "sensitivity":
        raise InputError("a budget for the whole model needs the metric 'sensitivity'; no other has one unit")
    if recipe.residual != "none" and (recipe.allocation != "flat" or recipe.choose or recipe.budget == "model"):
        raise InputError(f"a residual bit ({recipe.residual}) goes with flat codes of a fixed size only")
    if recipe.exact_first and len(model.alphabet) > MOST_TOKENS:
        raise InputError(
            f"recipe {recipe.name} keeps layer 0's tokens, and {model.name} has {len(model.alphabet):,} kinds; "
            "choose one that codes layer 0"
        )
    if recipe.residual == "qjl" and model.shape.head_dim % BYTE:
        raise InputError(f"residual 'qjl' needs a head_dim that is a multiple of 8, not {model.shape.head_dim}")


def _coded(model: Model, recipe: Recipe) -> range:
    """The layers whose keys and values are coded."""
    return range(int(recipe.exact_first), model.shape.layers)


def _sizes(model: Model, statistics: Statistics, recipe: Recipe) -> list[tuple[int, int]]:
    """Bytes of a vector of keys and of values, for each coded layer."""
    coded, head_dim = _coded(model, recipe), model.shape.head_dim
    if recipe.budget == "side":
        return [(side_bytes(head_dim, recipe.bits_k, recipe), side_bytes(head_dim, recipe.bits_v, recipe))] * len(
            coded
        )
    errors: list[list[float]] = []
    for index in coded:
        moments = layer_moments(model, statistics, index, recipe)
        for side in SIDES:
            expected = _errors_by_size(side, moments[side], recipe)
            ratio = _coupling(model, statistics, index, side, moments[side], expected, recipe)
            errors.append([ratio * error for error in expected])
    if not errors:  # one layer, and it keeps tokens
        return []
    lanes = lanes_of(head_dim, recipe)
    sizes = [lanes * steps for steps in bit_allocation.share_out(errors, budget_steps(model.shape, recipe))]
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _coupling(
    model: Model,
    statistics: Statistics,
    index: int,
    side: Side,
    moments: Moments,
    expected: list[float],
    recipe: Recipe,
) -> float:
    """How many times its expected error a code adds, by the held tokens' own gradients; 1 where there are none."""
    if not statistics.held.gradients:
        return 1.0
    lanes = lanes_of(model.shape.head_dim, recipe)
    words = side_bytes(model.shape.head_dim, recipe.bits(side), recipe) // lanes
    predicted = _predict(model, statistics, index, fit_side(side, moments, words * lanes, recipe), recipe)
    return predicted / max(expected[words], 1e-30)


def _errors_by_size(side: Side, moments: Moments, recipe: Recipe) -> list[float]:
    """Expected error of a side, in units of its metric, with 0, 1, 2, ... lanes of bytes per vector."""
    basis = basis_of(side, moments, recipe)
    rows = [basis.pooled()] if recipe.profile == "layer" else basis.weighted()
    return [sum(parts) for parts in zip(*(_errors_of_axes(row, recipe) for row in rows), strict=True)]


def _errors_of_axes(variance: Sequence[float], recipe: Recipe) -> list[float]:
    axes = len(variance)
    lanes = lanes_of(axes, recipe)
    if recipe.allocation == "waterfill":
        profiles = bit_allocation.waterfill_path(variance, axes, lanes)
    else:
        profiles = [bit_allocation.flat(axes, size, lanes) for size in range(0, axes + 1, lanes)]
    return [bit_allocation.expected_error(variance, profile) for profile in profiles]


def _candidates(side: Side, moments: Moments, nbytes: int, recipe: Recipe) -> dict[Allocation, SideSpec]:
    """Codes of equal size to choose from."""
    found = {recipe.allocation: fit_side(side, moments, nbytes, recipe)}
    if recipe.choose:
        other: Allocation = "flat" if recipe.allocation == "waterfill" else "waterfill"
        found[other] = fit_side(side, moments, nbytes, recipe.allocated(other))
    return found


def _predict(model: Model, statistics: Statistics, index: int, spec: SideSpec, recipe: Recipe) -> float:
    """What a code is expected to add to the mean 1 - cosine: E[e^T S e] over tokens held back, S sensitivity.

    Where each token's own gradients g are known, E[(g . e)^2] / 2: errors are largest where much depends on them.
    """
    held = statistics.held
    body = held.positions >= recipe.sinks
    vectors = held.keys[index] if spec.side == "k" else held.values[index]
    x = vectors[body].transpose(0, 1)[None]
    rope = Rope.at(held.positions[body], model.inverse_frequencies.cpu())
    error = (roundtrip(x, spec, rope) - x)[0]
    if held.gradients:
        own = held.gradients[2 * index + SIDES.index(spec.side)][body]
        return float(torch.einsum("hnd,nkhd->nkh", error, own).square().sum(-1).mean()) / 2
    cost = _quadratic(error, statistics.sensitivity.metric(index, spec.side).float())
    return float(cost.sum(0).mean())


def _quadratic(x: Tensor, matrix: Tensor) -> Tensor:
    """x^T M x [H, N] of vectors [H, N, d] and matrices [H, d, d]."""
    return torch.einsum("hnd,hde,hne->hn", x, matrix, x)
