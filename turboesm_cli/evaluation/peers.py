"""What others do to keys and values, to compare accuracy with: their formulas, without caches.

| name             | what it is                                                                                |
|------------------|-------------------------------------------------------------------------------------------|
| int8, fp8, ...   | the dense formats of `cache.formats`                                                      |
| int4             | as int8, of 4 bits: each token and head has a float16 scale, a 7th of its largest number  |
| quanto4, quanto2 | transformers' QuantizedCache with optimum-quanto (axis 0, q_group_size 64,                |
|                  | residual_length 1): groups of 64 numbers evenly from lowest to highest, a float16 scale   |
|                  | and shift each                                                                            |

Groups run over the heads of one token here; in optimum-quanto over the tokens of one head, which is the same where
64 divides head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from turboesm_kernels.reference import Rope

from turboesm_cli.cache.dense import DenseCodec
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.models.forward import Codec

GROUP = 64


@dataclass(frozen=True)
class Int4:
    """Symmetric, a scale for each token and head."""

    def nbytes(self, numbers: int, head_dim: int) -> int:
        """Bytes of so many numbers, scales counted."""
        return numbers // 2 + numbers // head_dim * 2

    def roundtrip(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, T, d] as they come back."""
        return self._back(k), self._back(v)

    def _back(self, x: Tensor) -> Tensor:
        scale = (x.float().abs().amax(-1, keepdim=True) / 7).clamp_min(1e-7).half().float()
        return ((x.float() / scale).round().clamp(-7, 7) * scale).to(x.dtype)


@dataclass(frozen=True)
class Quanto:
    """Evenly from the lowest to the highest number of each group."""

    bits: int

    def nbytes(self, numbers: int, head_dim: int) -> int:
        """Bytes of so many numbers, scales and shifts counted."""
        return numbers * self.bits // 8 + -(-numbers // GROUP) * 4

    def roundtrip(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, T, d] as they come back."""
        return self._back(k), self._back(v)

    def _back(self, x: Tensor) -> Tensor:
        numbers = x.transpose(1, 2).flatten(2).float()  # [B, T, K d]
        size = numbers.shape[-1]
        groups = F.pad(numbers, (0, -size % GROUP), mode="replicate").unflatten(-1, (-1, GROUP))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        top = 2**self.bits - 1
        scale, shift = ((high - low) / top).clamp_min(1e-7).half().float(), (-low).half().float()
        back = ((groups + shift) / scale).round().clamp(0, top) * scale - shift
        return back.flatten(2)[..., :size].unflatten(2, (x.shape[1], -1)).transpose(1, 2).to(x.dtype)


CODED: dict[str, Int4 | Quanto] = {"int4": Int4(), "quanto4": Quanto(4), "quanto2": Quanto(2)}
"""Those of `formats.PEERS` that are no dense formats."""


def peer(name: str) -> Codec:
    """What a peer does to keys and values."""
    return CODED[name] if name in CODED else DenseCodec(FORMATS[name])


def peer_nbytes(name: str, numbers: int, head_dim: int) -> int:
    """Bytes that a peer keeps of so many numbers."""
    return (CODED[name] if name in CODED else FORMATS[name]).nbytes(numbers, head_dim)


def peer_bits(name: str) -> float:
    """Bits of a number, scales not counted, by which results name it."""
    return {"int4": 4.0, "quanto4": 4.0, "quanto2": 2.0}.get(name) or FORMATS[name].bits
