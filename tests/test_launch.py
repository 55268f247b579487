"""`launch` finds the kernel that Triton would have found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import BaseBackend  # noqa: E402
from turboesm_kernels import launch as launching  # noqa: E402
from turboesm_kernels.launch import kind, launch  # noqa: E402

libtriton = pytest.importorskip("triton._C.libtriton")

EDGES = [-(2**31) - 1, -(2**31), -1, 0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**31 + 16, 2**62, 2**63, 2**64 - 16]
integers = st.sampled_from(EDGES) | st.integers(-(2**33), 2**64 - 1)
views = st.builds(
    lambda dtype, start: torch.zeros(64, dtype=dtype)[start:],
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int32]),
    st.integers(0, 33),
)


@pytest.mark.skipif(not hasattr(libtriton, "native_specialize_impl"), reason="another version of Triton")
@given(st.lists(integers | views | st.floats()))
@example(EDGES)
def test_what_triton_tells_apart_has_another_kind(arguments: list[object]) -> None:
    seen: dict[object, object] = {}
    for x in arguments:
        told = libtriton.native_specialize_impl(BaseBackend, x, False, True, True)
        assert seen.setdefault(kind(x), told) == told


@triton.jit
def copy_kernel(source, step, count, target, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """target[i] = factor source[i step], i < count."""
    i = tl.arange(0, BLOCK)
    x = tl.load(source + i.to(tl.int64) * step, mask=i < count)
    tl.store(target + i, x * factor, mask=i < count)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_launches_of_all_kinds_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each twice: compiled, then found. What is found must be right for other numbers and another place."""
    cases = [
        (dtype, start, step, count, block)
        for dtype in (torch.float32, torch.float16)
        for start in (0, 1)
        for step in (1, 2, 16)
        for count in (1, 32, 33)
        for block in (64, 128)
    ]

    def check(case: tuple[torch.dtype, int, int, int, int], factor: float) -> None:
        dtype, start, step, count, block = case
        source = torch.randn(start + 1024, device="cuda").to(dtype)[start:]
        target = torch.full((count,), float("nan"), device="cuda", dtype=dtype)
        launch(copy_kernel, (1,), source, step, count, target, factor, BLOCK=block, num_warps=1)
        assert torch.equal(target, source[: count * step : step] * factor)

    for case in cases:
        check(case, 2.0)
    known = dict(launching._compiled)
    monkeypatch.setattr(triton.JITFunction, "run", None)  # what looks at each argument anew
    for case in reversed(cases):
        check(case, 4.0)
    assert launching._compiled == known
