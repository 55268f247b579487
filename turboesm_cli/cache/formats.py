"""The formats that a cache may have: packed ones, and dense ones of general LLM stacks (plain dtypes, int8, fp8).

The names are known without torch, so that the command line and its help read them from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INT8_TOP = 127


@dataclass(frozen=True)
class Format:
    """A dense cache's dtype, and bytes of a number.

    `scaled`: each token and head has a float16 scale, a 127th of its largest number.
    """

    name: str
    dtype_name: str
    itemsize: int
    scaled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that are kept."""
        import torch

        found = getattr(torch, self.dtype_name)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def bits(self) -> float:
        """Of a number, scales not counted."""
        return 8.0 * self.itemsize

    def store(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Numbers [..., d] in the format, and scales [...] where it has them."""
        if not self.scaled:
            if self.itemsize == 1:  # fp8 has no infinity: beyond its range lies NaN
                import torch

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
        return numbers * self.itemsize + (numbers // head_dim * 2 if self.scaled else 0)


FORMATS = {
    form.name: form
    for form in (
        Format("fp32", "float32", 4),
        Format("fp16", "float16", 2),
        Format("bf16", "bfloat16", 2),
        Format("int8", "int8", 1, scaled=True),
        Format("fp8", "float8_e4m3fn", 1),
    )
}

PEERS = (*(name for name in FORMATS if name != "fp32"), "int4", "quanto4", "quanto2")
"""Names of what accuracy is compared with: see `evaluation.peers`."""

PACKED = "packed"
KINDS = (*FORMATS, PACKED)
"""All kinds of cache, by the names that the command line takes."""
