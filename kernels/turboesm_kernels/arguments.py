"""What Triton compiles a kernel for of its arguments. Without Triton, which not every machine has."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

from torch import Tensor

ALIGNMENT = 16
"""What Triton compiles for apart: pointers (bytes) and integers that are multiples of it."""

_numbers: dict[Hashable, int] = {}
_unused = count()
"""Numbers of kinds of `Fixed`; threads that compile side by side must never be given the same one."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """Tensors and numbers that a kernel is given one after another each time, and that stay: looked at once."""

    values: tuple[Tensor | int, ...]

    @cached_property
    def number(self) -> int:
        """The same for the same kinds on the same devices: Triton looks at the first of each."""
        kinds = tuple((kind(x), x.device if isinstance(x, Tensor) else None) for x in self.values)
        return _numbers.setdefault(kinds, next(_unused))

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """What Triton would ask of each tensor, and then of the driver; numbers as they are."""
        return tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is of copied tensors, elsewhere."""
        return Fixed, (self.values,)


def spread(args: Iterable[Any]) -> list[Any]:
    """Arguments with the values of each `Fixed` in its place."""
    return [y for x in args for y in (x.values if type(x) is Fixed else (x,))]


def kind(x: object) -> Hashable:
    """What Triton compiles a kernel for NVIDIA for of an argument: its own distinctions, or finer ones."""
    if type(x) is int:
        return _kind_of_integer(x)
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % ALIGNMENT == 0
    return type(x).__name__


@lru_cache(maxsize=4096)
def _kind_of_integer(x: int) -> Hashable:
    return x == 1, x % ALIGNMENT == 0, x >> 31
