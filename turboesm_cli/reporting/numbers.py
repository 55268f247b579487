"""Numbers as a report writes them."""

from __future__ import annotations

import math

from turboesm_cli.reporting.grouping import DASH


def number(value: float | None) -> str:
    """Four significant digits (whole numbers in full), without an exponent from a millionth up."""
    if value is None or math.isnan(value):
        return DASH
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    if not 1e-6 <= abs(value) < 1e12:
        return f"{value:.3e}"
    rounded = float(f"{value:.3e}")  # first, or 9.9999 would show a fifth digit
    if abs(rounded) >= 1000:
        return f"{value:,.0f}"
    return f"{rounded:.{max(0, 3 - math.floor(math.log10(abs(rounded))))}f}"


def cosine(value: float | None) -> str:
    """Four decimals, or more where four would round a cosine below 1 up to 1."""
    if value is None or math.isnan(value):
        return DASH
    decimals = next((d for d in range(4, 8) if value >= 1 or round(value, d) < 1), 8)
    return f"{value:.{decimals}f}"
