"""Keys and values that follow from a token's kind, in the form that `token_layer` attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenTables:
    """Keys (before RoPE) and values of a layer that depend on the token alone, N kinds of token:

        key of kind t = f_t k_t + k_const    f_t = s / sqrt(s^2 + epsilon), s = sigma_t / unmasked

    and values likewise; k, v [H, N, d], k_const, v_const [H, d], sigma [N]. `unmasked` is the part of a prompt
    that is not masked, where the model's token dropout (`drops`) looks at it; else 1.
    """

    k: Tensor
    v: Tensor
    k_const: Tensor
    v_const: Tensor
    sigma: Tensor
    epsilon: float
    drops: bool

    def factors(self, unmasked: Tensor) -> Tensor:
        """f [B, N] of prompts whose unmasked part is [B]."""
        s = self.sigma / (unmasked if self.drops else torch.ones_like(unmasked))[:, None].to(self.sigma.dtype)
        return s * (s * s + self.epsilon).rsqrt()
