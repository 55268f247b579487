"""Keys and values that follow from a token's kind, in the form that `token_layer` attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turboesm_kernels.reference import Rope


@dataclass(frozen=True)
class TokenTables:
    """Keys (before RoPE) and values of a layer that depend on the token, N kinds, and its position alone:

        key of kind t = f_t k_t + k_const    f_t = s / sqrt(s^2 + epsilon), s = sigma_t / unmasked

    and values likewise; k, v [H, N, d], k_const, v_const [H, d], sigma [N]. `unmasked` is the part of a prompt
    that is not masked, where the model's token dropout (`drops`) looks at it; else 1. With learned positions, P,

        key of kind t at p = f_tp (k_t + k_at_p) + k_const

    k_at, v_at [H, P, d], f [N, P] (`across`), which takes the place of sigma.
    """

    k: Tensor
    v: Tensor
    k_const: Tensor
    v_const: Tensor
    sigma: Tensor
    epsilon: float
    drops: bool
    k_at: Tensor | None = None
    v_at: Tensor | None = None
    across: Tensor | None = None

    def factors(self, unmasked: Tensor) -> Tensor:
        """f [B, N] of prompts whose unmasked part is [B]."""
        s = self.sigma / (unmasked if self.drops else torch.ones_like(unmasked))[:, None].to(self.sigma.dtype)
        return s * (s * s + self.epsilon).rsqrt()

    def factors_of(self, ids: Tensor, unmasked: Tensor) -> Tensor:
        """f [B, T] of tokens int64 [B, T] at positions 0.."""
        if self.across is None:
            return self.factors(unmasked).gather(1, ids)
        return self.across[ids, torch.arange(ids.shape[1], device=ids.device)]

    def keys_values(self, ids: Tensor, unmasked: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values [B, H, T, d] of tokens int64 [B, T] at positions 0.., angles [T, d]."""
        factor = self.factors_of(ids, unmasked)[:, None, :, None]
        found = []
        for kind, at, const in ((self.k, self.k_at, self.k_const), (self.v, self.v_at, self.v_const)):
            x = kind[:, ids].transpose(0, 1)
            x = x if at is None else x + at[:, : ids.shape[1]]
            found.append(factor * x + const[:, None])
        return rope.rotate(found[0]), found[1]
