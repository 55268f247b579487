"""Launching Triton kernels at little cost to the host.

`kernel[grid](...)` looks at each argument anew to find the compiled kernel: 70 us for the 100 arguments of `pack`,
four times what the launch itself takes. A prefill of a few tokens would wait for that.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor

ALIGNMENT = 16
"""What Triton compiles for apart: pointers (bytes) and integers that are multiples of it."""

_compiled: dict[Hashable, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """`kernel[grid](*args, **named)`: `args` those that vary, `named` the constexprs, all of them, and options.

    A kernel compiled before for arguments of the same kinds is launched directly.
    """
    if not isinstance(kernel, triton.JITFunction):  # the interpreter's
        kernel[grid](*args, **named)
        return
    key = (id(kernel), torch.cuda.current_device(), *map(kind, args), *named, *named.values())
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, **named)
    else:
        compiled[(*grid, 1, 1)[:3]](*args, *[named[name] for name in kernel.arg_names[len(args) :]])


def kind(x: object) -> Hashable:
    """What Triton may compile a kernel for of an argument: its own distinctions, or finer ones."""
    if type(x) is int:
        return x == 1, x % ALIGNMENT == 0, x >> 31
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % ALIGNMENT == 0
    return type(x).__name__
