"""What recipes are called, by those who type them and in results."""

from __future__ import annotations

RECIPE_NAMES = ("paper", "flat", "waterfill", "auto", "auto-coded", "turboquant")
"""Those in `codec.recipes`."""


def typed(name: str, bits_k: float, bits_v: float) -> str:
    """A recipe and its budget as they are typed: `auto@2.5`, `paper@4/3`."""
    return f"{name}@{bits_k:g}" if bits_k == bits_v else f"{name}@{bits_k:g}/{bits_v:g}"
