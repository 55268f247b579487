"""Norms, and the sums and products that they are taken of: few kernels on a GPU, plain torch elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from turboesm_kernels.available import runs_triton

KERNEL_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x [..., K] with a weight [N, K] is a kernel of ours: few rows in 16 bits."""
    if not by_kernel(x):
        return False
    from turboesm_kernels.linear import serves

    return serves(x, weight)


def by_kernel(x: Tensor) -> bool:
    """Whether what is done to x between products is done by kernels of ours, which have no derivatives."""
    return x.dtype in KERNEL_DTYPES and not torch.is_grad_enabled() and launches_on(x.device)


def launches_on(device: torch.device) -> bool:
    """Whether Triton's kernels are launched on `device`: it serves it, and it is the current one."""
    return runs_triton(device) and (device.type != "cuda" or device.index == torch.cuda.current_device())


class Norm(NamedTuple):
    """Layer norm, or where there is no bias RMS norm; weight and bias [E]."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.epsilon)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)

    def of_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y [B, T, E], and that normed."""
        if by_kernel(x) and x.dtype == y.dtype:
            from turboesm_kernels.add_norm import WIDEST, add_norm

            if x.shape[-1] <= WIDEST:
                return add_norm(x, y, *self)
        total = x + y
        return total, self(total)

    def of_product(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + y weight^T + bias [B, T, E], and that normed."""
        if few_rows(y, weight) and x.dtype == y.dtype:
            from turboesm_kernels.add_norm import WIDEST, add_norm
            from turboesm_kernels.linear import linear_parts

            if x.shape[-1] <= WIDEST:
                return add_norm(x, linear_parts(y, weight, bias), *self)
        return self.of_sum(x, F.linear(y, weight, bias))
