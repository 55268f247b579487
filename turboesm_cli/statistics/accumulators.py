"""What calibration knows of a model: sums over tokens, and a sample of them; they add up.

Tokens at position 0 (`<cls>`) are summed apart from the rest, since a cache may keep them exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from turboesm_cli.models.shapes import Shape
from turboesm_cli.statistics.sensitivity import Sensitivity

VALUES_PER_HEAD = 1 << 17
"""Values of keys (and of values) kept of each head: 8192 tokens at head_dim 16, 2048 at 64."""

HELD_PART = 4
"""Of the proteins held back, this many times fewer are kept."""

FIRST, REST = 0, 1


@dataclass(frozen=True)
class LayerSums:
    """Sums over tokens of one layer, float64; the first index is FIRST or REST.

    count [2]; key [2, H, d] before RoPE; value [2, H, d]; key_key, query_query [2, H, d, d] after RoPE;
    key_phase [2, H, d, d]: keys times (cos, sin) of RoPE's d/2 angles; phase_phase [2, d, d];
    value_value [2, H, d, d].
    """

    count: Tensor
    key: Tensor
    value: Tensor
    key_key: Tensor
    query_query: Tensor
    value_value: Tensor
    key_phase: Tensor
    phase_phase: Tensor

    def __add__(self, other: LayerSums) -> LayerSums:
        return LayerSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @classmethod
    def of_layers(cls, tensors: Mapping[str, Tensor]) -> tuple[LayerSums, ...]:
        """Each layer's sums, from each field's of all layers stacked, as `stacked` gives them."""
        parts = (tensors[f.name].unbind() for f in fields(cls))
        return tuple(cls(*layer) for layer in zip(*parts, strict=True))

    def over(self, groups: Sequence[int]) -> LayerSums:
        """The sums over some of the groups together, still with a first index, of size 1."""
        return LayerSums(*(getattr(self, f.name)[list(groups)].sum(0, keepdim=True) for f in fields(self)))


def stacked(layers: Sequence[LayerSums]) -> dict[str, Tensor]:
    """Each field of all layers' sums, [layers, ...]."""
    return {f.name: torch.stack([getattr(layer, f.name) for layer in layers]) for f in fields(LayerSums)}


@dataclass(frozen=True)
class PositionSums:
    """Sums over tokens at each learned position: count int64 [P], keys float64 [layers, P, H, d]; P may be 0."""

    count: Tensor
    key: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PositionSums:
        """Those that gave `tensors`."""
        return cls(tensors["position_count"], tensors["position_key"])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, to be saved and added up."""
        return {"position_count": self.count, "position_key": self.key}

    def __add__(self, other: PositionSums) -> PositionSums:
        return PositionSums(self.count + other.count, self.key + other.key)


@dataclass(frozen=True)
class Sample:
    """Keys (after RoPE) and values of the tokens with the smallest hashes, ascending.

    hashes int64 [S]; positions int64 [S]; keys, values float32, one [S, H, d] a layer. Of an autoregressive model
    `gradients` float32 [S, draws, H, d] too, two a layer, keys' and values' (see `sensitivity`); else ().
    """

    hashes: Tensor
    positions: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] = ()

    @classmethod
    def empty(cls, shape: Shape, draws: int = 0) -> Sample:
        """No tokens of a model of this shape; with gradients where there are draws."""
        none, size = torch.zeros(0, dtype=torch.int64), (shape.key_value_heads, shape.head_dim)
        vectors = (torch.zeros(0, *size),) * shape.layers
        gradients = (torch.zeros(0, draws, *size),) * (2 * shape.layers if draws else 0)
        return cls(none, none, vectors, vectors, gradients)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: int) -> Sample:
        """The sample that gave `tensors`."""
        keys, values = (
            tuple(tensors[f"{name}.{layer}"] for layer in range(layers)) for name in ("keys", "values")
        )
        names = [f"gradients.{index}" for index in range(2 * layers)]
        gradients = tuple(tensors[name] for name in names if name in tensors)
        return cls(tensors["hashes"], tensors["positions"], keys, values, gradients)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, to be saved."""
        vectors = {f"keys.{layer}": x for layer, x in enumerate(self.keys)}
        vectors |= {f"values.{layer}": x for layer, x in enumerate(self.values)}
        vectors |= {f"gradients.{index}": x for index, x in enumerate(self.gradients)}
        return {"hashes": self.hashes, "positions": self.positions, **vectors}

    def merged(self, other: Sample, size: int) -> Sample:
        """The `size` tokens with the smallest hashes of both."""
        hashes, order = torch.sort(torch.cat((self.hashes, other.hashes)), stable=True)
        order = order[:size]
        positions = torch.cat((self.positions, other.positions))[order]
        keys, values, gradients = (
            tuple(torch.cat(pair)[order] for pair in zip(own, others, strict=True))
            for own, others in (
                (self.keys, other.keys), (self.values, other.values), (self.gradients, other.gradients)
            )
        )  # fmt: skip
        return Sample(hashes[:size], positions, keys, values, gradients)


@dataclass(frozen=True)
class Gathered:
    """What some batches of calibration proteins give: those of several shards add up to those of all.

    fitted, sample  sums by name, {} for no batch, and tokens, over the proteins to fit to
    held, held_sample  the same over the proteins held back
    """

    fitted: dict[str, Tensor]
    sample: Sample
    held: dict[str, Tensor]
    held_sample: Sample

    def plus(self, other: Gathered, head_dim: int) -> Gathered:
        """Both together."""
        size = sample_size(head_dim)
        return Gathered(
            added(self.fitted, other.fitted),
            self.sample.merged(other.sample, size),
            added(self.held, other.held),
            self.held_sample.merged(other.held_sample, size // HELD_PART),
        )

    def statistics(self, proteins: int, tokens: int) -> Statistics:
        """What calibration knows, once all batches of so many proteins are in."""
        return Statistics(
            LayerSums.of_layers(self.fitted),
            self.sample,
            Sensitivity(self.held["gram"], int(self.held["tokens"])),
            self.held_sample,
            proteins,
            tokens,
            PositionSums.of(self.fitted),
        )


def added(total: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums by name, added up; either may be {}."""
    return {name: total[name] + part if total else part for name, part in sums.items()} or dict(total)


@dataclass(frozen=True)
class Statistics:
    """What calibration knows of a model.

    layers, sample    sums per layer, and tokens, over the proteins to fit to
    positions         sums per position over the same
    sensitivity, held gradients, and tokens, over the proteins held back
    proteins, tokens  how much went in, both kinds together
    """

    layers: tuple[LayerSums, ...]
    sample: Sample
    sensitivity: Sensitivity
    held: Sample
    proteins: int
    tokens: int
    positions: PositionSums

    def __add__(self, other: Statistics) -> Statistics:
        layers = tuple(a + b for a, b in zip(self.layers, other.layers, strict=True))
        size = sample_size(self.sample.keys[0].shape[-1])
        return Statistics(
            layers,
            self.sample.merged(other.sample, size),
            self.sensitivity + other.sensitivity,
            self.held.merged(other.held, size // HELD_PART),
            self.proteins + other.proteins,
            self.tokens + other.tokens,
            self.positions + other.positions,
        )


def sample_size(head_dim: int) -> int:
    """Tokens kept at this head_dim."""
    return VALUES_PER_HEAD // head_dim
