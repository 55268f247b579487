"""A model's shape + a recipe -> a codec of the right sizes with nothing in it, to plan memory by.

A cache takes as many bytes per sequence as with a fitted codec: budgets are spent whole, wherever the bits go.
Two things follow from proteins alone: sinks beyond the recipe's own, of an autoregressive model, and the
size of the look-up tables, which all sequences share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from turboesm_kernels.layout import BYTE
from turboesm_kernels.reference import Side, SideSpec, table_size

from turboesm_cli.codec import bit_allocation
from turboesm_cli.codec.fit import CodecSpec, LayerSpec
from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.codec.sides import lanes_of, side_bytes
from turboesm_cli.models.shapes import Shape


def blank_spec(shape: Shape, recipe: Recipe) -> CodecSpec:
    """A codec whose tensors have no memory (device "meta")."""
    coded = [
        LayerSpec(_side("k", k, shape, recipe), _side("v", v, shape, recipe)) for k, v in _sizes(shape, recipe)
    ]
    return CodecSpec(recipe, (*[None] * recipe.exact_first, *coded), shape.key_value_heads, shape.head_dim)


def _sizes(shape: Shape, recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Bytes of a vector of keys and of values of each coded layer."""
    head_dim, layers = shape.head_dim, shape.layers - recipe.exact_first
    if recipe.budget == "side":
        for _ in range(layers):
            yield side_bytes(head_dim, recipe.bits_k, recipe), side_bytes(head_dim, recipe.bits_v, recipe)
        return
    lanes = lanes_of(head_dim, recipe)
    steps = int(shape.layers * head_dim * (recipe.bits_k + recipe.bits_v) / BYTE / lanes)
    for part in range(0, 2 * layers, 2):
        k, v = ((steps * (end + 1)) // (2 * layers) - (steps * end) // (2 * layers) for end in (part, part + 1))
        yield lanes * k, lanes * v


def _side(side: Side, nbytes: int, shape: Shape, recipe: Recipe) -> SideSpec:
    heads, dim = shape.key_value_heads, shape.head_dim
    profile = bit_allocation.flat(dim, nbytes, lanes_of(dim, recipe))

    def nothing(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    table = (heads, table_size(profile.widths[0]))
    return SideSpec(
        side, (profile,), (0,) * heads, nothing(heads, dim), nothing(heads, dim, dim), nothing(heads, dim),
        nothing(heads, dim, dim), nothing(*table), nothing(*table), recipe.scale,
    )  # fmt: skip
