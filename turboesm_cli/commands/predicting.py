"""How `calibrate` learns, and what it says at its end: what the bundle takes and is predicted to cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turboesm_cli import console

if TYPE_CHECKING:
    from turboesm_cli.codec.bundle import Bundle
    from turboesm_cli.codec.recipes import Recipe
    from turboesm_cli.evaluation.frontier import Estimate, Point
    from turboesm_cli.models.protocol import Model
    from turboesm_cli.outputs.work import Work
    from turboesm_cli.sequences.fasta import Protein

WORTH = 1.1
"""How many times the error with half of the proteins must be larger for more to help."""


@dataclass(frozen=True)
class Bounds:
    """What --max-error and --max-kl say."""

    error: float | None
    kl: float | None

    @property
    def given(self) -> bool:
        """Whether the budget is to be chosen by them."""
        return self.error is not None or self.kl is not None

    @property
    def named(self) -> dict[str, float]:
        """By name, for what identifies a run."""
        both = {"max_error": self.error, "max_kl": self.kl}
        return {name: bound for name, bound in both.items() if bound is not None}


@dataclass(frozen=True)
class Learned:
    """A bundle; the budgets that were tried, itself among them; and itself with half of the proteins, if tried."""

    bundle: Bundle
    points: Sequence[Point] = ()
    chosen: Point | None = None
    half: Point | None = None

    def say(self) -> None:
        """Tell what the bundle takes and is predicted to cost, what others would, whether proteins are enough."""
        from turboesm_cli.evaluation.frontier import FEW_HELD

        chosen = self.chosen
        if chosen is None:
            console.say(f"recipe {self.bundle.spec.recipe.typed}; random weights: no error is predicted")
            return
        if len(self.points) > 1:
            console.say_table(_title(chosen), *_table(self.points, chosen))
        console.say(f"{chosen.recipe.typed} {_taking(chosen)}; {_costing(chosen)}")
        if chosen.error.proteins < FEW_HELD:
            console.warn(
                f"predicted from {_held(chosen)}, and may be far off; calibrate on more, or measure with "
                "`turboesm bench --bundle`"
            )
        if self.half is not None:
            console.say(_worth(chosen.error, self.half.error))

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return {
            "recipe": self.bundle.spec.recipe.typed,
            "proteins": self.bundle.calibration.proteins,
            "tokens": self.bundle.calibration.tokens,
            "error_with_half_of_the_proteins": None if self.half is None else self.half.error.mean,
            "budgets": [_record(point) for point in self.points],
        }


def learned(
    model: Model, proteins: Sequence[Protein], recipe: Recipe, frontier: bool, bounds: Bounds, work: Work
) -> Learned:
    """Calibrate: with `bounds` at the smallest budget predicted to hold them, which all budgets are tried for.

    Raises InputError where none does.
    """
    from turboesm_cli.codec.calibration import calibrate
    from turboesm_cli.evaluation import frontier as tried

    if model.is_random and not bounds.given:
        return Learned(calibrate(model, proteins, recipe, console.progress, work))
    found = tried.learned(
        model, proteins, recipe, every_budget=frontier, max_error=bounds.error, max_kl=bounds.kl,
        with_half=frontier, phase=console.progress, work=work,
    )  # fmt: skip
    return Learned(found.chosen.bundle, found.points, found.chosen, found.half)


def _record(point: Point) -> dict[str, Any]:
    return {
        "recipe": point.recipe.typed,
        "bits_per_value": point.bits,
        "bytes_per_sequence": point.nbytes,
        "tokens": point.tokens,
        "ratio_fp16": point.ratio_fp16,
        "proteins_held_back": point.error.proteins,
        "residues_held_back": list(point.residues),
        "error": _estimate(point.error),
        "kl": None if point.kl is None else _estimate(point.kl),
    }


def _estimate(found: Estimate) -> dict[str, float]:
    return {
        "predicted": found.bound,
        "mean": found.mean,
        "standard_error": found.error,
        "lowest": found.lowest,
        "highest": found.highest,
    }


def _held(point: Point) -> str:
    shortest, longest = point.residues
    return f"{console.counted(point.error.proteins, 'protein')} held back ({shortest} to {longest} residues)"


def _title(chosen: Point) -> str:
    return (
        f"Predicted for proteins like these, decoded from an empty cache, from {_held(chosen)}: their mean plus a "
        "standard error; error = 1 - mean cosine"
    )


def _table(points: Sequence[Point], chosen: Point) -> tuple[list[str], list[list[str]]]:
    columns = ["recipe", "bits per value", f"bytes at {chosen.tokens:,} tokens", "x fp16", "error"]
    columns += ["KL, nat"] * (chosen.kl is not None)
    rows = [
        [
            f"{point.recipe.typed}{' *' if point is chosen else ''}",
            f"{point.bits:.2f}",
            f"{point.nbytes:,}",
            f"{point.ratio_fp16:.1f}",
            f"{point.error.bound:.3g}",
            *([] if point.kl is None else [f"{point.kl.bound:.3g}"]),
        ]
        for point in points
    ]
    return columns, rows


def _taking(point: Point) -> str:
    return (
        f"takes {point.bits:.2f} bits per value, {point.nbytes:,} bytes at {point.tokens:,} tokens, "
        f"{point.ratio_fp16:.1f} times less than fp16"
    )


def _costing(point: Point) -> str:
    kl = "" if point.kl is None else f", KL {point.kl.bound:.3g} nat"
    error = point.error
    if error.proteins == 1:
        return f"error {error.mean:.3g} of the one protein held back, which predicts little"
    spread = f"single proteins {error.lowest:.2g} to {error.highest:.2g}"
    return f"predicted error {error.bound:.3g}, decoded from an empty cache ({spread}){kl}"


def _worth(whole: Estimate, half: Estimate) -> str:
    found = f"error {half.mean:.3g} with half of the proteins, {whole.mean:.3g} with all"
    if half.mean > WORTH * whole.mean:
        return f"more proteins would help: {found}"
    return f"more proteins would hardly help: {found}"
