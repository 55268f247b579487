"""Shards: the parts of one input that the tasks of a job array work on, each on its own.

The items of an input are counted as one, whoever works on them. A shard takes neighbours, so that outputs are
joined by putting them one after another, and the boundaries follow from the residues of all items alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AUTO = "auto"
MOST = 100_000
"""Shards of an input at most; no scheduler's array has as many tasks."""
_WRITTEN = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII).fullmatch
_SLURM = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Shard:
    """Part `index`, from 0, of `of` parts."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


ALL = Shard(0, 1)


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """The shard that `I/N` means or, for `auto`, the Slurm array task of an environment. Raises ValueError."""
    if text == AUTO:
        return _of_task(environment)
    found = _WRITTEN(text)
    if found is None:
        raise ValueError(f"{text!r} is not I/N, such as 0/4, nor auto")
    index, of = map(int, found.groups())
    if not (index < of and 1 <= of <= MOST):
        raise ValueError(f"{text}: I goes from 0 to N-1, and N up to {MOST:,}")
    return Shard(index, of)


def _of_task(environment: Mapping[str, str]) -> Shard:
    """The task's place in its array, whose numbers may start anywhere and be evenly spaced."""
    number, count, least = (_number(environment, name) for name in ("ID", "COUNT", "MIN"))
    step = _number(environment, "STEP") if f"{_SLURM}STEP" in environment else 1
    last = _number(environment, "MAX") if f"{_SLURM}MAX" in environment else least + (count - 1) * step
    index, rest = divmod(number - least, max(1, step))
    if rest or not 0 <= index < count <= MOST or last != least + (count - 1) * step:
        raise ValueError(
            "auto: the array's numbers are not evenly spaced; submit it as --array=0-3, or name the shard as I/N"
        )
    return Shard(index, count)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(_SLURM + name)
    if text is None:
        raise ValueError(
            f"auto: {_SLURM}{name} is not set: run it as a task of a Slurm array, or name the shard as I/N"
        )
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"auto: {_SLURM}{name} is {text[:40]!r}, no number; name the shard as I/N")
    return int(text)


def part_of(sizes: Sequence[int], shard: Shard) -> range:
    """The numbers of the items that a shard takes, of items of these sizes (residues).

    An item belongs where its middle falls when the sum of all sizes is cut into equal parts: every item belongs to
    one shard, whatever the number of shards, and shards differ from the mean by an item at most.
    """
    total, before = max(1, sum(sizes)), 0
    start = stop = 0
    for size in sizes:
        owner = min(shard.of - 1, shard.of * (2 * before + size) // (2 * total))
        start += owner < shard.index
        stop += owner <= shard.index
        before += size
    return range(start, stop)
