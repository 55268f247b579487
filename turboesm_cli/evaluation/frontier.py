"""What budgets of bits would cost, measured on proteins that calibration held back, and the smallest that will do.

Each budget's codec is fitted to the same statistics, and the proteins held back from fitting are decoded with it
as in the protocol `decode` (see `accuracy`). They weighed and chose codes, but nothing was fitted to them. Those
that are unlike the calibration set may do worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from turboesm_cli.cache.packed import PackedCodec
from turboesm_cli.codec.bundle import Bundle
from turboesm_cli.codec.calibration import bundle_of
from turboesm_cli.codec.recipes import BUDGETS, Recipe, with_bits
from turboesm_cli.console import Phases, Tick, quiet
from turboesm_cli.errors import InputError
from turboesm_cli.evaluation.protein_results import ProteinResult
from turboesm_cli.evaluation.teacher_forced import compare_decoding, decoding_cost
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.work import NOTHING_KEPT, Work
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.accumulators import Statistics
from turboesm_cli.statistics.batching import digest, hold_back
from turboesm_cli.statistics.collect import collect

CONTEXT = 1024
"""Tokens of the sequence whose bytes are told."""

MOST_HELD = 24
"""Proteins held back that are decoded: the error of their mean is small against what differs between families."""

FEW_HELD = 4
"""Proteins held back under which a prediction may be far off."""

MOST_AGAIN = 128
"""Proteins up to which half of them are calibrated on again, to see whether more would help."""


@dataclass(frozen=True)
class Estimate:
    """A mean over the tokens of some proteins, and its standard error, from how much the proteins differ.

    lowest, highest  of a single protein
    """

    mean: float
    error: float
    lowest: float
    highest: float
    proteins: int

    @property
    def bound(self) -> float:
        """The mean and a standard error: what is promised."""
        return self.mean + self.error


@dataclass(frozen=True)
class Point:
    """A budget: its bundle, what a sequence of so many tokens takes, and what it costs on proteins held back.

    nbytes of a sequence of `tokens`; bits a value of it; residues of the shortest and longest protein held back
    error  1 - mean cosine of final hidden states against an fp32 cache
    kl     of the next residue (an encoder) or token, nat; None without a language-model head
    """

    bundle: Bundle
    tokens: int
    nbytes: int
    bits: float
    residues: tuple[int, int]
    error: Estimate
    kl: Estimate | None

    @property
    def recipe(self) -> Recipe:
        """With its budget."""
        return self.bundle.spec.recipe

    @property
    def ratio_fp16(self) -> float:
        """How many times smaller than an fp16 cache."""
        return 16 / self.bits


def budgets_of(recipe: Recipe) -> list[Recipe]:
    """The recipe at each budget from 2 to 4 bits for which it is made, its own included, ascending."""
    found = {recipe.bits_k + recipe.bits_v: recipe}
    for bits in BUDGETS:
        try:
            other = with_bits(recipe, bits, bits)
        except InputError:  # recipes with a residual bit take whole ones
            continue
        found.setdefault(other.bits_k + other.bits_v, other)
    return [found[total] for total in sorted(found)]


@dataclass(frozen=True)
class Learned:
    """The budgets that were tried, the one that was chosen, and that one with half of the proteins, if tried."""

    points: Sequence[Point]
    chosen: Point
    half: Point | None


def learned(
    model: Model,
    proteins: Sequence[Protein],
    recipe: Recipe,
    *,
    every_budget: bool = True,
    max_error: float | None = None,
    max_kl: float | None = None,
    with_half: bool = False,
    phase: Phases = quiet,
    work: Work = NOTHING_KEPT,
) -> Learned:
    """Calibrate at the recipe's budget, or at the smallest that is predicted to hold bounds.

    Raises InputError where none does, or for random weights, of which no error can be predicted.
    """
    bounded = max_error is not None or max_kl is not None
    if model.is_random:
        raise InputError(
            f"{model.name} has random weights, of which no error can be predicted; leave the bound out"
        )
    statistics = collect(model, proteins, phase=phase, work=work)
    recipes = budgets_of(recipe) if every_budget or bounded else [recipe]
    points = frontier(model, proteins, statistics, recipes, phase, work)
    chosen = smallest(points, max_error, max_kl) if bounded else points[recipes.index(recipe)]
    half = half_fitted(model, proteins, chosen, phase, work) if with_half else None
    return Learned(points, chosen, half)


def frontier(
    model: Model,
    proteins: Sequence[Protein],
    statistics: Statistics,
    recipes: Sequence[Recipe],
    phase: Phases = quiet,
    work: Work = NOTHING_KEPT,
) -> list[Point]:
    """A point for each recipe, of statistics that were collected over `proteins`."""
    bundles = []
    with phase("fitting", len(recipes)) as tick:
        for recipe in recipes:
            bundles.append(bundle_of(model, proteins, statistics, recipe))
            tick()
    return _measured(model, held_proteins(proteins), bundles, phase, work)


def held_proteins(proteins: Sequence[Protein]) -> list[Protein]:
    """Those of the proteins held back that are decoded, by hash."""
    return sorted(hold_back(proteins)[1], key=digest)[:MOST_HELD]


def smallest(points: Sequence[Point], max_error: float | None, max_kl: float | None) -> Point:
    """The point of fewest bytes that is predicted to hold both bounds. Raises InputError where none does."""
    if max_kl is not None and any(point.kl is None for point in points):
        raise InputError("--max-kl: the model has no language-model head; give --max-error")
    for point in sorted(points, key=lambda point: point.nbytes):
        if _holds(point.error, max_error) and (point.kl is None or _holds(point.kl, max_kl)):
            return point
    best = min(points, key=lambda point: point.error.bound)
    raise InputError(_none_holds(best, max_error, max_kl))


def half_fitted(
    model: Model, proteins: Sequence[Protein], point: Point, phase: Phases = quiet, work: Work = NOTHING_KEPT
) -> Point | None:
    """The point with the same budget, calibrated on half of the proteins that were fitted to.

    None where too few are held back to tell, or where they are more than `MOST_AGAIN`: a pass would take long.
    """
    fitted, held = hold_back(proteins)
    half = sorted(fitted, key=digest)[: len(fitted) // 2]
    if not half or len(held) < FEW_HELD or len(proteins) > MOST_AGAIN:
        return None
    again = work.under("half")

    def half_phase(label: str, total: int, cost: float | None = None) -> AbstractContextManager[Tick]:
        return phase(f"{label}, half of the proteins", total, cost)

    try:
        statistics = collect(model, [*half, *held], phase=half_phase, work=again)
        bundle = bundle_of(model, [*half, *held], statistics, point.recipe)
    except InputError:  # too few tokens
        return None
    return _measured(model, held_proteins(proteins), [bundle], half_phase, again)[0]


def _holds(found: Estimate, bound: float | None) -> bool:
    return bound is None or found.bound <= bound


def _none_holds(best: Point, max_error: float | None, max_kl: float | None) -> str:
    bounds = {"--max-error": max_error, "--max-kl": max_kl}
    wanted = [f"{option} {bound:g}" for option, bound in bounds.items() if bound is not None]
    kl = f" and KL of {best.kl.bound:.3g} nat" if best.kl and max_kl is not None else ""
    return (
        f"{' '.join(wanted)}: no budget is predicted to hold it; the best, {best.recipe.typed}, is predicted to "
        f"have an error of {best.error.bound:.3g}{kl}: allow more, or calibrate on more proteins"
    )


@torch.no_grad()
def _measured(
    model: Model, held: Sequence[Protein], bundles: Sequence[Bundle], phase: Phases, work: Work
) -> list[Point]:
    codecs = {str(index): PackedCodec(bundle.spec, model.device) for index, bundle in enumerate(bundles)}
    found: dict[str, list[ProteinResult]] = {name: [] for name in codecs}
    cost = decoding_cost(model, held, len(codecs), drift=False)
    with phase("decoding proteins held back", len(held) * len(codecs), cost) as tick:
        results = compare_decoding(model, held, codecs, work=work.under("held back"), tick=tick, drift=False)
        for name, result in results:
            found[name].append(result)
    return [_point(bundle, found[str(index)]) for index, bundle in enumerate(bundles)]


def _point(bundle: Bundle, results: Sequence[ProteinResult]) -> Point:
    tokens = min(CONTEXT, bundle.shape.context or CONTEXT)
    nbytes = bundle.spec.size.sequence_bytes(tokens)
    lengths = [result.protein.residues for result in results]
    predictions = [
        result.predictions.kl for result in results if result.predictions and len(result.predictions.kl)
    ]
    return Point(
        bundle,
        tokens,
        nbytes,
        8 * nbytes / bundle.spec.size.numbers(tokens),
        (min(lengths), max(lengths)),
        estimate([1 - result.cosines for result in results]),
        estimate(predictions) if predictions else None,
    )


def estimate(parts: Sequence[torch.Tensor]) -> Estimate:
    """The mean of figures of tokens, float64 [n_i] a protein, and the standard error of this ratio of sums."""
    sums = torch.stack([part.sum() for part in parts])
    counts = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    mean = float(sums.sum() / counts.sum())
    count = len(parts)
    each = sums / counts
    error = mean  # one protein says nothing of how much others differ
    if count > 1:
        error = math.sqrt(float((sums - mean * counts).square().sum()) * count / (count - 1)) / float(counts.sum())
    return Estimate(mean, error, float(each.min()), float(each.max()), count)
