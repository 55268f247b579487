"""Kernels that are compiled before they are launched: under the launch's key, and once.

The GPU is not here: nothing is launched, and Triton compiles for one of capability 9.0.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Case, make_spec

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from turboesm_kernels import compiling, dispatch, ptx_launch, verify  # noqa: E402
from turboesm_kernels.gated import gated_silu  # noqa: E402
from turboesm_kernels.operands import Held, Joint, PreparedLayer  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled there")


@dataclass(frozen=True)
class Elsewhere:
    """In place of Triton's driver: a GPU that is not here, for which kernels are compiled."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return -1

    def set_current_device(self, device: int) -> None:
        assert device == -1

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that kernels are compiled for, and never launched on; an empty cache on disk."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        triton.JITFunction,
        "__getitem__",
        lambda kernel, grid: lambda *args, **named: kernel.run(*args, grid=grid, warmup=True, **named) and None,
    )
    compiling.driver.set_active(Elsewhere(GPUTarget("cuda", 90, 32)))
    yield
    compiling.driver.set_active(None)  # the next to ask gets the machine's own


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of kernels that this process compiled, rather than found in the cache on disk."""
    names: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **named: Any) -> None:
        if not cache_hit:
            names.append(src.fn.__name__)

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    return names


def gates(*widths: int) -> Callable[[], object]:
    """Launches of a small kernel, one for each width."""
    return lambda: [gated_silu(torch.zeros(1, 2 * width)) for width in widths]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [None, 1, 3])
def test_all_that_is_launched_is_compiled(
    parts: int | None, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kernels of a layer, under the keys of launches; where steps turn projections, too."""

    def of_joint(joint: Joint, held: Held, layer: PreparedLayer, starts: torch.Tensor) -> torch.Tensor:
        return ptx_launch.append_and_attend(*joint.sides, held, layer, starts, joint=joint)

    monkeypatch.setattr(dispatch, "choose", lambda *given: "ptx")
    monkeypatch.setattr(dispatch, "keeps_tiles", lambda layer: True)
    monkeypatch.setattr(dispatch, "append_and_attend", ptx_launch.append_and_attend)
    monkeypatch.setattr(dispatch, "append_and_attend_joint", of_joint)
    monkeypatch.setattr(ptx_launch, "launches_early", lambda q: True)
    case = Case(kind="flat-uniform", bits=2 if parts is None else 2 + parts)
    layer = PreparedLayer.of(make_spec("k", case), make_spec("v", case))

    def run() -> None:
        verify.KernelRun.of(layer, torch.bfloat16, 1, queries=4, parts=parts)

    jobs = compiling.missing(run)
    names = [job.kernel.fn.__name__ for job in jobs]
    assert {"append_and_project_kernel", *([] if parts else ["pack_kernel", "combine_kernel"])} <= set(names)
    assert {"fast_attend_split_kernel", "fast_attend_group_kernel"} <= set(names)
    assert len(set(jobs)) == len(jobs)
    for (
        job
    ) in jobs:  # one after another: in threads one failed once in a run of all tests, and would be tried again
        job.kernel.preload(job.data)
    assert sorted(compiled) == sorted(names)
    assert compiling.missing(run) == []
    run()
    assert len(compiled) == len(names)


def test_each_kernel_is_compiled_once(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, both = compiling.missing(gates(24)), compiling.missing(gates(24, 40, 24))
    assert len(first) == 1 and len(both) == 2 and set(first) < set(both)
    compiling.compile_all(first)
    assert compiled == ["gated_silu_kernel"]
    assert set(compiling.missing(gates(24, 40, 24))) == set(both) - set(first)
    compiling.compile_ahead(gates(24, 40))
    gates(24, 40)()
    assert len(compiled) == 2
    monkeypatch.setattr(compiling, "compile_all", None)
    compiling.compile_ahead(gates(24, 40))


def test_what_is_on_disk_is_not_compiled(compiled: list[str]) -> None:
    jobs = compiling.missing(gates(104))
    compiling.compile_all(jobs)
    jobs[0].kernel.device_caches.clear()  # as in another process
    assert compiling.missing(gates(104)) == jobs
    compiling.compile_ahead(gates(104))
    assert compiled == ["gated_silu_kernel"] and compiling.missing(gates(104)) == []


def test_kernels_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(triton.compiler.CompiledKernel, "run", property(lambda kernel: loaded.append(kernel.name)))
    compiling.compile_ahead(gates(120))
    assert loaded == ["gated_silu_kernel"]


def test_other_threads_launch_as_ever(compiled: list[str]) -> None:
    def run() -> None:
        other = threading.Thread(target=gates(56))
        other.start()
        other.join()

    assert compiling.missing(run) == []
    assert compiled == ["gated_silu_kernel"]


class Wrong:
    """A kernel that does not compile."""

    def preload(self, data: str) -> None:
        raise RuntimeError


@dataclass(frozen=True)
class Stuck:
    """A kernel that no child process ends with."""

    kernel: Any
    parent: int

    def preload(self, data: str) -> Any:
        if os.getpid() != self.parent:
            time.sleep(600)
        return self.kernel.preload(data)


def test_what_does_not_compile_is_left_to_its_launch(compiled: list[str]) -> None:
    jobs = compiling.missing(gates(72))
    failed = compiling.compile_all([compiling.Job(Wrong(), "{}"), *jobs])
    assert isinstance(failed[0], RuntimeError)
    gates(72)()
    assert compiled == []  # but in a child


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes that were forked."""
    started: list[int] = []
    fork = os.fork

    def counted() -> int:
        child = fork()
        if child:
            started.append(child)
        return child

    monkeypatch.setattr(os, "fork", counted)
    return started


def test_children_compile_and_are_gone(compiled: list[str], children: list[int]) -> None:
    compiling.compile_ahead(gates(152, 168, 184, 200, 216))
    assert compiled == []
    gates(152, 168, 184, 200, 216)()
    assert compiled == []
    assert children
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_children_that_hang_are_given_up(
    compiled: list[str], children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "PATIENCE", 3.0)
    first, *others = compiling.missing(gates(232, 248, 264))
    stuck = Stuck(first.kernel, os.getpid())
    compiling.compile_all([compiling.Job(stuck, first.data), *others])
    assert compiled == ["gated_silu_kernel"]
    assert children
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_children_that_nobody_waits_for(compiled: list[str], children: list[int]) -> None:
    """Where they are told to vanish, as daemons tell theirs."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        compiling.compile_ahead(gates(312, 328, 344))
    finally:
        signal.signal(signal.SIGCHLD, before)
    gates(312, 328, 344)()
    assert children and compiled == []


@pytest.mark.parametrize("patience", [1.0, 30.0])
def test_one_process_at_a_time_compiles(
    patience: float, compiled: list[str], children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait for it, and not forever; what it has compiled then is on disk."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(compiling, "PATIENCE", patience)
    widths = [int(360 + patience), int(400 + patience), int(440 + patience)]
    jobs = compiling.missing(gates(*widths))
    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True)
    with (folder / "turboesm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(compiling.compile_all, jobs)
            time.sleep(0.5)
            assert not children
            if patience > 2:
                compiling.in_children(jobs)
                mine = len(children)
                fcntl.flock(lock, fcntl.LOCK_UN)
            waiting.result()
    assert compiled == [] and len(children) == (mine if patience > 2 else min(3, compiling.cores()))


def test_where_no_process_may_be_forked_threads_compile(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", fork)
    compiling.compile_ahead(gates(280, 296))
    gates(280, 296)()
    assert compiled == ["gated_silu_kernel"] * 2
