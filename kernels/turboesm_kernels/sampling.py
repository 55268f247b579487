# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What a step draws its next token with, in one launch each: torch would take some 40 of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.launch import early_launch, launch, launches_early
from turboesm_kernels.prepared import padded

MOST_KINDS = 64
"""Kinds of which a program compares each with each."""

NOISE_BLOCK = 1024
"""Kinds of a program that makes noise."""


@triton.jit
def draw_kernel(
    logits, l_r, l_k, ids, chances, out, temperature, top_p,
    KINDS: tl.constexpr, PAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out = the id of the kind whose share of softmax(logits / temperature), cumulated, chances falls into.

    The likeliest kind comes first, of equal ones the first; only those count before which less than top_p has
    come, and the first of all. logits any float [B, KINDS], ids int64 [KINDS], chances f32 [B] in 0..1, out int64
    [B]. Program b: row b.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PAD)
    own = place < KINDS
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    logit = tl.load(logits + row * l_r + place * l_k, mask=own, other=float("-inf")).to(tl.float32) / temperature
    weight = tl.where(own, tl.exp(logit - tl.max(logit, 0)), 0.0)
    weight /= tl.sum(weight, 0)
    other, mine = weight[None, :], weight[:, None]
    earlier = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
    rank = tl.sum(earlier.to(tl.int32), 1)
    before = tl.sum(tl.where(earlier, other, 0.0), 1)
    kept = own & ((before < top_p) | (rank == 0))
    share = tl.load(chances + row) * tl.sum(tl.where(kept, weight, 0.0), 0)
    passed = tl.sum((kept & (before + weight <= share)).to(tl.int32), 0)
    chosen = tl.minimum(passed, tl.sum(kept.to(tl.int32), 0) - 1)
    own_id = tl.load(ids + place, mask=own, other=0)
    tl.store(out + row, tl.max(tl.where(own & (rank == chosen), own_id, 0), 0))


def draw(logits: Tensor, ids: Tensor, chances: Tensor, temperature: float, top_p: float) -> Tensor:
    """Some of ids int64 [V], V up to `MOST_KINDS`, int64 [B], by rows of logits float [B, V]; see `draw_kernel`.

    temperature above 0, chances float32 [B]. Nothing is synchronized. Raises ValueError where shapes do not agree.
    """
    rows, kinds = logits.shape
    if kinds > MOST_KINDS or ids.shape != (kinds,) or chances.shape != (rows,):
        raise ValueError(f"cannot draw from {list(logits.shape)} by {list(chances.shape)} numbers")
    out = torch.empty((rows,), dtype=torch.int64, device=logits.device)
    early = launches_early(logits)
    launch(
        draw_kernel, (rows,),
        logits, *logits.stride(), ids.contiguous(), chances.contiguous(), out, float(temperature), float(top_p),
        KINDS=kinds, PAD=padded(kinds, 1), EARLY=early, num_warps=1, **early_launch(early),
    )  # fmt: skip
    return out


@triton.jit
def _mixed(x):
    """splitmix64's finalizer of int64, whose shifts bring in zeros."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _exponential(chance):
    """-log(1 - chance) of float32 chances below 1, to a few millionths of itself: near 0 by its series."""
    series = chance * (1.0 + chance * (0.5 + chance * (0.33333333 + chance * (0.25 + chance * 0.2))))
    return tl.where(chance < 0.015625, series, -tl.log(1.0 - chance))


@triton.jit
def noise_kernel(seeds, steps, out, kinds, of_step, of_kind, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """out = Gumbel noise f32 [B, kinds] of bits that seeds int64 [B], steps int64 [B] and the kind give.

    Program (b, n): the n-th block of kinds of row b.
    """
    row = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    state = _mixed(tl.load(seeds + row) + tl.load(steps + row) * of_step)
    bits = _mixed(state + kind.to(tl.int64) * of_kind) & 0x7FFFFFFF
    chance = tl.minimum(((0x7FFFFFFF - bits).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994)
    noise = -tl.log(_exponential(chance))
    tl.store(out + row * kinds + kind, noise, mask=kind < kinds)


def gumbel(seeds: Tensor, steps: Tensor, kinds: int, of_step: int, of_kind: int) -> Tensor:
    """Gumbel noise float32 [B, kinds] of seeds int64 [B] at steps int64 [B], in multiples of `of_step`, `of_kind`.

    -log(E), E = -log(1 - u), u in 0..1 of 31 bits. Nothing is synchronized.
    """
    out = torch.empty((len(seeds), kinds), dtype=torch.float32, device=seeds.device)
    early = launches_early(seeds)
    launch(
        noise_kernel, (len(seeds), -(-kinds // NOISE_BLOCK)),
        seeds.contiguous(), steps.contiguous(), out, kinds, of_step, of_kind,
        EARLY=early, BLOCK=NOISE_BLOCK, num_warps=4, **early_launch(early),
    )  # fmt: skip
    return out
