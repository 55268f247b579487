"""Dense cache formats, those of general LLM stacks: plain dtypes, int8 and fp8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT8_TOP = 127


@dataclass(frozen=True)
class Format:
    """A dense cache's dtype; `scaled`: each token and head has a float16 scale, a 127th of its largest number."""

    name: str
    dtype: torch.dtype
    scaled: bool = False

    def store(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Numbers [..., d] in the format, and scales [...] where it has them."""
        if not self.scaled:
            if self.dtype.itemsize == 1:  # fp8 has no infinity: beyond its range lies NaN
                x = x.clamp(-torch.finfo(self.dtype).max, torch.finfo(self.dtype).max)
            return x.to(self.dtype), None
        scale = (x.float().abs().amax(-1) / INT8_TOP).clamp_min(1e-7).half()
        codes = (x.float() / scale.float()[..., None]).round().clamp(-INT8_TOP, INT8_TOP)
        return codes.to(self.dtype), scale

    def load(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Numbers [..., d] back in `dtype`."""
        if scales is None:
            return codes.to(dtype)
        return (codes.float() * scales.float()[..., None]).to(dtype)

    def nbytes(self, numbers: int, head_dim: int) -> int:
        """Bytes of so many numbers, scales counted."""
        return numbers * self.dtype.itemsize + (numbers // head_dim * 2 if self.scaled else 0)


FORMATS = {
    form.name: form
    for form in (
        Format("fp32", torch.float32),
        Format("fp16", torch.float16),
        Format("bf16", torch.bfloat16),
        Format("int8", torch.int8, scaled=True),
        Format("fp8", torch.float8_e4m3fn),
    )
}
