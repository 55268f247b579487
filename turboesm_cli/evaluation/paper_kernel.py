# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The decode kernel of TurboESM (arXiv 2603.26110), written from its description: a baseline.

One program for a sequence and head, no split over keys. Eight 3-bit codes to an int32 (a nibble each), K's
residual signs 32 to an int32, one 8-entry table for K and one for V a head, looked up with a gather; online
softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from turboesm_kernels import reference

BLOCK = 64


@triton.jit
def paper_kernel(
    query, k_codes, k_signs, v_codes, k_table, v_table, residual, out, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v, k = table[code] +- residual, v = table[code].

    query f32 [B, H, d], codes int32 [B, H, T, d / 8], signs int32 [B, H, T, d / 32], tables f32 [H, 8], residual
    f32 [H], out f32 [B, H, d]. Program b H + h.
    """
    pair = tl.program_id(0).to(tl.int64)
    head = pair % HEADS
    dim = tl.arange(0, DIM)
    entry = tl.arange(0, 8)
    q = tl.load(query + pair * DIM + dim)
    k_levels = tl.broadcast_to(tl.load(k_table + head * 8 + entry)[None, :], (BLOCK, 8))
    v_levels = tl.broadcast_to(tl.load(v_table + head * 8 + entry)[None, :], (BLOCK, 8))
    delta = tl.load(residual + head)
    top = -float("inf")
    mass = 0.0
    acc = tl.zeros((DIM,), tl.float32)
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        live = (token < tokens)[:, None]
        row = pair * tokens + token[:, None]
        shift = (dim % 8 * 4)[None, :]
        word = tl.load(k_codes + row * (DIM // 8) + (dim // 8)[None, :], mask=live, other=0)
        k = tl.gather(k_levels, (word >> shift) & 7, 1)
        sign = tl.load(k_signs + row * (DIM // 32) + (dim // 32)[None, :], mask=live, other=0)
        k += tl.where(((sign >> (dim % 32)[None, :]) & 1) == 1, delta, -delta)
        score = tl.where(token < tokens, tl.sum(q[None, :] * k, 1) * 1.4426950408889634, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        p = tl.exp2(score - new_top)
        shrink = tl.exp2(top - new_top)
        word = tl.load(v_codes + row * (DIM // 8) + (dim // 8)[None, :], mask=live, other=0)
        v = tl.gather(v_levels, (word >> shift) & 7, 1)
        mass = mass * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)
        top = new_top
    tl.store(out + pair * DIM + dim, acc / mass)


@dataclass(frozen=True)
class PaperCache:
    """A random cache in the paper's format: see `paper_kernel`."""

    k_codes: Tensor
    k_signs: Tensor
    v_codes: Tensor
    k_table: Tensor
    v_table: Tensor
    residual: Tensor

    @classmethod
    def random(cls, batch: int, heads: int, tokens: int, dim: int, device: torch.device) -> PaperCache:
        """Uniformly random codes, tables of normal deviates."""
        bits = torch.iinfo(torch.int32)

        def words(count: int) -> Tensor:
            shape = (batch, heads, tokens, count)
            return torch.randint(bits.min, bits.max, shape, dtype=torch.int32, device=device)

        k_table, v_table = torch.randn(2, heads, 8, device=device).sort(-1).values
        residual = torch.full((heads,), 0.2, device=device)
        return cls(words(dim // 8), words(dim // 32), words(dim // 8), k_table, v_table, residual)

    def attend(self, q: Tensor, rotation: Tensor) -> Tensor:
        """Attention of q [B, H, 1, d], turned by the heads' rotations f32 [H, d, d] first."""
        batch, heads, _, dim = q.shape
        turned = torch.einsum("bhd,hde->bhe", q[:, :, 0].float(), rotation)
        out = torch.empty_like(turned)
        paper_kernel[(batch * heads,)](
            turned, self.k_codes, self.k_signs, self.v_codes, self.k_table, self.v_table, self.residual, out,
            self.k_codes.shape[2], HEADS=heads, DIM=dim, BLOCK=BLOCK,
        )  # fmt: skip
        return out[:, :, None]

    def plain(self, q: Tensor, rotation: Tensor) -> Tensor:
        """The same in plain torch, double precision."""
        shifts = torch.arange(0, 32, 4, device=q.device)
        ones = torch.arange(32, device=q.device)
        heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
        k_codes, v_codes = (
            ((w[..., None] >> shifts) & 7).flatten(-2).long() for w in (self.k_codes, self.v_codes)
        )
        signs = ((self.k_signs[..., None] >> ones) & 1).flatten(-2).double() * 2 - 1
        k = self.k_table.double()[heads, k_codes] + signs * self.residual.double()[:, None, None]
        turned = torch.einsum("bhqd,hde->bhqe", q.double(), rotation.double())
        return reference.attend(turned, k, self.v_table.double()[heads, v_codes])
