# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""A gated feed-forward part's product of gate and value, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.launch import early_launch, launch, launches_early

BLOCK = 1024
"""Channels of a program."""


@triton.jit
def gated_silu_kernel(joint, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """out = silu(gate) value, silu(g) = g / (1 + exp(-g)) in float32, rounded before the product as torch does.

    joint any float [R, 2 F], gate and value beside each other; out like it, [R, F]. Program (r, b): the b-th block
    of channels of row r.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    inside = channel < WIDTH
    if EARLY:  # before it reads or writes anything
        gdc_wait()
        gdc_launch_dependents()
    source = joint + row * (2 * WIDTH) + channel
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + channel, (activated * value).to(out.dtype.element_ty), mask=inside)


def gated_silu(joint: Tensor) -> Tensor:
    """silu(gate) value float16, bfloat16 or float32 [..., F] of the joint product [..., 2 F], gate first.

    One launch, nothing synchronized.
    """
    joint, width = joint.contiguous(), joint.shape[-1] // 2
    out = torch.empty((*joint.shape[:-1], width), dtype=joint.dtype, device=joint.device)
    early = launches_early(joint)
    launch(
        gated_silu_kernel, (joint.numel() // (2 * width), -(-width // BLOCK)),
        joint, out, WIDTH=width, BLOCK=BLOCK, EARLY=early, num_warps=4, **early_launch(early),
    )  # fmt: skip
    return out
