"""Summaries of tokens that stream by: what `metrics` says of all of them, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from turboesm_cli.evaluation.metrics import Agreement, Divergence, Predictions

State = dict[str, Any]
"""What a summary has taken in, as JSON has it."""

_UNIT = 1 << 1074
"""What the smallest float64 goes into 1."""


class ExactSum:
    """A sum of float64, exact until it is asked for: the same whatever the order, and in how many parts."""

    def __init__(self) -> None:
        self._units = 0
        self._odd = 0.0  # the sum of what is no finite number

    def add(self, value: float) -> None:
        """Take in a number."""
        if math.isfinite(value):
            numerator, denominator = value.as_integer_ratio()
            self._units += numerator * (_UNIT // denominator)
        else:
            self._odd += value

    def __float__(self) -> float:
        return self._units / _UNIT + self._odd

    @property
    def state(self) -> list[str]:
        """What `add_state` takes."""
        return [hex(self._units), repr(self._odd)]

    def add_state(self, state: list[str]) -> None:
        """Take in all that another sum has."""
        units, odd = state
        self._units += int(units, 16)
        self._odd += float(odd)


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

    @property
    def state(self) -> list[list[int]]:
        """What `add_state` takes: bins that are not empty, and their counts."""
        bins = self._counts.nonzero()[:, 0]
        return [bins.tolist(), self._counts[bins].tolist()]

    def add_state(self, state: list[list[int]]) -> None:
        """Take in all that another one has. Raises ValueError for what none has."""
        bins, counts = (torch.tensor(part, dtype=torch.int64) for part in state)
        known = not len(bins) or (int(bins.min()) >= 0 and int(bins.max()) < len(self._counts))
        if not known or bool((counts < 1).any()):
            raise ValueError("a bin or a count that there is not")
        self._counts.index_add_(0, bins, counts)

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
    total: ExactSum = field(default_factory=ExactSum)
    minimum: float = math.inf
    errors: Spread = field(default_factory=Spread)

    def add(self, cosines: Tensor) -> None:
        """Take in the cosines float64 [n] of some tokens."""
        self.n += len(cosines)
        self.total.add(float(cosines.sum()))
        self.minimum = min(self.minimum, float(cosines.min()))
        self.errors.add(1 - cosines)

    @property
    def state(self) -> State:
        """What `add_state` takes."""
        return {"n": self.n, "total": self.total.state, "minimum": repr(self.minimum), "errors": self.errors.state}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Take in all that another one has."""
        self.n += int(state["n"])
        self.total.add_state(state["total"])
        self.minimum = min(self.minimum, float(state["minimum"]))
        self.errors.add_state(state["errors"])

    def summary(self) -> Agreement:
        """Of all tokens so far. Raises ValueError for none."""
        if not self.n:
            raise ValueError("no tokens to compare")
        return Agreement(self.n, float(self.total) / self.n, 1 - self.errors.quantile(0.95), self.minimum)


@dataclass
class RunningDivergence:
    """`metrics.divergence` of predictions as they come."""

    n: int = 0
    kl: ExactSum = field(default_factory=ExactSum)
    same_top: int = 0
    log_p: ExactSum = field(default_factory=ExactSum)
    reference_log_p: ExactSum = field(default_factory=ExactSum)
    spread: Spread = field(default_factory=Spread)

    def add(self, parts: Predictions) -> None:
        """Take in the predictions at some positions."""
        self.n += len(parts.kl)
        self.kl.add(float(parts.kl.sum()))
        self.same_top += int(parts.same_top.sum())
        self.log_p.add(float(parts.log_p.sum()))
        self.reference_log_p.add(float(parts.reference_log_p.sum()))
        self.spread.add(parts.kl)

    @property
    def state(self) -> State:
        """What `add_state` takes."""
        sums = {name: getattr(self, name).state for name in _SUMS}
        return {"n": self.n, "same_top": self.same_top, "spread": self.spread.state} | sums

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Take in all that another one has."""
        self.n += int(state["n"])
        self.same_top += int(state["same_top"])
        self.spread.add_state(state["spread"])
        for name in _SUMS:
            getattr(self, name).add_state(state[name])

    def summary(self) -> Divergence | None:
        """At all positions so far; None where there are none."""
        if not self.n:
            return None
        perplexities = (math.exp(-float(total) / self.n) for total in (self.log_p, self.reference_log_p))
        return Divergence(
            self.n, float(self.kl) / self.n, self.spread.quantile(0.95), self.same_top / self.n, *perplexities
        )


_SUMS = ("kl", "log_p", "reference_log_p")
