"""Rows of `bench` → which recipe to take: the smallest that does as well as a peer, or holds a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.reporting.results import ResultRow


@dataclass(frozen=True)
class Measured:
    """What a recipe, or a peer, costs and takes: 1 - mean cosine of all proteins; bits per value."""

    name: str
    error: float
    bits: float

    @property
    def words(self) -> str:
        """For a sentence."""
        return f"{self.bits:.2f} bits per value, error {self.error:.3g}"


def recommended(
    rows: Sequence[ResultRow],
    recipes: Sequence[Recipe],
    peers: Sequence[str],
    family: str,
    max_error: float | None,
) -> list[str]:
    """A sentence for the bound, and for each peer, about the smallest recipe; `family` is that of all proteins."""
    ours = [found for recipe in recipes if (found := _measured(rows, recipe.typed, _key(recipe), family))]
    if not ours:  # random weights
        return []
    said = []
    if max_error is not None:
        said.append(_sentence(ours, max_error, f"an error up to {max_error:g}"))
    for name in peers:
        peer = _measured(rows, name, (name, None, None), family)
        if peer is not None:
            smaller = [each for each in ours if each.bits < peer.bits]
            words = f"no more error than {name} ({peer.words})"
            said.append(_sentence(smaller, peer.error, words, " and smaller"))
    return said


def _sentence(ours: Sequence[Measured], bound: float, what: str, smaller: str = "") -> str:
    holding = [each for each in ours if each.error <= bound]
    if not holding:
        return f"no recipe measured{smaller} has {what}"
    best = min(holding, key=lambda each: (each.bits, each.error))
    return f"{best.name} ({best.words}) is the smallest with {what}"


_Key = tuple[str, float | None, float | None]


def _key(recipe: Recipe) -> _Key:
    return recipe.name, recipe.bits_k, recipe.bits_v


def _measured(rows: Sequence[ResultRow], name: str, key: _Key, family: str) -> Measured | None:
    own = [row for row in rows if not row.accession and _is_of(row, key)]
    errors = [row.value for row in own if (row.protocol, row.metric, row.family) == ("decode", "error", family)]
    held = sorted((row.tokens, row.value) for row in own if row.metric == "bits_per_value")
    return Measured(name, errors[-1], held[-1][1]) if errors and held else None


def _is_of(row: ResultRow, key: _Key) -> bool:
    name, bits_k, bits_v = key
    return row.recipe == name and bits_k in (None, row.bits_k) and bits_v in (None, row.bits_v)
