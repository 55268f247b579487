"""What the kernels of attention and packing are given: a layer's codec made ready, and what its cache holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turboesm_kernels.prepared import PreparedSide
from turboesm_kernels.reference import Packed, Rope, SideSpec

IN_TILES = "values lie in tiles, which the fast path alone reads"
"""Why another backend does not serve a cache."""


@dataclass(frozen=True)
class PreparedLayer:
    """One layer's codec, ready for the kernels. Make it once per layer, with `of`, before decoding."""

    k: PreparedSide
    v: PreparedSide

    @classmethod
    def of(cls, k: SideSpec, v: SideSpec) -> PreparedLayer:
        """Prepare the two sides of a layer, on their device."""
        return cls(PreparedSide.of(k), PreparedSide.of(v))


@dataclass(frozen=True)
class Joint:
    """Queries, keys and values of T tokens of each of B sequences, before RoPE.

    product  any float [B, T, (H + 2 K) d], dense, of H query heads and K of keys and values beside each other; or
             parts float32 [S, B, T, (H + 2 K) d] to be summed
    heads    H and K
    scaling  of queries
    dtype    that queries, keys and values are rounded to
    """

    product: Tensor
    heads: tuple[int, int]
    scaling: float
    dtype: torch.dtype

    @property
    def parts(self) -> int:
        """S, or 1 where the product is whole."""
        return len(self.product) if self.product.dim() == 4 else 1

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the first tokens' first part, views: queries [B, K, H / K, d], keys and values [B, K, 1, d]."""
        heads, shared = self.heads
        first = self.product[0] if self.product.dim() == 4 else self.product
        by_head = first[:, 0].unflatten(1, (heads + 2 * shared, -1))
        q, k, v = by_head.split((heads, shared, shared), 1)
        return q.unflatten(1, (shared, -1)), k[:, :, None], v[:, :, None]


@dataclass(frozen=True)
class Held:
    """What a layer's cache holds of B sequences: s sinks, then up to T packed tokens each.

    k, v      packed tokens; codes and scales may be strided views of larger buffers; values for the fast path lie
              in tiles, elsewhere in planes (`layout`)
    rope      angles of the packed tokens' positions: cos and sin float32 [T' >= T, d], the same for all sequences
              (packed token 0 is position s); needed where the keys' centre is not 0
    lengths   int32 [B]: tokens of each sequence, sinks counted; None: all s + T
    sink_k    float [B, H, s, d]: the first tokens' keys after RoPE, whole (float16 as a rule), or None
    sink_v    float [B, H, s, d]: their values, or None
    """

    k: Packed
    v: Packed
    rope: Rope | None = None
    lengths: Tensor | None = None
    sink_k: Tensor | None = None
    sink_v: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Packed tokens that a sequence has room for, T."""
        return self.k.codes.shape[3]

    @property
    def sinks(self) -> int:
        """Tokens kept whole, s."""
        return 0 if self.sink_k is None else self.sink_k.shape[2]

    def check_room(self, start: int | Tensor, count: int) -> None:
        """Raise ValueError where `count` tokens from `start` on, the same for all sequences, do not fit."""
        if isinstance(start, int) and not 0 <= start <= self.sinks + self.tokens - count:
            raise ValueError(f"{count} tokens from {start} on do not fit in {self.sinks} and {self.tokens}")

    def check_sinks(self, batch: int, heads: int, dim: int) -> None:
        """Raise ValueError where sinks are not those of B sequences of H heads of d."""
        if (self.sink_k is None) != (self.sink_v is None):
            raise ValueError("give the sinks' keys and values, or neither")
        if self.sink_k is not None and self.sink_v is not None:
            shape = (batch, heads, self.sinks, dim)
            if self.sink_k.shape != shape or self.sink_v.shape != shape:
                raise ValueError(f"sinks must be {shape}, not {self.sink_k.shape} and {self.sink_v.shape}")
