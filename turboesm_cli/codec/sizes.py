"""How large a codec and its caches are, in whole numbers: of a fitted codec, a bundle's manifest, or a shape and a
recipe. Caches are allocated by what is said here, and memory is planned by it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from turboesm_kernels.layout import BYTE, bytes_for, codes_shape, lanes_for, table_size, uniform, wide_lanes

if TYPE_CHECKING:
    from turboesm_kernels.reference import Side

    from turboesm_cli.codec.recipes import Recipe
    from turboesm_cli.models.shapes import Shape

Dims = tuple[int, ...]

ITEM = {"float32": 4, "float16": 2, "int16": 2, "uint8": 1}
"""Bytes of a number, by the dtypes of buffers and of a codec's tensors."""

UNMASKED = 4
"""Bytes of the float32 that each sequence has beside its layers."""


@dataclass(frozen=True)
class Buffer:
    """The size and dtype of a tensor."""

    size: Dims
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return prod(self.size) * ITEM[self.dtype]


@dataclass(frozen=True)
class SideSize:
    """The sizes of how one side of a layer is coded; see `turboesm_kernels.reference.SideSpec`.

    widest     bits of the widest code
    scaled     whether each token and head has a scale, a byte
    positions  that have a centre of their own, or 0
    """

    side: Side
    heads: int
    head_dim: int
    axes: int
    nbytes: int
    lanes: int
    widest: int
    scaled: bool
    positions: int = 0

    @property
    def tensors(self) -> dict[str, Buffer]:
        """Those of the `SideSpec`, by name."""
        heads, dim, axes = self.heads, self.head_dim, self.axes
        table = Buffer((heads, table_size(self.widest)))
        found = {
            "centre": Buffer((heads, dim)),
            "analysis": Buffer((heads, dim, axes)),
            "deviation": Buffer((heads, axes)),
            "synthesis": Buffer((heads, axes, dim)),
            "levels": table,
            "thresholds": table,
        }
        own = {"centre_at": Buffer((heads, self.positions, dim), "float16")} if self.positions else {}
        return found | own

    def buffers(self, batch: int, tokens: int, sinks: int) -> Iterator[tuple[str, Buffer]]:
        """What a cache holds of so many packed tokens and sinks, by the end of its name."""
        if sinks:
            yield "sinks", Buffer((batch, self.heads, sinks, self.head_dim), "float16")
        yield "codes", Buffer(codes_shape(self.side, self.heads, self.nbytes, self.lanes, batch, tokens), "uint8")
        if self.scaled:
            yield "scales", Buffer((batch, self.heads, tokens), "uint8")


@dataclass(frozen=True)
class CodecSize:
    """The sizes of a codec: keys' and values' of each layer, or None where a layer keeps tokens.

    kinds  of tokens that there are
    sinks  tokens that are kept in float16
    """

    layers: tuple[tuple[SideSize, SideSize] | None, ...]
    heads: int
    head_dim: int
    kinds: int
    sinks: int

    def buffers(self, layer: int, batch: int, tokens: int, step: int = 1) -> dict[str, Buffer]:
        """What a layer's cache of so many tokens is made of, by name; packed tokens are rounded up to `step`."""
        sides = self.layers[layer]
        if sides is None:
            return {"tokens": Buffer((batch, tokens), token_dtype(self.kinds))}
        sinks = min(self.sinks, tokens)
        packed = -(-(tokens - sinks) // step) * step
        return {
            f"{side.side}.{name}": buffer for side in sides for name, buffer in side.buffers(batch, packed, sinks)
        }

    def sequence_bytes(self, tokens: int) -> int:
        """Bytes that a packed cache holds for one sequence of so many tokens."""
        buffers = (self.buffers(layer, 1, tokens).values() for layer in range(len(self.layers)))
        return UNMASKED + sum(buffer.nbytes for layer in buffers for buffer in layer)

    def numbers(self, tokens: int) -> int:
        """Numbers of the keys and values of so many tokens, as a dense cache holds them."""
        return len(self.layers) * 2 * self.heads * self.head_dim * tokens

    @property
    def shared_bytes(self) -> int:
        """Bytes of what all caches of a model share: centres, rotations, tables."""
        sides = (side for layer in self.layers if layer for side in layer)
        return sum(tensor.nbytes for side in sides for tensor in side.tensors.values())


def token_dtype(kinds: int) -> str:
    """Of the tokens that a cache keeps in place of keys and values."""
    return "uint8" if kinds <= 256 else "int16"


def lanes_of(head_dim: int, recipe: Recipe) -> int:
    """Neighbouring axes that share a width: a recipe that shares a budget out counts in words where it can."""
    return wide_lanes(head_dim) if recipe.budget == "model" else lanes_for(head_dim)


def side_bytes(head_dim: int, bits: float, recipe: Recipe) -> int:
    """Bytes of a head's vector at `bits` payload bits per value."""
    if recipe.allocation == "flat" and bits == int(bits):
        return uniform(head_dim, int(bits)).nbytes
    return bytes_for(head_dim, bits)


def budget_steps(shape: Shape, recipe: Recipe) -> int:
    """Words (of `lanes_of` bytes) of a token that a recipe shares out among a model's coded layers and sides."""
    budget = shape.layers * shape.head_dim * (recipe.bits_k + recipe.bits_v) / BYTE
    return int(budget / lanes_of(shape.head_dim, recipe))


def planned_size(shape: Shape, recipe: Recipe) -> CodecSize:
    """The size of the codec that a recipe would make for a model.

    A sequence takes as many bytes as with a fitted codec: budgets are spent whole, wherever the bits go. Two
    things follow from proteins alone: sinks beyond the recipe's own, of an autoregressive model, and the size of
    the look-up tables, which all sequences share.
    """
    coded = [(_planned("k", k, shape, recipe), _planned("v", v, shape, recipe)) for k, v in _bytes(shape, recipe)]
    layers = (*[None] * recipe.exact_first, *coded)
    return CodecSize(layers, shape.key_value_heads, shape.head_dim, 256, recipe.sinks)


def _bytes(shape: Shape, recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Of a vector of keys and of values of each coded layer."""
    head_dim, layers = shape.head_dim, shape.layers - recipe.exact_first
    if recipe.budget == "side":
        for _ in range(layers):
            yield side_bytes(head_dim, recipe.bits_k, recipe), side_bytes(head_dim, recipe.bits_v, recipe)
        return
    lanes, steps = lanes_of(head_dim, recipe), budget_steps(shape, recipe)
    for part in range(0, 2 * layers, 2):
        k, v = ((steps * (end + 1)) // (2 * layers) - (steps * end) // (2 * layers) for end in (part, part + 1))
        yield lanes * k, lanes * v


def _planned(side: Side, nbytes: int, shape: Shape, recipe: Recipe) -> SideSize:
    """With bits spread evenly over the axes."""
    heads, dim, lanes = shape.key_value_heads, shape.head_dim, lanes_of(shape.head_dim, recipe)
    widest = -(-(nbytes * BYTE // lanes) // (dim // lanes))
    return SideSize(side, heads, dim, dim, nbytes, lanes, widest, recipe.scale != "none")
