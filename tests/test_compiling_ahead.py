"""Kernels that are compiled before they are launched: under the launch's key, once, whatever becomes of workers.

The GPU is not here: nothing is launched, and Triton compiles for one of capability 9.0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Case, make_spec

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from turboesm_kernels import compiling, dispatch, ptx_launch, verify  # noqa: E402
from turboesm_kernels.compiling import Job  # noqa: E402
from turboesm_kernels.gated import gated_silu  # noqa: E402
from turboesm_kernels.operands import PreparedLayer  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled there")

MISBEHAVING = """
import os, pathlib, signal, time

class hangs:
    cache_key = ""
    def preload(data):
        pathlib.Path(data).write_text(str(os.getpid()))
        time.sleep(600)

class dies(hangs):
    def preload(data):
        os.kill(os.getpid(), signal.SIGKILL)
"""


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
    compiling.driver.set_active(compiling.Elsewhere(GPUTarget("cuda", 90, 32)))
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
def test_workers_compile_what_is_launched(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels of a layer, under the keys of launches in another process."""
    monkeypatch.setattr(dispatch, "choose", lambda *given: "ptx")
    monkeypatch.setattr(dispatch, "append_and_attend", ptx_launch.append_and_attend)
    monkeypatch.setattr(ptx_launch, "launches_early", lambda q: True)
    case = Case(kind="flat-uniform", bits=2)
    layer = PreparedLayer.of(make_spec("k", case), make_spec("v", case))

    def run() -> None:
        verify.KernelRun.of(layer, torch.bfloat16, 1)

    jobs = compiling.missing(run)
    names = [job.name for job in jobs]
    assert {"pack_kernel", "append_and_project_kernel", "fast_attend_split_kernel", "combine_kernel"} <= set(names)
    assert len(set(jobs)) == len(jobs)
    compiling.in_processes(jobs, 2)
    assert not compiled
    assert compiling.missing(run) == []
    run()
    assert not compiled


def test_only_what_is_not_on_disk_is_compiled(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, both = compiling.missing(gates(24)), compiling.missing(gates(24, 40, 24))
    assert len(first) == 1 and len(both) == 2 and set(first) < set(both)
    compiling.in_threads(first, 2)
    assert compiled == ["gated_silu_kernel"]
    assert set(compiling.missing(gates(24, 40, 24))) == set(both) - set(first)
    compiling.compile_ahead(gates(24, 40))
    gates(24, 40)()
    assert len(compiled) == 2
    for starts in ("in_threads", "in_processes"):
        monkeypatch.setattr(compiling, starts, None)
    compiling.compile_ahead(gates(24, 40))


def test_other_threads_launch_as_ever(compiled: list[str]) -> None:
    def run() -> None:
        other = threading.Thread(target=gates(56))
        other.start()
        other.join()

    assert compiling.missing(run) == []
    assert compiled == ["gated_silu_kernel"]


def of_many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "LEAST_JOBS", 1)
    monkeypatch.setattr(compiling, "LEAST_WORKERS", 1)


@pytest.mark.parametrize("python", ["/bin/false", "/no/such/python", "hangs"])
def test_where_no_worker_runs(
    python: str, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nsleep 600\n")
    hangs.chmod(0o755)
    of_many_cores(monkeypatch)
    monkeypatch.setattr(compiling, "PATIENCE", 0.5)
    monkeypatch.setattr(sys, "executable", str(hangs) if python == "hangs" else python)
    width = 72 + 16 * len(python)
    compiling.compile_ahead(gates(width))
    assert compiled == ["gated_silu_kernel"]
    gates(width)()
    assert compiled == ["gated_silu_kernel"]


def test_a_worker_that_dies(tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.syspath_prepend(tmp_path)
    jobs = [Job("misbehaving", "dies", ""), *compiling.missing(gates(88))]
    compiling.in_processes(jobs, 2)
    compiling.in_threads(jobs[1:], 2)
    assert compiling.missing(gates(88)) == []
    assert len(compiled) <= 1


PARENT = """
from triton.backends.compiler import GPUTarget
from turboesm_kernels import compiling
compiling.driver.set_active(compiling.Elsewhere(GPUTarget("cuda", 90, 32)))
compiling.in_processes([compiling.Job("misbehaving", "hangs", {!r})] * 2, 2)
"""


def test_workers_end_with_who_asked(tmp_path: Path) -> None:
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    told = tmp_path / "worker"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(str(told))], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        until(lambda: told.exists() and bool(told.read_text()))
        worker = told.read_text()
        assert runs(worker)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not runs(worker))


def runs(process: str) -> bool:
    """Whether a process is there, and not only for its parent to ask how it ended."""
    try:
        return Path("/proc", process, "cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)
