"""Summaries of tokens that stream by: what `metrics` says of all of them, in memory that does not grow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turboesm_cli.evaluation.metrics import Agreement, Divergence, Predictions

KEPT = 11
"""Bits of a float32's fraction that a number is counted by: quantiles are within 1 part in 4,000."""


class Spread:
    """How numbers >= 0 are spread; 4 MiB, however many they are."""

    def __init__(self) -> None:
        self._counts = torch.zeros(1 << (8 + KEPT), dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count numbers [n]; those below 0 are rounding and count as 0."""
        keys = values.float().clamp_min(0.0).view(torch.int32) >> (23 - KEPT)
        self._counts.scatter_add_(0, keys.long(), torch.ones_like(keys, dtype=torch.int64))

    def quantile(self, fraction: float) -> float:
        """As `metrics.quantile` of all numbers, but for what `KEPT` says."""
        upto = self._counts.cumsum(0)
        position = fraction * (int(upto[-1]) - 1)
        ranks = torch.tensor([math.floor(position), math.ceil(position)])
        keys = torch.searchsorted(upto, ranks, right=True).int()
        middles = (keys << (23 - KEPT)) + (1 << (22 - KEPT))
        low, high = middles.view(torch.float32).double().tolist()
        return float(low + (high - low) * (position - math.floor(position)))


@dataclass
class RunningAgreement:
    """`metrics.agreement` of cosines as they come."""

    n: int = 0
    total: float = 0.0
    minimum: float = math.inf
    errors: Spread = field(default_factory=Spread)

    def add(self, cosines: Tensor) -> None:
        """Take in the cosines float64 [n] of some tokens."""
        self.n += len(cosines)
        self.total += float(cosines.sum())
        self.minimum = min(self.minimum, float(cosines.min()))
        self.errors.add(1 - cosines)

    def summary(self) -> Agreement:
        """Of all tokens so far. Raises ValueError for none."""
        if not self.n:
            raise ValueError("no tokens to compare")
        return Agreement(self.n, self.total / self.n, 1 - self.errors.quantile(0.95), self.minimum)


@dataclass
class RunningDivergence:
    """`metrics.divergence` of predictions as they come."""

    n: int = 0
    kl: float = 0.0
    same_top: int = 0
    log_p: float = 0.0
    reference_log_p: float = 0.0
    spread: Spread = field(default_factory=Spread)

    def add(self, parts: Predictions) -> None:
        """Take in the predictions at some positions."""
        self.n += len(parts.kl)
        self.kl += float(parts.kl.sum())
        self.same_top += int(parts.same_top.sum())
        self.log_p += float(parts.log_p.sum())
        self.reference_log_p += float(parts.reference_log_p.sum())
        self.spread.add(parts.kl)

    def summary(self) -> Divergence | None:
        """At all positions so far; None where there are none."""
        if not self.n:
            return None
        perplexities = (math.exp(-total / self.n) for total in (self.log_p, self.reference_log_p))
        return Divergence(
            self.n, self.kl / self.n, self.spread.quantile(0.95), self.same_top / self.n, *perplexities
        )
