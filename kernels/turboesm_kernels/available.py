"""What this machine has: Triton, which nothing imports before it is needed, and whose GPU a tensor is on."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for `device`."""
    if device.type != "cuda" or not has_triton():
        return False
    return torch.version.hip is not None or capability(device) >= (8, 0)


def on_nvidia(x: Tensor) -> bool:
    """Whether `x` is on an NVIDIA GPU: AMD's are "cuda" to torch, too, with compute capabilities of their own."""
    return x.is_cuda and torch.version.hip is None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability: torch looks it up anew each time, some microseconds."""
    return torch.cuda.get_device_capability(device)
