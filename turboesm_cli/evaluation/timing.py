"""How long something takes: warm-up, then the median of repeats with its spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 20th and 80th percentile of n calls."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The summary of samples in microseconds."""
        ordered = sorted(samples)
        return cls(_at(ordered, 0.5), _at(ordered, 0.2), _at(ordered, 0.8), len(ordered))


def measure(call: Callable[[], object], device: torch.device, warmup: int = 3, repeats: int = 20) -> Timing:
    """Time `call` by the wall clock, the device's work waited for: users wait for launches too."""
    for _ in range(warmup):
        call()
    return Timing.of([once(call, device) for _ in range(repeats)])


def once(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds of one call by the wall clock, the device's work waited for."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - start) * 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _at(samples: list[float], fraction: float) -> float:
    return samples[min(len(samples) - 1, round(fraction * (len(samples) - 1)))]
