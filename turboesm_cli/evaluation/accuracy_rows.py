"""What `bench` measured of proteins → its rows of the protocols decode, drift, layer, paper and paper_heads.

No model is needed: results may have come from other processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.protein_results import ProteinResult
from turboesm_cli.evaluation.rows import Coded, Context
from turboesm_cli.evaluation.teacher_forced import DRIFT, FirstLayer
from turboesm_cli.reporting.results import ResultRow

ALL = "all"
"""What all families together are called."""


@dataclass(frozen=True)
class Circumstances:
    """What rows say beside the figures.

    recipes  recipes and dense caches that were measured, by the name that they go by
    inputs   what `ResultRow.inputs` says of each family and, under ALL, of all
    """

    context: Context
    recipes: Mapping[str, Coded | str]
    inputs: Mapping[str, str]

    @property
    def families(self) -> list[str]:
        """Without ALL."""
        return [family for family in self.inputs if family != ALL]

    def of(self, family: str) -> Context:
        """The context of a family's rows."""
        return replace(self.context, inputs=self.inputs[family])


@dataclass
class Measured:
    """Results of proteins, in their order.

    decoded  by family, then by recipe or DRIFT
    first    layer 0's attention output, by recipe, then by family; of encoders alone
    """

    decoded: dict[str, dict[str, list[ProteinResult]]] = field(default_factory=dict)
    first: dict[str, dict[str, list[FirstLayer]]] = field(default_factory=dict)


def decoded_rows(about: Circumstances, measured: Measured) -> Iterator[ResultRow]:
    """Rows of the protocols decode, drift and layer: families, proteins, all."""
    names = (DRIFT, *about.recipes)
    together: dict[str, list[ProteinResult]] = {name: [] for name in names}
    for family in about.families:
        own = {name: measured.decoded.get(family, {}).get(name, []) for name in names}
        yield from _rows(about.of(family), about.recipes, family, own)
        for name, results in own.items():
            together[name] += results
    if len(about.families) > 1:
        for row in _rows(about.of(ALL), about.recipes, ALL, together):
            if not row.accession:
                yield row


def first_layer_rows(about: Circumstances, measured: Measured) -> Iterator[ResultRow]:
    """Rows of the protocols paper (heads joined) and paper_heads (each head on its own)."""
    for name, by_family in measured.first.items():
        found = {family: by_family.get(family, []) for family in about.families}
        if len(found) > 1:
            found[ALL] = [part for parts in found.values() for part in parts]
        for family, parts in found.items():
            joined, heads = (
                metrics.agreement([getattr(part, side) for part in parts]) for side in ("joined", "heads")
            )
            yield from about.of(family).accuracy(about.recipes[name], family, "paper", joined)
            yield from about.of(family).accuracy(about.recipes[name], family, "paper_heads", heads)


def _rows(
    context: Context,
    recipes: Mapping[str, Coded | str],
    family: str,
    results: Mapping[str, Sequence[ProteinResult]],
) -> Iterator[ResultRow]:
    if results[DRIFT]:
        yield from context.of_proteins("fp32", family, "drift", results[DRIFT])
        yield from context.each_protein("fp32", family, "drift", results[DRIFT])
    for name, recipe in recipes.items():
        yield from context.of_proteins(recipe, family, "decode", results[name])
        yield from context.each_protein(recipe, family, "decode", results[name])
        yield from context.layers(recipe, family, results[name])
