"""Whether the Triton kernels do on this device what the plain reference does.

Compilers err: Triton 3.6 on an H200 once dropped half of a sum in `pack`, for some shapes alone. So a layer of
each shape that a codec has is packed and asked with random numbers before a cache on a GPU is used. The kernels
are compiled before, many at a time (`compiling`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from turboesm_kernels import dispatch, reference, token_layer
from turboesm_kernels.operands import Held, Joint, PreparedLayer
from turboesm_kernels.prepared import PreparedSide
from turboesm_kernels.reference import TURN, Packed, Rope, SideSpec, rope_frequencies
from turboesm_kernels.token_tables import TokenTables

SEQUENCES, TOKENS = 3, 3 * TURN
RUBBISH = 0xA5
TIES = 5e-3
"""Share of codes and scales that may differ: a number on the edge of two codes goes either way."""

SCALING = 0.75
"""Of queries that are turned."""

TOLERANCE = 1e-2
"""Relative error of attention, the query's and the result's rounding to 16 bits included."""


def problem(
    layers: Sequence[PreparedLayer],
    dtype: torch.dtype = torch.float32,
    sinks: int = 1,
    queries: int = 1,
    parts: int | None = None,
) -> str | None:
    """What is wrong, or None, with keys, values and queries of `dtype` and so many tokens kept whole.

    `queries`: of each key/value head. `parts`: of projections that steps turn (`operands.Joint`), 0 where they are
    in none; or None.

    Of a layer of each shape for which other kernels are compiled, where Triton serves it. Raises
    torch.OutOfMemoryError.
    """
    kinds = kinds_of(layers)
    try:
        if kinds and kinds[0].k.map.is_cuda:
            compile_all(kinds, dtype, sinks, queries, parts)
        return next(filter(None, (layer_problem(layer, dtype, sinks, queries, parts) for layer in kinds)), None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton and its compilers raise anything
        return _does_not_start(error)
    finally:
        _numbers.cache_clear()


def token_problem(tables: TokenTables, dtype: torch.dtype = torch.float32, queries: int = 1) -> str | None:
    """The same of a layer that keeps tokens: attention over tokens of all kinds, in sequences of three lengths."""
    heads, kinds, dim = tables.k.shape
    generator, device = torch.Generator().manual_seed(0), tables.k.device
    q = (torch.randn(SEQUENCES, heads, queries, dim, generator=generator) / math.sqrt(dim)).to(dtype)
    ids = torch.randint(kinds, (SEQUENCES, TOKENS), generator=generator)
    ids = ids.to(torch.uint8 if kinds <= 256 else torch.int16)
    lengths = torch.tensor([TOKENS, TOKENS - 7, 1], dtype=torch.int32)
    unmasked = torch.tensor([1.0, 0.9, 0.8])
    rope = Rope.at(torch.arange(TOKENS), rope_frequencies(dim, torch.device("cpu")))
    wide: dict[str, Any] = {name: x.cpu().double() for name, x in vars(tables).items() if isinstance(x, Tensor)}
    expected = token_layer.attend_tokens(q.double(), ids, replace(tables, **wide), unmasked, rope, lengths)
    try:
        there = Rope(rope.cos.to(device), rope.sin.to(device))
        found = token_layer.attend_tokens(
            q.to(device), ids.to(device), tables, unmasked.to(device), there, lengths.to(device)
        ).cpu()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return _does_not_start(error)
    off = ((found.double() - expected).norm() / expected.norm()).item()
    return None if off <= TOLERANCE else f"attention over tokens is off by {off:.2g} of the plain result"


def _does_not_start(error: Exception) -> str:
    return f"a kernel does not compile or start ({type(error).__name__}: {error})"


def kinds_of(layers: Iterable[PreparedLayer]) -> list[PreparedLayer]:
    """One layer of each kind for which other kernels are compiled, of those that Triton serves."""
    served = (layer for layer in layers if not (layer.k.spec.residual_axes or layer.v.spec.residual_axes))
    return list({(_kind(layer.k), _kind(layer.v)): layer for layer in served}.values())


def compile_all(
    kinds: Sequence[PreparedLayer], dtype: torch.dtype, sinks: int, queries: int = 1, parts: int | None = None
) -> None:
    """Compile the kernels of all layers side by side. What fails here counts if the check fails, too."""
    from turboesm_kernels import compiling

    with suppress(Exception):
        compiling.compile_ahead(lambda: [KernelRun.of(layer, dtype, sinks, queries, parts) for layer in kinds])


def _kind(side: PreparedSide) -> Hashable:
    """What decides which kernels are compiled for a side."""
    spec = side.spec
    fields = None if side.fields is None else side.fields.shape
    widest = max(profile.widths[0] for profile in spec.profiles)
    return (
        side.picks.shape, fields, side.pieces.shape, side.table.shape, widest, side.grid is None, side.centred,
        spec.centre_at is None, spec.scale,
    )  # fmt: skip


@dataclass(frozen=True)
class KernelRun:
    """What the kernels made of random numbers: k, v [B, H, s + T, d] put into `held`; attention of q over it."""

    k: Tensor
    v: Tensor
    held: Held
    q: Tensor
    attention: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls, layer: PreparedLayer, dtype: torch.dtype, sinks: int, queries: int = 1, parts: int | None = None
    ) -> KernelRun:
        dim, device = layer.k.head_dim, layer.k.centre.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        shape = (SEQUENCES, layer.k.spec.heads, sinks + TOKENS, dim)
        k, v = (_as_projected(shape, layer, dtype) for _ in range(2))
        held = _blank(layer, sinks)
        q = _as_projected((*shape[:2], queries, dim), layer, dtype) / math.sqrt(dim)
        joint = None
        if parts is not None and held.v.tiled and layer.k.spec.centre_at is None:
            joint = _joint_of(q, k[:, :, -1:], v[:, :, -1:], parts)
            assert held.rope is not None
            newest = held.rope.rows(slice(TOKENS - 1, TOKENS))
            q, k = (newest.rotate(q) * SCALING).to(dtype), k.clone()
            k[:, :, -1:] = newest.rotate(k[:, :, -1:]).to(dtype)
        return cls(k, v, held, q, [*_pack(q, k, v, layer, held, joint), *_attend(q, held, layer)])


@torch.no_grad()
def layer_problem(
    layer: PreparedLayer, dtype: torch.dtype, sinks: int, queries: int = 1, parts: int | None = None
) -> str | None:
    """What is wrong with a layer's codes, else with its attention, or None.

    Then with that of a sequence whose weights rise by 8 octaves after a block: there the fast path has to empty
    its sums, whatever the codes are, since the first query is 0. Those of other queries shrink by other factors.
    """
    run = KernelRun.of(layer, dtype, sinks, queries, parts)
    for x, kept in ((run.k, run.held.sink_k), (run.v, run.held.sink_v)):
        if kept is not None and not torch.equal(kept, x[:, :, :sinks].to(kept.dtype)):
            return "the kernel that packs does not keep the first tokens whole"
    differing = max(
        _differing(layer.k, run.held.k, reference.compress(run.k[:, :, sinks:], layer.k.spec, run.held.rope)),
        _differing(layer.v, run.held.v, reference.compress(run.v[:, :, sinks:], layer.v.spec)),
    )
    if differing > TIES:
        return f"the kernel that packs gives other codes than the plain reference for {differing:.1%} of values"
    if (reason := _wrong_attention(run.q, run.attention, run.held, layer)) or run.held.v.scales is None:
        return reason
    rising, scales = run.q.clone(), run.held.v.scales
    rising[0] *= torch.arange(queries, device=rising.device)[:, None]
    scales[0, :, :TURN], scales[0, :, TURN:] = 0, 255
    return _wrong_attention(rising, _attend(rising, run.held, layer), run.held, layer)


def _wrong_attention(q: Tensor, attention: Sequence[Tensor], held: Held, layer: PreparedLayer) -> str | None:
    expected = dispatch.plain_attend(q.double(), held, layer)
    for found in attention:
        error = ((found.double() - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE:
            return f"the attention kernel is off by {error:.2g} of the plain reference's result"
    return None


def _attend(q: Tensor, held: Held, layer: PreparedLayer) -> list[Tensor]:
    """Attention as each kernel does it that may serve the layer: the fast path has one for ranges of one block,
    and one for grouped queries."""
    if dispatch.choose(q, held, layer) != "ptx":
        return [dispatch.attend(q, held, layer)]
    from turboesm_kernels import ptx_launch

    ways = (False, True) if _can_group(q, held, layer) else (False,)
    return [ptx_launch.attend(q, held, layer, chunk, grouped) for grouped in ways for chunk in (TURN, TOKENS)]


def _blank(layer: PreparedLayer, sinks: int) -> Held:
    """A cache of `TOKENS` packed tokens, full of rubbish."""
    dim, device = layer.k.head_dim, layer.k.centre.device
    frequencies = rope_frequencies(dim, device) * (
        layer.k.spec.centre_at is None
    )  # learned positions turn nothing
    rope = Rope.at(torch.arange(TOKENS, device=device) + sinks, frequencies)
    if device.type == "cuda":  # kernels read these before they wait for earlier work
        rope.ready()
        layer.k.ready()
        layer.v.ready()
        torch.cuda.synchronize(device)
    whole = torch.full((2, SEQUENCES, layer.k.spec.heads, sinks, dim), torch.nan, device=device).half()
    lengths = torch.full((SEQUENCES,), sinks + TOKENS, dtype=torch.int32, device=device)
    k, v = _blank_side(layer.k.spec, False), _blank_side(layer.v.spec, dispatch.keeps_tiles(layer))
    return Held(k, v, rope, lengths, *(whole if sinks else (None, None)))


def _blank_side(spec: SideSpec, tiled: bool) -> Packed:
    codes, scales = (
        torch.full(shape, RUBBISH, dtype=torch.uint8, device=spec.centre.device)
        for shape in (spec.codes_shape(SEQUENCES, TOKENS, tiled), (SEQUENCES, spec.heads, TOKENS))
    )
    return Packed(codes, None if spec.scale == "none" else scales)


def _joint_of(q: Tensor, k: Tensor, v: Tensor, parts: int) -> Joint:
    """A projection of q [B, K, Q, d], k and v [B, K, 1, d] before RoPE; where `parts`, as an exact sum of them."""
    shared, queries = q.shape[1:3]
    product = torch.cat((q.flatten(1, 2), k[:, :, 0], v[:, :, 0]), 1).flatten(1)[:, None]
    if parts:
        shares = [0.5**part for part in range(1, parts)]
        product = torch.stack([product.float() * share for share in (*shares, 0.5 ** (parts - 1))])
    return Joint(product, (shared * queries, shared), SCALING, q.dtype)


def _pack(q: Tensor, k: Tensor, v: Tensor, layer: PreparedLayer, held: Held, joint: Joint | None) -> list[Tensor]:
    """Attention, after packing in two calls: a prompt's tokens, then one of each sequence as steps do it.

    Where there is `joint`, that one's projection, with it as well, and that is what is left.
    """
    from turboesm_kernels.pack import pack

    assert held.lengths is not None
    starts = held.lengths - 1
    pack(k[:, :, :-1], v[:, :, :-1], layer, held, 0)
    newest = q, k[:, :, -1:], v[:, :, -1:]
    grouped = _can_group(q, held, layer)
    found = [dispatch.append_and_attend(*newest, held, layer, starts)]
    if grouped:
        from turboesm_kernels import ptx_launch

        found.append(ptx_launch.append_and_attend(*newest, held, layer, starts, grouped=True))
    if joint is None:
        return found
    from turboesm_kernels import ptx_launch

    for together in (False, True) if grouped else (False,):
        for chunk in (TURN, TOKENS):
            _spoil(held)
            own = chunk, together
            found.append(ptx_launch.append_and_attend(*joint.sides, held, layer, starts, *own, joint=joint))
    return found


def _spoil(held: Held) -> None:
    """Rubbish for the newest token."""
    held.k.codes[:, :, :, -1:] = RUBBISH
    held.v.codes[:, :, :, -1:, :, -1:] = RUBBISH
    for packed in (held.k, held.v):
        if packed.scales is not None:
            packed.scales[:, :, -1:] = RUBBISH


def _can_group(q: Tensor, held: Held, layer: PreparedLayer) -> bool:
    """Whether queries may share products, which so little work does not by itself."""
    if dispatch.choose(q, held, layer) != "ptx":
        return False
    from turboesm_kernels import ptx_launch

    return ptx_launch.can_group(q, layer)


def _differing(side: PreparedSide, found: Packed, wanted: Packed) -> float:
    codes = reference.unpack(found.codes, side.spec) != reference.unpack(wanted.codes, side.spec)
    share = codes.float().mean().item()
    if found.scales is None or wanted.scales is None:
        return share
    apart = (found.scales.int() - wanted.scales.int()).abs() > 1
    return max(share, apart.float().mean().item())


def _as_projected(shape: tuple[int, int, int, int], layer: PreparedLayer, dtype: torch.dtype) -> Tensor:
    """Random numbers [B, H, T, d] as a projection leaves them, tokens before heads: Triton compiles by strides."""
    batch, heads, tokens, dim = shape
    return _random((batch, tokens, heads, dim), layer).to(dtype).transpose(1, 2)


def _random(shape: tuple[int, ...], layer: PreparedLayer) -> Tensor:
    return _numbers(shape, layer.k.centre.device)


@lru_cache(maxsize=8)
def _numbers(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random numbers, the same for all layers: drawing them takes a CPU 20 ms. Nobody writes to them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device)
