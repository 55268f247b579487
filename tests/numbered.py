"""Results that come with the numbers of their jobs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from turboesm_cli.outputs.work import Tensors


def in_order(results: Iterable[tuple[int, Tensors]], name: str = "hidden") -> list[Tensor]:
    """The results called `name` by their numbers."""
    return [found[name] for _, found in sorted(results, key=lambda item: item[0])]
