"""Results that come with the numbers of their jobs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def in_order(results: Iterable[tuple[int, Tensor]]) -> list[Tensor]:
    """Results by their numbers."""
    return [found for _, found in sorted(results, key=lambda item: item[0])]
