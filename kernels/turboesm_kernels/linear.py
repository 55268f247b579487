# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""Products of few rows with a layer's weights, as a decode step has them: what counts is reading the weights.

A library's kernel begins to read them when the kernel before has ended. These ask the second-level cache for their
own part of them first, and then wait. Where nothing but a sum follows, the depth is split among programs, and what
comes next (`add_norm`, `rotate`, `append_and_project_kernel`) adds the parts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboesm_kernels.launch import early_launch, launch, launches_early
from turboesm_kernels.prepared import padded

MOST_ROWS = 64
"""Rows up to which these kernels are the faster ones (H100, 1280 to 5120 channels)."""

DTYPES = (torch.float16, torch.bfloat16)

ALIGNMENT = 8
"""Channels: 16 bytes."""

COLUMN_BLOCK = 64

PART_BLOCK, WHOLE_BLOCK = 64, 128
"""Channels that are multiplied at once, in parts and in a whole product."""

PROGRAMS = 240
"""That the columns of a product are split among at least, where the depth allows it."""

LEAST_DEPTH, MOST_PARTS = 320, 8
"""Channels that a part has at least; parts at most."""

AHEAD = 384
"""Channels on their way at once, where shared memory has room for them."""

LINE = tl.constexpr(64)
"""Channels of a line of the second-level cache."""

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # tanh z = 1 - 2 / (1 + exp 2 z)
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * z)))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, x_r, weight, bias, out, rows,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr, ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr, DEPTH_BLOCK: tl.constexpr, LINES: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[s] = the part of x weight^T + bias that channels from s PART on give; bias is in the first.

    x float16 or bfloat16 [R, K], rows x_r apart, weight like it, dense [N, K]; bias any float [N]; out any float
    [S, R, N]. ACTIVATION, of one part alone: a name of `ACTIVATIONS`, of the product rounded as x. LINES: those of
    a row's part, padded. Program (n, r, s): block n of columns, block r of rows.
    """
    column = tl.program_id(0) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    row = tl.program_id(1) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    split = tl.program_id(2)
    own, live = column < WIDTH, row < rows
    weight_row = weight + column.to(tl.int64)[:, None] * DEPTH
    first = split * PART
    if EARLY:
        line = tl.minimum(first + tl.arange(0, LINES) * LINE, DEPTH - 1)
        asked = tl.minimum(column, WIDTH - 1).to(tl.int64)[:, None] * DEPTH + line[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", ((weight + asked).to(tl.int64, bitcast=True),),
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    total = tl.zeros((ROW_BLOCK, COLUMN_BLOCK), tl.float32)
    if HAS_BIAS:
        constant = tl.load(bias + column, mask=own, other=0.0).to(tl.float32)
        total += tl.where(split == 0, constant, 0.0)[None, :]
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for block in range(0, PART, DEPTH_BLOCK):
        depth = first + block + tl.arange(0, DEPTH_BLOCK)
        there = depth < DEPTH
        w = tl.load(weight_row + depth[None, :], mask=own[:, None] & there[None, :], other=0.0)
        at = x + row.to(tl.int64)[:, None] * x_r + depth[None, :]
        total = tl.dot(tl.load(at, mask=live[:, None] & there[None, :], other=0.0), tl.trans(w), total)
    if ACTIVATION != "none":
        total = _activated(total.to(x.dtype.element_ty).to(tl.float32), ACTIVATION)
    target = out + (split * rows + row).to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & own[None, :])


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels are for x [..., K] and weight [N, K]: few rows in 16 bits, channels that line up."""
    depth = x.shape[-1]
    few = x.numel() > 0 and _serves(x.numel() // depth, depth, x.dtype)
    return few and weight.dtype == x.dtype and weight.is_contiguous()


def _serves(rows: int, depth: int, dtype: torch.dtype) -> bool:
    return rows <= MOST_ROWS and depth % ALIGNMENT == 0 and dtype in DTYPES


def parts_for(rows: int, width: int, depth: int, dtype: torch.dtype) -> int:
    """Parts that `linear_parts` makes of such a product, or 0 where it is not for it."""
    return parts_of(width, depth) if _serves(rows, depth, dtype) else 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x weight^T + bias), like x, [..., N]; x, weight as in `serves`, bias float [N].

    `activation` is a name of `ACTIVATIONS`, "gelu" that with the error function. One launch, nothing synchronized.
    Raises ValueError where shapes do not agree or there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    out = torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, 1, activation)
    return out


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Parts float32 [S, ..., N] whose sum is x weight^T + bias; the rest as in `linear`."""
    parts = parts_of(len(weight), x.shape[-1])
    out = torch.empty((parts, *x.shape[:-1], len(weight)), dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, out, parts, "none")
    return out


@lru_cache(maxsize=1024)
def parts_of(width: int, depth: int) -> int:
    """Parts of a product of `width` columns, each of whole blocks of the depth."""
    wanted = min(MOST_PARTS, depth // LEAST_DEPTH, -(-PROGRAMS // -(-width // COLUMN_BLOCK)))
    return -(-depth // part_size(depth, max(1, wanted)))


def part_size(depth: int, parts: int) -> int:
    """Channels of one of `parts`, in whole blocks."""
    block = _block(parts)
    return -(-depth // (parts * block)) * block


def _block(parts: int) -> int:
    return WHOLE_BLOCK if parts == 1 else PART_BLOCK


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, parts: int, activation: str) -> None:
    width, depth = weight.shape
    if x.shape[-1] != depth or not serves(x, weight) or (bias is not None and bias.shape != (width,)):
        raise ValueError(f"no product of {x.dtype} {list(x.shape)} and {weight.dtype} {list(weight.shape)} here")
    flat = x.reshape(-1, depth)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, part = len(flat), part_size(depth, parts)
    row_block = padded(rows)
    early = launches_early(x)
    launch(
        linear_kernel, (-(-width // COLUMN_BLOCK), -(-rows // row_block), parts),
        flat, flat.stride(0), weight, weight if bias is None else bias, out, rows,
        WIDTH=width, DEPTH=depth, PART=part, ROW_BLOCK=row_block, COLUMN_BLOCK=COLUMN_BLOCK,
        DEPTH_BLOCK=_block(parts), LINES=padded(-(-part // LINE.value), 1), ACTIVATION=activation,
        HAS_BIAS=bias is not None, EARLY=early, num_warps=4,
        num_stages=_stages(x.device, row_block, _block(parts)), **early_launch(early),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _stages(device: torch.device, row_block: int, block: int) -> int:
    """Blocks of depth on their way at once: as many as shared memory has room for, of those that are wanted."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    room = int(getattr(properties, "shared_memory_per_block_optin", 0))  # not told by every backend
    return max(1, min(-(-AHEAD // block) + 1, room // (2 * block * (row_block + COLUMN_BLOCK))))
