"""Scalar quantizers for a distribution given by its histogram: Lloyd-Max, uniform, and Lloyd-Max with a sign bit.

Everything works on H heads at once: histograms float64 [H, BINS] over [-RANGE, RANGE], in units of an axis'
standard deviation. A table of w bits has 2^w ascending levels and 2^w - 1 ascending thresholds.
Lloyd-Max: S. P. Lloyd, "Least squares quantization in PCM" (1982); J. Max, "Quantizing for minimum distortion"
(1960).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 4096
RANGE = 8.0
LLOYD_ROUNDS = 200

GAUSSIAN_DISTORTION = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000641, 0.000163, 0.0000411)
"""Mean squared error of a w-bit Lloyd-Max quantizer of N(0, 1), w = 0..8 (Max 1960; above 5 bits, computed)."""


@dataclass(frozen=True)
class Table:
    """Levels float32 [H, 2^w] and thresholds float32 [H, 2^w - 1] of w-bit codes."""

    levels: Tensor
    thresholds: Tensor


def histogram(values: Tensor) -> Tensor:
    """Histograms float64 [H, BINS] of values [H, N]; what lies outside goes to the outermost bins."""
    bins = ((values.double() + RANGE) * (BINS / (2 * RANGE))).floor().clamp(0, BINS - 1).long()
    counts = torch.zeros(len(values), BINS, dtype=torch.float64)
    return counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))


def lloyd_max(counts: Tensor, width: int) -> Table:
    """The quantizer of least squared error: each level the mean of its cell, each threshold midway."""
    centres = _bin_centres()
    levels = _quantiles(counts, 2**width)
    for _ in range(LLOYD_ROUNDS):
        levels = _cell_means(counts, centres, _midpoints(levels), levels)
    return Table(levels.float(), _midpoints(levels).float())


def uniform_grid(counts: Tensor, width: int) -> Table:
    """Equally spaced levels, symmetric about zero, with the step of least squared error."""
    offsets = torch.arange(2**width, dtype=torch.float64) - (2**width - 1) / 2
    best = torch.full((len(counts),), torch.inf, dtype=torch.float64)
    step = torch.ones(len(counts), dtype=torch.float64)
    for candidate in torch.linspace(0.3, 1.2, 91, dtype=torch.float64) * (2 * 4 / 2**width):
        error = _squared_error(counts, offsets * candidate)
        step = torch.where(error < best, candidate, step)
        best = torch.minimum(error, best)
    levels = step[:, None] * offsets
    return Table(levels.float(), _midpoints(levels).float())


def with_sign(counts: Tensor, table: Table) -> Table:
    """One bit more: the sign of the residual, which moves a level by the mean absolute residual.

    This is the residual bit of TurboESM (arXiv 2603.26110, there called QJL): code 2c + 1 stands for
    level c + delta, 2c for level c - delta, and the residual's sign is the side of level c.
    """
    centres = _bin_centres().expand(len(counts), -1).contiguous()
    cells = torch.searchsorted(table.thresholds.double().contiguous(), centres)
    residual = (centres - table.levels.double().gather(1, cells)).abs()
    delta = ((residual * counts).sum(1) / counts.sum(1))[:, None].float()
    levels = torch.stack((table.levels - delta, table.levels + delta), -1).flatten(1)
    both = torch.stack((table.levels[:, :-1], table.thresholds), -1).flatten(1)
    return Table(levels, torch.cat((both, table.levels[:, -1:]), 1))


def _bin_centres() -> Tensor:
    return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * RANGE / BINS) - RANGE


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[..., 1:] + levels[..., :-1]) / 2


def _quantiles(counts: Tensor, levels: int) -> Tensor:
    """Start: the value below which lie (i + 1/2) / levels of the histogram's cube root mass (Panter-Dite)."""
    density = (counts + 1e-9).pow(1 / 3).cumsum(1)
    wanted = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * density[:, -1:]
    index = torch.searchsorted(density, wanted.contiguous()).clamp(max=BINS - 1)
    start = _bin_centres()[index]
    return start + torch.arange(levels, dtype=torch.float64) * 1e-9  # strictly ascending


def _cell_means(counts: Tensor, centres: Tensor, thresholds: Tensor, levels: Tensor) -> Tensor:
    """The mean of each cell, or the old level where a cell is empty."""
    edges = torch.searchsorted(centres, thresholds.contiguous())
    mass = _between(counts, edges)
    moment = _between(counts * centres, edges)
    return torch.where(mass > 0, moment / mass.clamp_min(1e-300), levels)


def _between(weights: Tensor, edges: Tensor) -> Tensor:
    """Sums of weights [H, BINS] between consecutive edges [H, n], [H, n + 1]."""
    total = torch.nn.functional.pad(weights.cumsum(1), (1, 0))
    bounds = torch.nn.functional.pad(total.gather(1, edges), (1, 0))
    return torch.diff(torch.cat((bounds, total[:, -1:]), 1), dim=1)


def _squared_error(counts: Tensor, levels: Tensor) -> Tensor:
    centres = _bin_centres()
    nearest = levels[torch.searchsorted(_midpoints(levels), centres)]
    return (counts * (centres - nearest) ** 2).sum(1)
