"""Launching Triton kernels at little cost to the host.

`kernel[grid](...)` looks at each argument anew to find the compiled kernel: 51 us for the 86 arguments of `pack`,
three times what the launch itself takes (H100). A prefill of a few tokens would wait for that.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor

from turboesm_kernels.arguments import Fixed, kind, spread
from turboesm_kernels.available import capability, on_nvidia

ROOMY = (9, 10)
"""Compute capabilities whose programs may have 227 KB of shared memory; those before and others 99 or 163."""

FUSED = {"enable_fp_fusion": True}
"""Products are added to sums in one rounding, as all kernels were measured; Triton 3.10 will not by default."""

compiled_kernels: dict[Hashable, tuple[Any, list[Any]]] = {}
"""By kernel, device, kinds of arguments and constants: what Triton compiled, and those constants in its order."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """`kernel[grid](*args, **named)`: `named` are options and all constexprs, which come last.

    Arguments may be given as `Fixed`. A kernel that was launched before for arguments of the same kinds is
    launched directly. Then Triton looks at nothing again: neither its settings nor globals that the kernel uses,
    which must stay as they were.
    """
    if not isinstance(kernel, triton.JITFunction):  # the interpreter's
        kernel[grid](*spread(args), **named)
        return
    if torch.version.hip:  # compiled by another rule
        kernel[grid](*spread(args), **named, **FUSED)
        return
    kinds = [x.number if type(x) is Fixed else kind(x) for x in args]
    key = (id(kernel), torch.cuda.current_device(), *kinds, *named, *named.values())
    if (found := compiled_kernels.get(key)) is None:
        given = spread(args)
        if (compiled := kernel[grid](*given, **named, **FUSED)) is not None:
            compiled_kernels[key] = compiled, [named[name] for name in kernel.arg_names[len(given) :]]
        return
    compiled, constants = found
    pointers = [y for x in args for y in (x.addresses if type(x) is Fixed else (x,))]
    compiled[(*grid, 1, 1)[:3]](*pointers, *constants)


def processors(q: Tensor) -> int:
    """Multiprocessors of the query's device."""
    return torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1


def is_roomy(q: Tensor) -> bool:
    """Whether a program on the query's device may have more than 200 KB of shared memory, as on Hopper."""
    return not q.is_cuda or capability(q.device)[0] in ROOMY


def launches_early(q: Tensor) -> bool:
    """Whether a kernel may be launched while the one before it still runs (Hopper's programmatic launch)."""
    return on_nvidia(q) and capability(q.device) >= (9, 0)


def early_launch(early: bool) -> dict[str, bool]:
    """The launch option that lets a kernel start while the one before it still runs."""
    return {"launch_pdl": True} if early else {}
