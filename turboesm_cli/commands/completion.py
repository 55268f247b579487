"""What the shell completes: names of recipes, peers, families and models. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from turboesm_cli.cache.formats import PEERS
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.models.shapes import OFFICIAL
from turboesm_cli.sequences.datasets import ANTIBODIES, FAMILIES, HELDOUT

_SHORT = [name.removesuffix("_UR50D") for name in OFFICIAL]
MODELS = ("embedded", "iglm", "iglm-s", *_SHORT, *(f"random:{name}" for name in _SHORT))
"""Models that have names of their own; the shell adds files and folders."""


def _by_comma(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What completes the last part of a list."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names if name.startswith(last)]

    return complete


def model(incomplete: str) -> list[str]:
    """Names of models."""
    return [name for name in MODELS if name.startswith(incomplete)]


recipes = _by_comma(RECIPES)
peers = _by_comma((*PEERS, "all"))
families = _by_comma((*FAMILIES, HELDOUT, ANTIBODIES))
