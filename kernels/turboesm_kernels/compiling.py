"""Kernels compiled many at a time, each once, before anything is launched.

What a run would compile is recorded without launching it, by Triton's own hook and in Triton's own words
(`specialization_data`), so that what is compiled ahead has the key under which the launch looks. Most of a
compilation lets go of the interpreter's lock, and a sixth does not: on a few cores threads do as well.
On many, `python -m turboesm_kernels.compiling` imports Triton and the kernels once, without a GPU and without the
caller's `__main__`, and forks workers, which fill Triton's cache on disk.

Nothing depends on it. What is not compiled afterwards, for whatever reason, is compiled where it is launched.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import get_ident
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

MOST_WORKERS = 16
LEAST_WORKERS, LEAST_JOBS = 8, 32
"""For fewer, threads are done before processes (2 s to start) would be."""

PATIENCE = 60.0
"""Seconds that a worker may take for a kernel; the slowest take a few."""

POLL = 0.25
"""Seconds between looks at whether the process that asked still lives."""


@dataclass(frozen=True)
class Job:
    """A kernel to compile: a `triton.jit` function of a module, and for what, as Triton writes it (JSON)."""

    module: str
    name: str
    data: str

    @property
    def kernel(self) -> Any:
        """The function."""
        return getattr(importlib.import_module(self.module), self.name)

    @property
    def arguments(self) -> int:
        """How many it takes: the more, the longer it compiles."""
        return len(json.loads(self.data)["signature"])

    def compile(self) -> None:
        """Compile it, or read it from Triton's cache on disk."""
        self.kernel.preload(self.data)


class _NotCachedError(Exception):
    pass


class _Cached(ASTSource):  # type: ignore[misc]
    """What Triton finds in its cache on disk, or fails to compile."""

    def make_ir(self, *args: Any, **named: Any) -> Any:
        raise _NotCachedError


def compile_ahead(run: Callable[[], object]) -> None:
    """Compile what `run` would, where it is not in Triton's cache on disk. Raises nothing but what `run` does.

    `run` has to launch kernels in this thread and to depend on nothing that they compute: they are not launched
    unless they are in memory.
    """
    if triton.knobs.runtime.interpret or not (jobs := missing(run)):
        return
    workers = min(len(jobs), cores(), MOST_WORKERS)
    if workers >= LEAST_WORKERS and len(jobs) >= LEAST_JOBS:
        with suppress(OSError, subprocess.SubprocessError):
            in_processes(jobs, workers)
    in_threads(jobs, workers)


def missing(run: Callable[[], object]) -> list[Job]:
    """The kernels that `run` would compile, each once, those that take longest first. See `compile_ahead`."""
    found: dict[Job, None] = {}
    caller, before = get_ident(), triton.knobs.runtime.jit_cache_hook
    target = driver.active.get_current_target()

    def record(*, fn: Any, compile: dict[str, Any], **named: Any) -> bool | None:
        if get_ident() != caller:
            return before and before(fn=fn, compile=compile, **named)
        data = compile["specialization_data"]
        source = _Cached(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        options = json.loads(data)["options"].items()
        as_given = {name: tuple(value) if isinstance(value, list) else value for name, value in options}
        try:
            triton.compile(source, target=target, options=as_given)
        except _NotCachedError:
            found[Job(fn.module, fn.name, data)] = None
        return True

    triton.knobs.runtime.jit_cache_hook = record
    try:
        run()
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    return sorted(found, key=lambda job: -job.arguments)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(jobs: Sequence[Job], workers: int) -> None:
    """Compile side by side, or read from the disk. What fails is left to its launch, which says why."""
    at, use = driver.active.get_current_device(), driver.active.set_current_device
    with ThreadPoolExecutor(workers, initializer=use, initargs=(at,)) as pool:
        for job in jobs:
            pool.submit(job.compile)


def in_processes(jobs: Sequence[Job], workers: int) -> None:
    """Have workers fill Triton's cache on disk.

    Raises OSError or subprocess.TimeoutExpired where no process can be started or one hangs.
    """
    given = {
        "parent": os.getpid(),
        "workers": workers,
        "target": vars(driver.active.get_current_target()),
        "jobs": [asdict(job) for job in jobs],
    }
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_CACHE_DIR": str(triton.knobs.cache.dir),
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryFile("w+") as file:
        json.dump(given, file)
        file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(PATIENCE * -(-len(jobs) // workers))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Elsewhere:
    """In place of Triton's driver: a GPU that is not here, for which kernels are compiled."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """By which Triton keeps kernels in memory: no GPU's number."""
        return -1

    def set_current_device(self, device: int) -> None:
        """There is but one."""

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched on it."""
        return 0


def main() -> None:
    """Compile the jobs of standard input, as `in_processes` writes them, while the process that asked lives."""
    given = json.load(sys.stdin)
    driver.set_active(Elsewhere(GPUTarget(**given["target"])))
    jobs = [Job(**job) for job in given["jobs"]]
    triton.runtime.cache.triton_key()  # Triton's own bytes, half a GB; forked workers know it
    _ = [job.kernel.cache_key for job in jobs]
    with ProcessPoolExecutor(given["workers"], multiprocessing.get_context("fork")) as pool:
        waiting = {pool.submit(Job.compile, job) for job in jobs}
        while waiting:
            _, waiting = wait(waiting, POLL)
            if os.getppid() != given["parent"]:
                os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
