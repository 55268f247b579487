"""Statistics -> what a layer's code is fitted to: means, covariances, metrics, samples of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from turboesm_kernels.reference import Rope, Side, at_positions

from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.models.protocol import Model
from turboesm_cli.statistics.accumulators import FIRST, REST, LayerSums, Statistics


@dataclass(frozen=True)
class Moments:
    """One side of a layer: mean [H, d]; covariance, metric float64 [H, d, d]; sample float32 [H, N, d], centred.

    An error e costs e^T metric e. The covariance of keys is that of k_j - R_j mean, after RoPE. With learned
    positions the mean at position j is mean + mean_at[j], [H, P, d] (`positions` of a recipe); else that is None.
    """

    mean: Tensor
    covariance: Tensor
    metric: Tensor
    sample: Tensor
    mean_at: Tensor | None = None


PRIOR = 0.5
"""Tokens at the mean of all positions that each position is given: what keeps those rarely seen near to it."""


FEWEST = 4
"""Tokens at each position, in the mean, from which the positions' means are looked at."""

WORTH = 0.6
"""What they leave of keys' variance, in the metric, at most. Scoring them takes a GPU a tenth of attention's time;
in that time it could read 0.3 bits more per value, which leave 4^-0.3 of an error."""


def layer_moments(model: Model, statistics: Statistics, index: int, recipe: Recipe) -> dict[Side, Moments]:
    """Moments of layer `index` over the tokens that `recipe` codes (sinks are not)."""
    sums = statistics.layers[index].over([REST] if recipe.sinks else [FIRST, REST])
    body = statistics.sample.positions >= recipe.sinks
    key_metric, value_metric = _metrics(model, statistics, sums, index, recipe)
    rope = Rope.at(statistics.sample.positions[body], model.inverse_frequencies.cpu())
    mean, covariance = _key_moments(sums, recipe)
    sample = statistics.sample.keys[index][body].transpose(0, 1) - rope.rotate(mean[:, None].float())
    keys = Moments(mean, covariance, key_metric, sample)
    if recipe.centre and recipe.positions and len(statistics.positions.count):
        keys = _centred_by_position(keys, statistics, index, recipe, rope)
    mean, covariance = _value_moments(sums, recipe)
    sample = statistics.sample.values[index][body].transpose(0, 1) - mean[:, None].float()
    return {"k": keys, "v": Moments(mean, covariance, value_metric, sample)}


def _key_moments(sums: LayerSums, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Mean of keys before RoPE, and covariance of keys after RoPE less that mean turned to each position.

    With R_j mean = B p_j, where p_j holds the cosines and sines of position j and B follows from the mean,
    the covariance E[(k - B p)(k - B p)^T] needs only the sums of k k^T, k p^T and p p^T.
    """
    count = sums.count[0]
    mean = sums.key[0] / count * recipe.centre
    first, second = (torch.diag_embed(half) for half in mean.chunk(2, -1))
    turn = torch.cat((torch.cat((first, -second), -1), torch.cat((second, first), -1)), -2)
    cross = sums.key_phase[0] @ turn.mT
    return mean, (sums.key_key[0] - cross - cross.mT + turn @ sums.phase_phase[0] @ turn.mT) / count


def _centred_by_position(keys: Moments, statistics: Statistics, index: int, recipe: Recipe, rope: Rope) -> Moments:
    """The moments of keys less their position's own mean, where that is worth it.

    With s_p the sum of the n_p centred keys at position p, their mean is taken as D_p = s_p / (n_p + prior), so
    sum (x - D)(x - D)^T is sum x x^T less sum_p (n_p + 2 prior) D_p D_p^T.
    """
    sums = statistics.positions
    if int(sums.count.sum()) < FEWEST * int((sums.count > 0).sum()):
        return keys
    count = sums.count.double()[:, None]
    means = (sums.key[index].double().transpose(0, 1) - count * keys.mean[:, None]) / (count + PRIOR)
    mean_at = means.half()
    if not _left_over(keys, mean_at, statistics, index, recipe) <= WORTH:  # nor where it is no number
        return keys
    summed = slice(1 if recipe.sinks else 0, None)  # as the covariance is
    weight = (count[summed] + 2 * PRIOR) / count[summed].sum().clamp_min(1)
    covariance = keys.covariance - means[:, summed].mT @ (weight * means[:, summed])
    return replace(keys, covariance=covariance, sample=keys.sample - at_positions(mean_at, rope), mean_at=mean_at)


def _left_over(keys: Moments, mean_at: Tensor, statistics: Statistics, index: int, recipe: Recipe) -> float:
    """What the positions' means leave of the variance of keys that took no part in them, in the metric."""
    held = statistics.held
    body = held.positions >= recipe.sinks
    rope = Rope.at(held.positions[body], torch.zeros(keys.mean.shape[1] // 2))  # learned positions turn nothing
    before = held.keys[index][body].transpose(0, 1).double() - keys.mean[:, None]
    after = before - at_positions(mean_at, rope)
    now, then = (torch.einsum("hnd,hde,hne->", x, keys.metric, x) for x in (after, before))
    return float(now / then)


def _value_moments(sums: LayerSums, recipe: Recipe) -> tuple[Tensor, Tensor]:
    mean = sums.value[0] / sums.count[0] * recipe.centre
    return mean, sums.value_value[0] / sums.count[0] - mean[:, :, None] * mean[:, None]


def _metrics(
    model: Model, statistics: Statistics, sums: LayerSums, index: int, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """What an error costs: float64 [H, d, d] of keys and of values."""
    if recipe.metric == "sensitivity":
        return statistics.sensitivity.metric(index, "k"), statistics.sensitivity.metric(index, "v")
    if recipe.metric == "attention":
        return sums.query_query[0] / sums.count[0], _output_gram(model, index)
    same = torch.eye(model.shape.head_dim, dtype=torch.float64).expand_as(sums.key_key[0])
    return same, same


def _output_gram(model: Model, index: int) -> Tensor:
    """W^T W [K, d, d] of the output projection's columns, summed over the query heads of a key/value head.

    That is what an error in v does to the layer.
    """
    weight = model.output_weight(index).double().cpu()
    columns = weight.unflatten(1, (model.shape.heads, -1)).movedim(1, 0)
    return (columns.mT @ columns).unflatten(0, (model.shape.key_value_heads, -1)).sum(1)
