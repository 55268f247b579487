"""Decode attention over packed keys and values: validate, choose a backend, launch.

`attend` runs on the first backend that can: "ptx" (fast path: inline PTX), "triton" (portable), "compiled" (CPU:
loops compiled by numba), "lookup" (CPU: bytes looked up, never unpacked), "torch" (the plain reference). A backend
that is asked for and cannot run raises `BackendError` that says why; none is swapped for another silently. Neither
Triton, numba nor a kernel is imported before one is needed. `append` is the other direction: it packs new tokens
into a cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from turboesm_kernels import cpu_compiled, cpu_lookup, reference
from turboesm_kernels.available import capability, has_triton, on_nvidia
from turboesm_kernels.operands import IN_TILES, Held, Joint, PreparedLayer
from turboesm_kernels.reference import Packed, Rope, SideSpec

if TYPE_CHECKING:
    from turboesm_kernels.pack import Target

Backend = Literal["ptx", "triton", "compiled", "lookup", "torch"]
MAX_QUERIES = 16
HEAD_DIMS = range(8, 257)


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here, or not on these inputs."""


def attend(q: Tensor, held: Held, layer: PreparedLayer, backend: Backend | None = None) -> Tensor:
    """Attention of q over what is held: softmax(q k^T) v, in q's dtype, [B, H, Q, d].

    q float16, bfloat16 or float32 [B, H, Q, d], after RoPE and scaled already; 1 <= Q <= 16, every query sees
    every token held. A sequence of length 0 gets 0. Nothing is copied or synchronized: safe in a CUDA graph.
    Raises ValueError where shapes do not agree, BackendError where `backend` cannot run.
    """
    _validate(q, held, layer)
    return _RUN[choose(q, held, layer, backend)](q, held, layer)


def choose(q: Tensor, held: Held, layer: PreparedLayer, backend: Backend | None = None) -> Backend:
    """The backend that `attend` runs on: the one asked for, or the first that can."""
    if backend is not None:
        if backend not in _UNSUPPORTED:
            raise BackendError(f"no backend {backend!r}; there are {', '.join(_UNSUPPORTED)}")
        if reason := _UNSUPPORTED[backend](q, held, layer):
            raise BackendError(f"backend {backend!r} cannot run: {reason}")
        return backend
    return next(
        name for name, unsupported_reason in _UNSUPPORTED.items() if not unsupported_reason(q, held, layer)
    )


def append(
    k: Tensor, v: Tensor, layer: PreparedLayer, held: Held, start: int | Tensor, backend: Backend | None = None
) -> None:
    """Pack keys (after RoPE) and values float [B, H, n, d] into `held` from token `start` on, sinks counted.

    `start` is one number for all sequences, and those of the tokens that are sinks are kept whole; or it is int
    [B] on the device for n = 1: then nothing is synchronized, so that it is safe in a CUDA graph; where it is a
    sink's, packed token 0 is overwritten. The angles of packed token i are row i of `held.rope`. `backend` "torch"
    packs with the plain reference, "lookup" without compiled loops. Raises ValueError where tokens, or the
    sinks that they go into, do not fit.
    """
    held.check_room(start, k.shape[2])
    if (place := target(layer, held, backend)) is not None:
        place.put(k, v, start)
        return
    if isinstance(start, int) and start < held.sinks:
        batch, heads, _, dim = k.shape
        held.check_sinks(batch, heads, dim)
    if held.v.tiled and not (isinstance(start, int) and start + k.shape[2] <= held.sinks):
        raise BackendError("values in tiles are packed by the kernel for GPUs alone")
    if isinstance(start, int) and start < held.sinks:
        kept = min(held.sinks - start, k.shape[2])
        for x, sinks in ((k, held.sink_k), (v, held.sink_v)):
            assert sinks is not None
            sinks[:, :, start : start + kept] = x[:, :, :kept]
        k, v, start = k[:, :, kept:], v[:, :, kept:], start + kept
        if not k.shape[2]:
            return
    if backend in (None, "compiled") and cpu_compiled.packs(layer, held):
        cpu_compiled.append(k, v, layer, held, start)
        return
    start = start - held.sinks if isinstance(start, int) else (start - held.sinks).clamp_min(0)
    for x, side, into, rope in (
        (k, layer.k, held.k, _rope_from(held, start, k.shape[2])),
        (v, layer.v, held.v, None),
    ):
        if side.bits is None or backend == "torch":
            found = reference.compress(x, side.spec, rope)
        else:
            found = cpu_lookup.compress(x, side, rope)
        put(into.codes, found.codes, start, 3)
        if into.scales is not None and found.scales is not None:
            put(into.scales, found.scales, start, 2)


def target(layer: PreparedLayer, held: Held, backend: Backend | None = None) -> Target | None:
    """What `append` puts tokens into where the kernel for GPUs packs, which serves while buffers stay; or None."""
    if not held.tokens or not _packs_with_triton(held.k.codes, layer, backend):
        return None
    from turboesm_kernels.pack import Target

    return Target.of(layer, held)


def append_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    layer: PreparedLayer,
    starts: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """`append` of each sequence's newest token, k and v [B, H, 1, d], then `attend`.

    `starts` int32 [B] is `held.lengths` less one. On the fast path in fewer launches than one after the other.
    """
    _validate(q, held, layer)
    newest = held.lengths is not None and k.shape[2] == 1
    if newest and choose(q, held, layer, backend) == "ptx" and _packs_with_triton(k, layer, backend):
        from turboesm_kernels import ptx_launch

        return ptx_launch.append_and_attend(q, k, v, held, layer, starts)
    append(k, v, layer, held, starts, backend)
    return attend(q, held, layer, backend)


def append_and_attend_joint(joint: Joint, held: Held, layer: PreparedLayer, starts: Tensor) -> Tensor:
    """`append_and_attend` of what a projection gives before RoPE, on the fast path: [B, K, H / K, d] of its dtype.

    Of a token that is a sink nothing is kept that counts; where there may be any, the sinks' angles have to lie
    before those of packed token 0. `starts` int32 [B] and angles must be older than the kernel that made the
    product. Raises BackendError where the fast path does not serve these inputs, ValueError where they do not fit.
    """
    q, k, v = joint.sides
    _validate(q, held, layer)
    if reason := _no_ptx(q, held, layer):
        raise BackendError(f"a projection before RoPE is for the fast path: {reason}")
    if layer.k.spec.centre_at is not None or held.rope is None or held.lengths is None:
        raise BackendError("a projection before RoPE needs RoPE's angles, and lengths")
    from turboesm_kernels import ptx_launch

    return ptx_launch.append_and_attend(q, k, v, held, layer, starts, joint=joint)


def _packs_with_triton(k: Tensor, layer: PreparedLayer, backend: Backend | None) -> bool:
    plain = layer.k.spec.residual_axes or layer.v.spec.residual_axes or backend == "torch"
    return k.is_cuda and not plain and has_triton()


def _rope_from(held: Held, start: int | Tensor, count: int) -> Rope | None:
    rope = held.rope
    if rope is None:
        return None
    return rope.rows(slice(start, start + count) if isinstance(start, int) else start.long()[:, None, None])


def put(into: Tensor, found: Tensor, start: int | Tensor, dim: int) -> None:
    """Put tokens, which lie along `dim`, where each sequence goes on."""
    if isinstance(start, int):
        into.narrow(dim, start, found.shape[dim]).copy_(found)
    else:
        index = start.long().view(-1, *[1] * (found.dim() - 1)).expand(found.shape)
        into.scatter_(dim, index, found)


def _no_triton(q: Tensor, held: Held, layer: PreparedLayer) -> str | None:
    return _needs_triton(q) or (IN_TILES if held.v.tiled else None)


def _needs_triton(q: Tensor) -> str | None:
    if not has_triton():
        return "Triton is not installed (pip install 'turboesm[gpu]')"
    if not q.is_cuda and not _interpreted():
        return f"it needs a CUDA device, the query is on {q.device} (TRITON_INTERPRET=1 runs it on a CPU)"
    if on_nvidia(q) and capability(q.device) < (8, 0):
        return "it needs compute capability 8.0 or later"
    return None


def _no_ptx(q: Tensor, held: Held, layer: PreparedLayer) -> str | None:
    if reason := _needs_inline_ptx(q):
        return reason
    from turboesm_kernels import ptx_launch

    return ptx_launch.unsupported_reason(q, held, layer)


def _needs_inline_ptx(q: Tensor) -> str | None:
    if reason := _needs_triton(q):
        return reason
    if not q.is_cuda:
        return "the interpreter cannot run inline PTX; use backend 'triton'"
    if not on_nvidia(q):
        return "inline PTX needs an NVIDIA GPU; use backend 'triton'"
    return None


def keeps_tiles(layer: PreparedLayer) -> bool:
    """Whether a cache on the layer's device keeps values in tiles: where the fast path serves the codec."""
    if _needs_inline_ptx(layer.v.map):
        return False
    from turboesm_kernels import ptx_launch

    return ptx_launch.unserved_reason(layer) is None


def _no_lookup(q: Tensor, held: Held, layer: PreparedLayer) -> str | None:
    if q.is_cuda:
        return "it serves CPUs"
    if held.v.tiled:
        return IN_TILES
    if layer.k.bits is None or layer.v.bits is None:
        return "it needs codes on a uniform grid"
    return None


def _no_torch(q: Tensor, held: Held, layer: PreparedLayer) -> str | None:
    return None


_UNSUPPORTED: dict[Backend, Callable[[Tensor, Held, PreparedLayer], str | None]] = {
    "ptx": _no_ptx,
    "triton": _no_triton,
    "compiled": cpu_compiled.unsupported_reason,
    "lookup": _no_lookup,
    "torch": _no_torch,
}


@cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _run_torch(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    """The plain reference: expand everything, then attend in float32, or float64 where q is."""
    return plain_attend(_widened(q), held, layer).to(q.dtype)


def plain_attend(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    """`attend` in plain torch, in q's precision: the oracle of the kernels' tests, given a float64 q."""
    k, v = expand(held, layer)
    result = reference.attend(q, k.to(q.dtype), v.to(q.dtype), held.lengths)
    if held.lengths is None:
        return result
    return result.masked_fill((held.lengths == 0)[:, None, None, None], 0.0)


def expand(held: Held, layer: PreparedLayer) -> tuple[Tensor, Tensor]:
    """All keys and values held, float32 [B, H, s + T, d], by the plain reference."""
    k = reference.expand(held.k, layer.k.spec, _rope(held, layer))
    v = reference.expand(held.v, layer.v.spec)
    if held.sink_k is None or held.sink_v is None:
        return k, v
    return torch.cat((held.sink_k, k), 2), torch.cat((held.sink_v, v), 2)


def _rope(held: Held, layer: PreparedLayer) -> Rope:
    if held.rope is not None:
        return held.rope.rows(slice(held.tokens))
    nothing = layer.k.centre.new_zeros(held.tokens, layer.k.head_dim)
    return Rope(nothing, nothing)


def _run_triton(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    from turboesm_kernels import triton_launch

    return triton_launch.attend(q, held, layer)


def _run_ptx(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    from turboesm_kernels import ptx_launch

    return ptx_launch.attend(q, held, layer)


def _run_compiled(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    return cpu_compiled.attend(q, held, layer).to(q.dtype)


def _run_lookup(q: Tensor, held: Held, layer: PreparedLayer) -> Tensor:
    return cpu_lookup.attend(_widened(q), held, layer).to(q.dtype)


def _widened(q: Tensor) -> Tensor:
    return q if q.dtype == torch.float64 else q.float()


_RUN: dict[Backend, Callable[[Tensor, Held, PreparedLayer], Tensor]] = {
    "ptx": _run_ptx,
    "triton": _run_triton,
    "compiled": _run_compiled,
    "lookup": _run_lookup,
    "torch": _run_torch,
}


def _validate(q: Tensor, held: Held, layer: PreparedLayer) -> None:
    """Raise ValueError where shapes, dtypes or devices do not agree."""
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"the query must be float [B, H, Q, d], not {q.dtype} {tuple(q.shape)}")
    batch, heads, queries, dim = q.shape
    if (heads, dim) != (layer.k.spec.heads, layer.k.head_dim):
        raise ValueError(
            f"the query has {heads} heads of {dim}, the codec {layer.k.spec.heads} of {layer.k.head_dim}"
        )
    if not 1 <= queries <= MAX_QUERIES or dim not in HEAD_DIMS:
        raise ValueError(f"{queries} query tokens of head_dim {dim}: at most {MAX_QUERIES} of 8 to 256 are served")
    _check_codes("key", held.k, layer.k.spec, batch, held.tokens)
    _check_codes("value", held.v, layer.v.spec, batch, held.tokens)
    held.check_sinks(batch, heads, dim)
    if held.lengths is not None and (held.lengths.shape != (batch,) or held.lengths.is_floating_point()):
        raise ValueError(f"lengths must be integers [{batch}], not {held.lengths.dtype} {held.lengths.shape}")
    if layer.k.centred and (held.rope is None or held.rope.cos.shape[0] < held.tokens):
        raise ValueError(f"keys with a centre need RoPE's angles at the {held.tokens} packed tokens' positions")
    tensors = (held.k.codes, held.v.codes, layer.k.map, held.lengths, held.sink_k, held.sink_v)
    if strange := {t.device for t in tensors if t is not None} - {q.device}:
        raise ValueError(f"the query is on {q.device}, other tensors on {', '.join(map(str, strange))}")


def _check_codes(name: str, packed: Packed, spec: SideSpec, batch: int, tokens: int) -> None:
    shape = spec.codes_shape(batch, tokens, packed.tiled and spec.can_tile)
    if packed.codes.shape != shape or packed.codes.dtype != torch.uint8:
        raise ValueError(f"{name} codes must be uint8 {shape}, not {packed.codes.dtype} {packed.codes.shape}")
    if (packed.scales is None) != (spec.scale == "none"):
        raise ValueError(f"{name} scales are {'missing' if packed.scales is None else 'not in this codec'}")
    if packed.scales is not None and packed.scales.shape != (batch, spec.heads, tokens):
        raise ValueError(f"{name} scales must be uint8 {(batch, spec.heads, tokens)}, not {packed.scales.shape}")
