"""What decoding takes of a device's memory, before any is taken: weights, caches, workspace, the largest batch.

Of shapes and sizes alone: imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turboesm_cli.cache.formats import FORMATS, KINDS
from turboesm_cli.codec.sizes import CodecSize
from turboesm_cli.errors import InputError
from turboesm_cli.models.families import parameter_count
from turboesm_cli.models.shapes import Shape

PREFILL_TOKENS = 16384
"""Tokens that are encoded at once when slots are filled: what bounds the workspace of a prefill. Enough that a GPU
is not kept waiting for the host."""

RESERVED = 0.06
"""Share of a device's memory that is left alone: contexts of libraries, graphs, fragments."""

LEGEND = "shared: tables, held once; workspace: of a prefill; beside: per sequence while decoding"
LIBRARIES = 64 << 20
"""Bytes of workspace that torch's libraries keep."""

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}


@dataclass(frozen=True)
class Plan:
    """Bytes that decoding with a cache of one kind takes, and the largest batch that fits.

    memory     of the device
    weights    of the model
    shared     what all sequences share: rotations and tables of a codec, and what the kernels make of them
    workspace  at the widest point of a prefill, estimated
    sequence   the cache of one sequence of `context` tokens
    beside     what a sequence takes beside its cache: results, and one layer unpacked where a step does that
    """

    kind: str
    context: int
    memory: int
    weights: int
    shared: int
    workspace: int
    sequence: int
    beside: int

    @property
    def batch(self) -> int:
        """Sequences that fit."""
        left = int(self.memory * (1 - RESERVED)) - self.weights - self.shared - self.workspace
        return max(0, left // (self.sequence + self.beside))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"batch": self.batch}

    def cells(self) -> list[str]:
        """For a table."""
        sizes = (self.weights, self.shared, self.workspace, self.sequence, self.beside)
        return [self.kind, *(f"{size / 2**20:,.1f}" for size in sizes), f"{self.batch:,}"]


COLUMNS = [
    "cache",
    "weights MiB",
    "shared MiB",
    "workspace MiB",
    "MiB per sequence",
    "beside MiB",
    "largest batch",
]


def plans(shape: Shape, size: CodecSize, itemsize: int, context: int, memory: int, results: int = 0) -> list[Plan]:
    """A plan for each kind of cache, for sequences of up to `context` tokens; a weight has `itemsize` bytes.

    `results`: bytes that a task keeps of a sequence. Needs no model: its shape says what it takes.
    """
    return [
        Plan(
            kind, context, memory,
            weights=parameter_count(shape) * itemsize,
            shared=4 * size.shared_bytes if kind == "packed" else 0,
            workspace=_workspace(shape, itemsize, context),
            sequence=sequence_bytes(size, kind, context),
            beside=results + _unpacked(shape, itemsize, kind, context),
        )
        for kind in KINDS
    ]  # fmt: skip


def sequence_bytes(size: CodecSize, kind: str, context: int) -> int:
    """Bytes that one sequence of `context` tokens takes in a cache of a kind."""
    if kind == "packed":
        return size.sequence_bytes(context)
    return FORMATS[kind].nbytes(size.numbers(context), size.head_dim)


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "80 GB", "512MiB". Raises InputError."""
    compact = text.replace(" ", "")
    unit = next((unit for unit in UNITS if compact.endswith(unit)), None)
    try:
        size = float(compact.removesuffix(unit)) * UNITS[unit] if unit else 0.0
    except ValueError:
        size = 0.0
    if not 2**20 <= size <= 2**50:
        raise InputError(f"--memory {text}: give a size like 24GiB or 80GB")
    return int(size)


def machine_memory() -> int:
    """Bytes of the machine's memory that are available."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        lines: Mapping[str, str] = dict(line.split(":", 1) for line in text.splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 * 2**30


def _workspace(shape: Shape, itemsize: int, context: int) -> int:
    """Activations of a prefill of `PREFILL_TOKENS` tokens at its widest, the feed-forward layer, and cuBLAS's own.

    With bf16 weights 30 bytes per token and channel: peaks measured on an H200 held 23 to 30 (64 and 256 x 1024).
    """
    tokens = max(PREFILL_TOKENS, context)
    return tokens * shape.width * 15 * itemsize + LIBRARIES


def _unpacked(shape: Shape, itemsize: int, kind: str, context: int) -> int:
    """One layer's keys and values, which int8 and fp8 caches turn back into the weights' dtype in a step."""
    widened = {"int8": 8, "fp8": 0}.get(kind)
    if widened is None:
        return 0
    return context * shape.width * (2 * itemsize + widened)
