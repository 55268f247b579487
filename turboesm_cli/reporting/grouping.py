"""What is compared: the rows of one model, grouped into variants that have a name and curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from turboesm_cli.errors import InputError
from turboesm_cli.reporting.metric_names import BY_NAME
from turboesm_cli.reporting.recipe_names import RECIPE_NAMES, typed
from turboesm_cli.reporting.results import ResultRow

Rows = Sequence[ResultRow]
Key = TypeVar("Key", bound=Hashable)

DASH = "\N{EN DASH}"  # stands for "not measured"
FAMILIES = ("tm", "idr", "enzyme", "globular", "peptide")


@dataclass(frozen=True)
class Variant:
    """What is compared: a recipe at its bits, where and in which arithmetic it ran."""

    recipe: str
    bits_k: float
    bits_v: float
    device: str
    dtype: str


def variant_of(row: ResultRow) -> Variant:
    # NaN equals nothing, not even itself, so it cannot be a key; 0 is shown as "no such bits".
    bits_k, bits_v = (0.0 if math.isnan(bits) else bits for bits in (row.bits_k, row.bits_v))
    return Variant(row.recipe, bits_k, bits_v, row.device, row.dtype)


def code_of(variant: Variant) -> Hashable:
    return variant.recipe, variant.bits_k, variant.bits_v


@dataclass(frozen=True)
class Gathered:
    """Rows of one model without any figure twice.

    rows      in order of appearance
    again     figures that were measured again on the same proteins, or that are of none: the last is kept
    combined  figures of several sets of proteins that are one figure now
    left_out  metrics of several sets of proteins that no sum of sets has, and metrics that are of no use
    """

    rows: list[ResultRow]
    again: int
    combined: int
    left_out: list[str]


def gathered(rows: Rows) -> Gathered:
    """Rows of several files as one: figures of other proteins are combined where that is exact.

    Means by the number of tokens or residues behind them, minima, and perplexities by their logarithms; quantiles
    and relative errors are left out. Raises InputError where rows measure the same thing on other proteins and do
    not say on which, after other prompts, with codecs of other calibration sets, or where a protein is in several
    sets.
    """
    _check_prompts(rows)
    groups: dict[Hashable, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(_identity(row), []).append(row)
    kept, again, combined, left_out = [], 0, 0, list[str]()
    for group in groups.values():
        different = _of_different_inputs(group)
        again += len(group) - len(different)
        join = _joining(different[0].metric)
        if different[0].metric in RETIRED or (len(different) > 1 and join is None):
            left_out.append(different[0].metric)
            continue
        if len(different) > 1 and join is not None:
            combined += 1
            try:
                different = [join(different)]
            except (ValueError, ArithmeticError):  # no tokens, or a perplexity of 0
                raise _refused(group, "with numbers that cannot be combined; mend the files") from None
        kept.append(different[0])
    return Gathered(_with_all_families(kept, groups), again, combined, seen(left_out))


def _check_prompts(rows: Rows) -> None:
    """Raise InputError where a model decoded after other prompts: recipes or devices would seem to differ."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.protocol == "prompted" and row.prompt and row.prompt not in found.setdefault(row.model, []):
            found[row.model].append(row.prompt)
    for model, prompts in found.items():
        if len(prompts) > 1:
            raise InputError(
                f"{model} was decoded after other prompts ({', '.join(prompts)}): such figures do not compare; "
                "report them apart"
            )


def _with_all_families(kept: list[ResultRow], groups: Mapping[Hashable, Rows]) -> list[ResultRow]:
    """Rows whose family `all` is of all families that are there, where several files had one of their own.

    A family may be in several of these, and counts once.
    """
    found = []
    for row in kept:
        if row.family == "all" and len({other.inputs for other in groups[_identity(row)]}) > 1:
            families = [x for x in kept if x.family not in ("", "all") and _but_family(x) == _but_family(row)]
            join = _joining(row.metric)
            row = replace(join(families), family="all") if families and join else row
        found.append(row)
    return found


RETIRED = ("kl_mean", "kl_p95", "top1_agreement", "perplexity", "perplexity_fp32", "perplexity_ratio")
"""Metrics of turboesm up to 1bd8ce2: of the head at a residue that it had seen."""

OF_PROTEINS = ("decode", "prompted", "drift", "paper", "paper_heads", "layer")
"""Protocols whose figures depend on the proteins."""


def _of_different_inputs(group: Rows) -> list[ResultRow]:
    """The last row of each set of proteins. Raises InputError where sets can't be told apart or overlap."""
    last = group[-1]
    if last.protocol not in OF_PROTEINS or len({(row.value, row.n, row.inputs) for row in group}) == 1:
        return [last]
    if not all(row.inputs for row in group):
        if len({row.n for row in group}) == 1:
            return [last]
        raise _refused(group, "on other proteins, and not all say on which; report them apart, or measure again")
    different = list({row.inputs: row for row in group}.values())
    if len(different) > 1 and last.accession:
        raise _refused(group, f"and {last.accession} is among the proteins of several; report them apart")
    if len({row.prompt for row in different}) > 1:
        raise _refused(group, "after other prompts; report them apart")
    if len({row.calibration for row in different} - {""}) > 1:
        raise _refused(group, "with codecs of other calibration sets; report them apart")
    return different


def _refused(group: Rows, why: str) -> InputError:
    row = group[0]
    name = " ".join(filter(None, (row.model, row.recipe, row.protocol, row.metric, row.family)))
    return InputError(f"{len(group)} rows measure {name} {why}")


def _mean(rows: Rows) -> ResultRow:
    return _joined(rows, sum(row.value * row.n for row in rows) / sum(row.n for row in rows))


def _minimum(rows: Rows) -> ResultRow:
    return _joined(rows, min(row.value for row in rows))


def _geometric_mean(rows: Rows) -> ResultRow:
    total = sum(math.log(row.value) * row.n for row in rows)
    return _joined(rows, math.exp(total / sum(row.n for row in rows)))


def _joined(rows: Rows, value: float) -> ResultRow:
    return replace(rows[-1], value=value, n=sum(row.n for row in rows), inputs="")


_JOINS: dict[str, Callable[[Rows], ResultRow]] = {
    "mean": _mean,
    "geometric mean": _geometric_mean,
    "minimum": _minimum,
}


def _joining(metric: str) -> Callable[[Rows], ResultRow] | None:
    """What makes the figure of all out of those of several sets of proteins, if anything does."""
    return _JOINS.get(BY_NAME[metric].joins) if metric in BY_NAME else None


def labels(variants: Iterable[Variant], bits: bool = False) -> dict[Variant, str]:
    """A name for each variant, in order; device and arithmetic are named only where they differ.

    With `bits` those are part of it, as in `code_text`.
    """
    distinct = seen(variants)
    parts = {variant: [code_text(variant) if bits else variant.recipe or DASH] for variant in distinct}
    for field in ("device", "dtype"):
        if len({getattr(variant, field) for variant in distinct}) > 1:
            for variant in distinct:
                parts[variant].append(getattr(variant, field))
    return {variant: ", ".join(words) for variant, words in parts.items()}


def code_text(variant: Variant) -> str:
    """A recipe as it is typed (`auto@3`, `paper@4/3`); another name, with bits where it does not say them."""
    if variant.recipe in RECIPE_NAMES and (variant.bits_k or variant.bits_v):
        return typed(variant.recipe, variant.bits_k, variant.bits_v)
    said = variant.recipe.endswith(f"{variant.bits_k:g}") and variant.bits_k == variant.bits_v
    known = not said and (variant.bits_k or variant.bits_v)
    bits = f"K{variant.bits_k:g} V{variant.bits_v:g}" if known else ""
    return " ".join(filter(None, (variant.recipe or DASH, bits)))


def budget_text(variant: Variant) -> str:
    """The part of `code_text` that is not the recipe's name: `@3`, `@4/3`, `K3 V4`."""
    return code_text(variant).removeprefix(variant.recipe or DASH).strip()


def families_of(rows: Rows) -> list[str]:
    """The families that occur: the known ones in their usual order, then others, then all."""
    present = seen(row.family or "all" for row in rows)
    others = [family for family in present if family not in (*FAMILIES, "all")]
    return [family for family in (*FAMILIES, *others, "all") if family in present]


def bits_held(rows: Rows) -> dict[Hashable, float]:
    """Bits per value, everything counted, by recipe and bits; at the longest context if at several."""
    chosen = [row for row in rows if row.metric == "bits_per_value" and not row.accession]
    return {code_of(variant_of(row)): row.value for row in sorted(chosen, key=lambda row: row.tokens)}


def memory_curves(rows: Rows) -> dict[Variant, dict[int, float]]:
    """Bytes by context length; fp32 and fp16 come first, worked out from ratios where not stored."""
    chosen = [row for row in rows if row.metric == "bytes" and row.tokens > 0 and not row.accession]
    chosen = [row for row in chosen if row.value > 0 and math.isfinite(row.value)]
    curves: dict[Variant, dict[int, float]] = {}
    for name, bits in (("fp32", 32.0), ("fp16", 16.0)):
        if not any(row.recipe == name for row in chosen) and (derived := _from_ratios(rows, chosen, name)):
            curves[Variant(name, bits, bits, chosen[0].device, chosen[0].dtype)] = derived
    for row in sorted(chosen, key=lambda row: ("fp32", "fp16", row.recipe).index(row.recipe)):
        curves.setdefault(variant_of(row), {})[row.tokens] = row.value
    return curves


def seen(values: Iterable[Key]) -> list[Key]:
    return list(dict.fromkeys(values))


def _from_ratios(rows: Rows, chosen: Rows, name: str) -> dict[int, float]:
    ratios = {(variant_of(row), row.tokens): row.value for row in rows if row.metric == f"ratio_{name}"}
    pairs = [(row, ratios.get((variant_of(row), row.tokens))) for row in chosen]
    return {row.tokens: row.value * ratio for row, ratio in pairs if ratio is not None}


def _identity(row: ResultRow) -> Hashable:
    subset = row.seed if row.protocol == "ablation" else 0
    return variant_of(row), row.model, row.family, row.protocol, row.metric, row.accession, row.tokens, subset


def _but_family(row: ResultRow) -> Hashable:
    return _identity(replace(row, family=""))
