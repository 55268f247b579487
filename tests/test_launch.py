"""`launch` finds the kernel that Triton would have found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import BaseBackend  # noqa: E402
from turboesm_kernels import launch as launching  # noqa: E402
from turboesm_kernels.arguments import Fixed, kind  # noqa: E402
from turboesm_kernels.launch import launch  # noqa: E402

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


class Stub:
    """In place of a JITFunction: what it and its compiled kernels are launched with."""

    arg_names = ("x", "n", "SIZE", "FLAG")

    def __init__(self) -> None:
        self.looked_up: list[tuple[object, ...]] = []
        self.launched: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Stub.Compiled]:
        def run(*args: object, **named: object) -> Stub.Compiled:
            self.looked_up.append((grid, args, named))
            return Stub.Compiled(self, len(self.looked_up))

        return run

    class Compiled:
        def __init__(self, kernel: Stub, number: int) -> None:
            self.kernel, self.number = kernel, number

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args: self.kernel.launched.append((self.number, grid, args))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A kernel that nothing was launched of."""
    monkeypatch.setattr(triton, "JITFunction", Stub)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "compiled_kernels", {})
    return Stub()


def test_what_was_launched_before_is_launched_directly(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    launch(stub, (3,), x, 7, SIZE=32, FLAG=True, num_warps=4)
    launch(stub, (5, 2), x[16:], 9, FLAG=True, SIZE=32, num_warps=4)  # in another order: another key
    launch(stub, (5, 2), x[16:], 9, SIZE=32, FLAG=True, num_warps=4)
    named = {"SIZE": 32, "FLAG": True, "num_warps": 4, "enable_fp_fusion": True}
    assert stub.looked_up[0] == ((3,), (x, 7), named)
    (number, grid, (found, *rest)) = stub.launched[-1]  # type: ignore[misc]
    assert (number, grid, rest) == (1, (5, 2, 1), [9, 32, True])
    assert found.data_ptr() == x[16:].data_ptr()
    before = len(stub.launched)
    for args, given_by_name in (
        ((x, 16), {"SIZE": 32, "FLAG": True, "num_warps": 4}),
        ((x, 1), {"SIZE": 32, "FLAG": True, "num_warps": 4}),
        ((x[1:], 7), {"SIZE": 32, "FLAG": True, "num_warps": 4}),
        ((x.int(), 7), {"SIZE": 32, "FLAG": True, "num_warps": 4}),
        ((x, 7), {"SIZE": 64, "FLAG": True, "num_warps": 4}),
        ((x, 7), {"SIZE": 32, "FLAG": False, "num_warps": 4}),
        ((x, 7), {"SIZE": 32, "FLAG": True, "num_warps": 8}),
        ((x, 7), {"SIZE": 32, "FLAG": True}),
        ((x, 7), {"FLAG": 32, "SIZE": True, "num_warps": 4}),
    ):
        launch(stub, (3,), *args, **given_by_name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(stub, (3,), x, 7, SIZE=32, FLAG=True, num_warps=4)
    assert len(stub.launched) == before


def test_fixed_tensors_are_launched_by_address(stub: Stub) -> None:
    x = torch.zeros(64)
    stub.arg_names = ("before", "x", "y", "after", "SIZE")  # type: ignore[assignment]
    pairs = [(x, x[16:]), (x[32:], x[4:]), (x[1:], x), (x, x[1:]), (x.half(), x), (x, x)]
    kept = [Fixed(pair) for pair in pairs]
    for fixed in kept:
        launch(stub, (1,), 5, fixed, 6, SIZE=32)
    assert [args for _, args, _ in stub.looked_up] == [(5, *kept[i].values, 6) for i in (0, 2, 3, 4)]
    found = [(5, *(own.data_ptr() for own in fixed.values), 6, 32) for fixed in (kept[1], kept[5])]
    assert stub.launched == [(1, (1, 1, 1), args) for args in found]


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
        for step in (16, 2, 1)
        for count in (1, 32, 100)
        for block in (128, 64)
    ]

    def check(case: tuple[torch.dtype, int, int, int, int], factor: float) -> None:
        dtype, start, step, count, block = case
        source = torch.randn(start + 2048, device="cuda").to(dtype)[start:]
        target = torch.full((count,), float("nan"), device="cuda", dtype=dtype)
        launch(copy_kernel, (1,), source, step, count, target, factor, BLOCK=block, num_warps=block // 64)
        expected = source[: count * step : step] * factor
        expected[block:] = float("nan")  # what a kernel of that block leaves
        assert torch.equal(target.nan_to_num(7.0), expected.nan_to_num(7.0))

    for case in cases:
        check(case, 2.0)
    known = dict(launching.compiled_kernels)
    monkeypatch.setattr(triton.JITFunction, "run", None)  # what looks at each argument anew
    for case in reversed(cases):
        check(case, 4.0)
    assert launching.compiled_kernels == known
