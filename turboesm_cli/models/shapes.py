"""The sizes of models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from turboesm_cli.errors import InputError, ModelError
from turboesm_cli.sequences.fasta import Protein


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    own_head_dim         where heads do not split the width among them
    own_key_value_heads  where several query heads share keys and values
    context              the most tokens that it takes; None: as long as one likes
    own_parameters       its weights, where they do not follow from the rest
    """

    layers: int
    width: int
    heads: int
    own_head_dim: int | None = None
    own_key_value_heads: int | None = None
    context: int | None = None
    own_parameters: int | None = None

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

MOST_SHARING = 16
"""Query heads of a key/value head that the kernels serve."""

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
    """Refuse sizes that no model has, or the kernels do not serve, before any memory is taken for them."""
    named = shape.as_dict() | {"layers": shape.layers, "width": shape.width, "heads": shape.heads}
    if any(type(size) is not int for size in named.values()):
        raise ModelError(f"{where}: layers, width and heads must be whole numbers, not {tuple(named.values())}")
    if not (0 < shape.layers <= 256 and 0 < shape.width <= 32768 and 0 < shape.heads <= 512):
        raise ModelError(
            f"{where}: {shape.layers} layers, {shape.width} wide, {shape.heads} heads: no protein language model's"
        )
    if any(size <= 0 for size in named.values()) or (shape.own_parameters or 0) > 2**40:
        raise ModelError(f"{where}: a size below 1, or over a million million weights: {named}")
    if shape.heads % shape.key_value_heads:
        raise ModelError(
            f"{where}: {shape.heads} query heads do not share {shape.key_value_heads} key/value heads"
        )
    if shape.heads > MOST_SHARING * shape.key_value_heads:
        raise ModelError(
            f"{where}: {shape.heads // shape.key_value_heads} query heads share keys and values; turboesm serves "
            f"up to {MOST_SHARING}"
        )
    if (shape.own_head_dim is None and shape.width % shape.heads) or shape.head_dim % 2:
        raise ModelError(f"{where}: width {shape.width} does not split into {shape.heads} heads of even size")
    if not SMALLEST_HEAD <= shape.head_dim <= LARGEST_HEAD:
        raise ModelError(
            f"{where}: {shape.width} wide in {shape.heads} heads makes a head_dim of {shape.head_dim}; turboesm "
            f"serves {SMALLEST_HEAD} to {LARGEST_HEAD}"
        )


def check_context(protein: Protein, tokens: int, shape: Shape) -> None:
    """Raise InputError where a protein has more tokens than a model takes."""
    if shape.context is not None and tokens > shape.context:
        where = f"{protein.source}: record {protein.record} ({protein.accession})"
        raise InputError(
            f"{where}: {tokens:,} tokens, control tokens counted, and the model takes {shape.context:,}; cut "
            "or remove it"
        )
