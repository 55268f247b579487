"""The sizes of ESM-2 models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from turboesm_cli.errors import ModelError


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    own_head_dim         where heads do not split the width among them
    own_key_value_heads  where several query heads share keys and values
    """

    layers: int
    width: int
    heads: int
    own_head_dim: int | None = None
    own_key_value_heads: int | None = None

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.own_head_dim or self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values, which a cache holds: as many as of queries, or fewer."""
        return self.own_key_value_heads or self.heads

    def as_dict(self) -> dict[str, int]:
        """For manifests: what is as usual is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


SMALLEST_HEAD, LARGEST_HEAD = 8, 256
"""Channels of an attention head that the kernels serve."""

OFFICIAL = {
    "esm2_t6_8M_UR50D": Shape(6, 320, 20),
    "esm2_t12_35M_UR50D": Shape(12, 480, 20),
    "esm2_t30_150M_UR50D": Shape(30, 640, 20),
    "esm2_t33_650M_UR50D": Shape(33, 1280, 20),
    "esm2_t36_3B_UR50D": Shape(36, 2560, 40),
    "esm2_t48_15B_UR50D": Shape(48, 5120, 40),
}


def official_name(name: str) -> str | None:
    """The full official name that `name` abbreviates, or None."""
    full = name if name.startswith("esm2_") else f"esm2_{name}"
    full = full if full.endswith("_UR50D") else f"{full}_UR50D"
    return full if full in OFFICIAL else None


def check_shape(shape: Shape, where: Path) -> None:
    """Refuse sizes that no ESM-2 has before any memory is taken for them."""
    sizes = (shape.layers, shape.width, shape.heads)
    if any(type(size) is not int for size in sizes):
        raise ModelError(f"{where}: layers, width and heads must be whole numbers, not {sizes}")
    if not (0 < shape.layers <= 256 and 0 < shape.width <= 32768 and 0 < shape.heads <= 512):
        raise ModelError(f"{where}: {shape.layers} layers, {shape.width} wide, {shape.heads} heads is no ESM-2")
    if shape.own_head_dim or shape.own_key_value_heads:
        raise ModelError(f"{where}: heads of their own size, or grouped ones, are of no family that is served yet")
    if shape.width % shape.heads or shape.head_dim % 2:
        raise ModelError(f"{where}: width {shape.width} does not split into {shape.heads} heads of even size")
    if not SMALLEST_HEAD <= shape.head_dim <= LARGEST_HEAD:
        raise ModelError(
            f"{where}: {shape.width} wide in {shape.heads} heads makes a head_dim of {shape.head_dim}; turboesm "
            f"serves {SMALLEST_HEAD} to {LARGEST_HEAD}"
        )
