# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What a part of a layer adds to the hidden states, and the norm that follows, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.launch import early_launch, launch, launches_early
from turboesm_kernels.prepared import padded

WIDEST = 8192
"""Channels that the registers of one program hold."""

FEW = 2048
"""Channels up to which four warps do."""


@triton.jit
def add_norm_kernel(
    x, y, x_r, y_r, y_s, weight, bias, total_out, normed_out, epsilon,
    WIDTH: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """total_out = x + sum of y's parts, rounded; normed_out = its layer norm, or without bias its RMS norm.

    x [R, E] and y [PARTS, R, E] with strides of rows and parts, outputs [R, E] like x, all any float; weight and
    bias any float [E]. Program r: row r. The sum is taken in float32; the norm, in float32 too, is that of the
    rounded sum, its variance the mean square of what is left without the mean.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PAD)
    inside = channel < WIDTH
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    constant = tl.zeros((PAD,), tl.float32)
    if HAS_BIAS:
        constant = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if EARLY:  # weights never change; all else may be what the kernel before is writing
        gdc_wait()
        gdc_launch_dependents()
    first = tl.load(x + row * x_r + channel, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(y + row * y_r + channel, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        second += tl.load(y + part * y_s + row * y_r + channel, mask=inside, other=0.0)
    rounded = (first + second).to(total_out.dtype.element_ty)
    tl.store(total_out + row * WIDTH + channel, rounded, mask=inside)
    centred = rounded.to(tl.float32)
    if HAS_BIAS:
        centred = tl.where(inside, centred - tl.sum(centred, 0) / WIDTH, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + epsilon)
    normed = centred * scale * factor + constant
    tl.store(normed_out + row * WIDTH + channel, normed.to(normed_out.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + y, and its layer norm, or RMS norm where bias is None; x, y and both results float16, bfloat16 or
    float32 [..., E], weight and bias float [E], E up to `WIDEST`. y may be parts float32 [S, ..., E] to be summed.

    One launch, nothing synchronized. Raises ValueError where shapes or dtypes do not agree.
    """
    width = x.shape[-1]
    in_parts = y.dim() > x.dim() and y.dtype == torch.float32
    alike = y.shape[1:] == x.shape if in_parts else (y.shape, y.dtype) == (x.shape, x.dtype)
    if not alike or weight.shape != (width,) or width > WIDEST:
        raise ValueError(f"cannot norm {x.dtype} {list(x.shape)} + {y.dtype} {list(y.shape)} in one kernel")
    first, second = _rows(x), _rows(y)
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    early = launches_early(x)
    launch(
        add_norm_kernel, (len(first),),
        first, second, first.stride(0), second.stride(0), x.numel(), weight, weight if bias is None else bias,
        total, normed, epsilon,
        WIDTH=width, PAD=padded(width, 1), PARTS=len(y) if in_parts else 1, HAS_BIAS=bias is not None, EARLY=early,
        num_warps=4 if width <= FEW else 8, **early_launch(early),
    )  # fmt: skip
    return total, normed


def _rows(x: Tensor) -> Tensor:
    """[..., E] -> [R, E], neighbouring channels side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
