"""The caches that ours is measured against: keys and values as they are, in a plain dtype, int8 or fp8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from turboesm_kernels import reference
from turboesm_kernels.reference import Rope

from turboesm_cli.cache.formats import Format
from turboesm_cli.cache.ragged import Ragged
from turboesm_cli.models.protocol import Model

FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Backends of torch's attention, the fastest at one query per sequence first (see `bench kernels`)."""

MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Those that take a mask of any shape."""


class DenseCache(Ragged):
    """Keys and values [layers, 2, B, H, capacity, d] in one format.

    `is_full` promises that all sequences hold `capacity` tokens when they attend: then a GPU needs no mask.
    """

    def __init__(self, model: Model, batch: int, capacity: int, form: Format) -> None:
        super().__init__(batch, capacity, model.device)
        self.form = form
        self.is_full = False
        shape = (model.shape.layers, 2, batch, model.shape.key_value_heads, capacity, model.shape.head_dim)
        self._store = torch.zeros(shape, dtype=form.dtype, device=model.device)
        self._scales = torch.zeros(shape[:-1], dtype=torch.float16, device=model.device) if form.scaled else None
        self._index = torch.zeros(batch, dtype=torch.int64, device=model.device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._store.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def leading(self, length: int) -> dict[str, Tensor]:
        """See `Ragged`."""
        held = {"unmasked": self.unmasked, "store": self._store[:, :, :, :, :length]}
        return held if self._scales is None else held | {"scales": self._scales[:, :, :, :, :length]}

    def rows(self, start: int, stop: int) -> Self:
        """Sequences start..stop - 1: a view of the same memory."""
        part = super().rows(start, stop)
        if part is self:
            return self
        part._store = self._store[:, :, start:stop]
        part._index = self._index[start:stop]
        part._scales = None if self._scales is None else self._scales[:, :, start:stop]
        return part

    def begin(self, counts: int | Sequence[int]) -> None:
        """Make room for the next tokens of each sequence."""
        super().begin(counts)
        self._index.copy_(self.starts)

    def append(self, layer: int, k: Tensor, v: Tensor, tokens: Tensor) -> None:
        """Store keys and values [B, H, T, d] of the tokens int64 [B, T] that were begun."""
        for side, x in enumerate((k, v)):
            codes, scales = self.form.store(x)
            self._put(self._store[layer, side], codes)
            if self._scales is not None and scales is not None:
                self._put(self._scales[layer, side], scales)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of q [B, H, Q, d] over all that `layer` holds; result like q.

        Computed in q's dtype; on a GPU two 16-bit dtypes meet in the cache's, which then is read as it is.
        """
        reach = self.capacity if q.is_cuda else self.length
        asked = q.dtype
        if q.is_cuda and {asked, self.form.dtype} == {torch.float16, torch.bfloat16}:
            q = q.to(self.form.dtype)
        scales = (None, None) if self._scales is None else self._scales[layer, :, :, :, :reach]
        k, v = (
            self.form.load(codes, own, q.dtype)
            for codes, own in zip(self._store[layer, :, :, :, :reach], scales, strict=True)
        )
        if not q.is_cuda:
            return reference.attend(q, k, v, None if self.is_even else self.lengths)
        mask = None
        if not self.is_full:
            mask = (torch.arange(reach, device=q.device) < self.lengths[:, None])[:, None, None]
        with sdpa_kernel(FASTEST if mask is None else MASKED, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).to(asked)

    def _put(self, into: Tensor, x: Tensor) -> None:
        """x [B, H, T, ...] where each sequence goes on."""
        if x.shape[2] > 1:
            start = self.common_start()
            into[:, :, start : start + x.shape[2]] = x
        else:
            index = self._index.view(-1, *[1] * (x.dim() - 1)).expand(x.shape)
            if x.dtype.is_floating_point and x.element_size() == 1:  # fp8 has no scatter
                into, x = into.view(torch.uint8), x.view(torch.uint8)
            into.scatter_(2, index, x)


class DenseCodec:
    """What a dense cache does to keys and values: rounding."""

    def __init__(self, form: Format) -> None:
        self._form = form

    def roundtrip(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values as they come back from the cache."""
        back_k, back_v = (self._form.load(*self._form.store(x), x.dtype) for x in (k, v))
        return back_k, back_v
