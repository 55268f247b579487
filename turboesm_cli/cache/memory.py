"""Bytes that caches hold, against fp32 and fp16."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from turboesm_cli.codec.fit import CodecSpec


@dataclass(frozen=True)
class MemoryLine:
    """What one cache, or several together, hold."""

    name: str
    tokens: int
    nbytes: int
    fp32_nbytes: int

    @property
    def bits_per_value(self) -> float:
        """Bits held for each key and value number."""
        return self.nbytes / self.fp32_nbytes * 32

    @property
    def ratio_fp32(self) -> float:
        """How many times less than fp32."""
        return self.fp32_nbytes / self.nbytes

    @property
    def ratio_fp16(self) -> float:
        """How many times less than fp16."""
        return self.ratio_fp32 / 2

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {name: getattr(self, name) for name in ("bits_per_value", "ratio_fp32", "ratio_fp16")}
        return asdict(self) | derived

    def cells(self) -> list[str]:
        """For a table."""
        return [
            self.name,
            f"{self.tokens:,}",
            f"{self.nbytes:,}",
            f"{self.bits_per_value:.3f}",
            f"{self.fp32_nbytes:,}",
            f"{self.ratio_fp32:.2f}",
            f"{self.ratio_fp16:.2f}",
        ]


def memory_of(spec: CodecSpec, name: str, tokens: int, nbytes: int) -> MemoryLine:
    """The line of a cache that holds `tokens` tokens in `nbytes` bytes."""
    return MemoryLine(name, tokens, nbytes, 4 * spec.size.numbers(tokens))


@dataclass
class Tally:
    """Lines summed up as they come; the first `shown` are kept."""

    shown: int = 20
    first: list[MemoryLine] = field(default_factory=list)
    count: int = 0
    tokens: int = 0
    nbytes: int = 0
    fp32_nbytes: int = 0

    def add(self, line: MemoryLine) -> None:
        """Count a line."""
        self.count += 1
        self.tokens += line.tokens
        self.nbytes += line.nbytes
        self.fp32_nbytes += line.fp32_nbytes
        if self.count <= self.shown:
            self.first.append(line)

    @property
    def total(self) -> MemoryLine:
        """All lines together."""
        return MemoryLine(f"total of {self.count}", self.tokens, self.nbytes, self.fp32_nbytes)
