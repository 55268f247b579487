"""Kernels compiled for GPUs that are not here: what the interpreter lets pass, and what shared memory they take.

Packing at head_dim 256 takes ten seconds to compile, and is left to `tests/test_kernels.py` on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import Case, in_tiles, make

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from turboesm_kernels import grouped_launch, grouped_text, ptx_launch, triton_launch  # noqa: E402
from turboesm_kernels.arguments import spread  # noqa: E402
from turboesm_kernels.launch import FUSED  # noqa: E402

KIB = 1024
SHARED = {80: 163 * KIB, 90: 227 * KIB}
"""Bytes that a program may have, by compute capability."""
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32"}


def compiled(kernel: Any, capability: int, given: list[Any], named: dict[str, Any]) -> Any:
    """What `launch` would have compiled."""
    kinds, constants, aligned = {}, {}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, given, strict=False)):
        if isinstance(value, torch.Tensor):
            kinds[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            kinds[name] = "fp32"
        else:
            kinds[name] = "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[(index,)] = [["tt.divisibility", 16]]
    for name, value in named.items():
        if name in kernel.arg_names:
            kinds[name], constants[(kernel.arg_names.index(name),)] = "constexpr", value
    options = {name: value for name, value in (named | FUSED).items() if name not in kernel.arg_names}
    source = ASTSource(kernel, kinds, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled there")
@pytest.mark.parametrize(("dim", "capability"), [(64, 90), (128, 80), (256, 80)])
def test_kernels_fit(dim: int, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, list[Any], dict[str, Any]]] = []
    for module in (triton_launch, ptx_launch):
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, *given, **named: calls.append((kernel, spread(given), named))
        )
        monkeypatch.setattr(module, "is_roomy", lambda x: capability >= 90)
    q, held, layer = make(Case(dim=dim, tokens=20, batch=20, ragged=True))
    assert held.lengths is not None
    if dim <= 128:
        held = in_tiles(held)
        step = torch.randn(20, 2, 1, dim)
        monkeypatch.setattr(ptx_launch, "attend_projected", lambda *given: None)
        ptx_launch.append_and_attend(q, step, step, held, layer, held.lengths - 1)
    else:
        triton_launch.project_query(q, held, layer)
    assert calls
    for kernel, given, named in calls:
        assert compiled(kernel, capability, given, named).metadata.shared <= SHARED[capability]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled there")
@pytest.mark.parametrize(("dim", "capability"), [(64, 80), (128, 90)])
def test_grouped_queries_fit(dim: int, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eight warps' shares of the shared memory, and in registers."""
    calls: list[tuple[Any, list[Any], dict[str, Any]]] = []
    monkeypatch.setattr(
        grouped_launch,
        "launch",
        lambda kernel, grid, *given, **named: calls.append((kernel, spread(given), named)),
    )
    q, held, layer = make(Case(tokens=300, dim=dim, queries=4, ragged=True), room=4)
    for name in ("launch", "launches_early"):
        monkeypatch.setattr(ptx_launch, name, lambda *given, **named: capability >= 90)
    monkeypatch.setattr(triton_launch, "combine", lambda *given: None)
    ptx_launch.attend(q, in_tiles(held), layer, 256, grouped=True)
    (kernel, given, named) = calls[0]
    made = compiled(kernel, capability, given, named)
    assert made.metadata.shared + made.asm["ptx"].count(".local") == 0  # its own is declared in its text
    at = grouped_text.GroupShared(
        64, *(grouped_text.Slots(side.fields.shape, n) for side, n in ((layer.k, 4), (layer.v, 2))), True
    )
    assert grouped_launch.WARPS * (at.size + KIB) <= SHARED[capability]
