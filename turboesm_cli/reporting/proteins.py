"""Figures of single proteins: what of a recipe's error is spread over them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from turboesm_cli.reporting.grouping import Rows, Variant, seen, variant_of

COMPARED = ("decode", "prompted")
"""Protocols in which whole models decode with a coded cache; a page shows the first that was measured."""


@dataclass(frozen=True)
class ProteinError:
    """A protein's error under one recipe; `tokens` were decoded."""

    accession: str
    family: str
    tokens: int
    error: float


def compared(rows: Rows) -> str:
    """The protocol of `COMPARED` that rows of errors have, "" if none."""
    present = {row.protocol for row in rows if row.metric in ("error", "cosine_mean")}
    return next((protocol for protocol in COMPARED if protocol in present), "")


def errors(rows: Rows) -> Rows:
    """Rows of the errors of all proteins of a family together."""
    protocol = compared(rows)
    return [row for row in rows if row.protocol == protocol and row.metric == "error" and not row.accession]


def protein_errors(rows: Rows) -> dict[Variant, list[ProteinError]]:
    """Each protein's error, by variant: 1 minus its mean cosine, where the rows have no error of it."""
    protocol = compared(rows)
    found: dict[Variant, dict[Hashable, ProteinError]] = {}
    own = [row for row in rows if row.accession and row.protocol == protocol]
    for metric in ("cosine_mean", "error"):
        for row in (row for row in own if row.metric == metric and math.isfinite(row.value)):
            value = 1 - row.value if metric == "cosine_mean" else row.value
            found.setdefault(variant_of(row), {})[row.family, row.accession] = ProteinError(
                row.accession, row.family or "all", row.n, value
            )
    return {variant: list(proteins.values()) for variant, proteins in found.items()}


def named(rows: Rows) -> dict[str, set[str]]:
    """The proteins of each family that rows of single proteins name."""
    found: dict[str, set[str]] = {}
    for proteins in protein_errors(rows).values():
        for protein in proteins:
            found.setdefault(protein.family, set()).add(protein.accession)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """Of at least one value, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def recipes_of(rows: Rows) -> list[str]:
    """The recipes of rows, in order of appearance."""
    return seen(row.recipe for row in rows)
