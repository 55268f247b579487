"""Kernels compiled and loaded many at a time, each once, before anything is launched.

What a run would compile is recorded without launching it, by Triton's own hook and in Triton's own words
(`specialization_data`), so that what is compiled ahead has the key under which the launch looks. What is in
Triton's cache on disk is read from there. A third of a compilation is Python, which threads would do one after
another: child processes compile what is not on disk, and leave it there.

Nothing depends on it. What is not there afterwards, for whatever reason, is compiled where it is launched.
"""

from __future__ import annotations

import json
import os
import select
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import triton
from triton.compiler import ASTSource
from triton.runtime.driver import driver

MOST_AT_ONCE = 16
PATIENCE = 30.0
"""Seconds: the longest compilation takes a third of it on a slow machine that is busy."""


@dataclass(frozen=True)
class Job:
    """A kernel to compile: a `triton.jit` function, and for what, as Triton writes it (JSON)."""

    kernel: Any
    data: str

    @property
    def arguments(self) -> int:
        """How many it takes: the more, the longer it compiles."""
        return len(json.loads(self.data)["signature"])

    def compiled(self) -> Any:
        """Triton's compiled kernel, from the cache on disk where that has it."""
        return self.kernel.preload(self.data)


def compile_ahead(run: Callable[[], object]) -> None:
    """Compile what `run` would. Raises nothing but what `run` does.

    `run` has to launch kernels in this thread and to depend on nothing that they compute: they are not launched
    unless they are in memory.
    """
    if not triton.knobs.runtime.interpret and (jobs := missing(run)):
        compile_all(jobs)


def missing(run: Callable[[], object]) -> list[Job]:
    """What `compile_ahead` of `run` would compile or load: each kernel once, those that take longest first."""
    found: dict[Job, None] = {}
    caller, before = get_ident(), triton.knobs.runtime.jit_cache_hook

    def record(*, fn: Any, compile: dict[str, Any], **named: Any) -> bool | None:
        if get_ident() != caller:
            return before and before(fn=fn, compile=compile, **named)
        found[Job(fn.jit_function, compile["specialization_data"])] = None
        return True

    triton.knobs.runtime.jit_cache_hook = record
    try:
        run()
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    return sorted(found, key=lambda job: -job.arguments)


def compile_all(jobs: Sequence[Job]) -> list[BaseException | None]:
    """Compile and load side by side: what each fails with. Its launch tries again, and says why."""
    kernels = from_disk(jobs)
    absent = [job for job in jobs if job not in kernels]
    if len(absent) > 1 and hasattr(os, "fork"):
        in_children(absent)
    at, use = driver.active.get_current_device(), driver.active.set_current_device
    with ThreadPoolExecutor(min(len(jobs), cores(), MOST_AT_ONCE), initializer=use, initargs=(at,)) as pool:
        loading = [pool.submit(load, job, kernels.get(job)) for job in jobs]
        return [future.exception() for future in loading]


def load(job: Job, kernel: Any) -> None:
    """Load a kernel onto the GPU, with the code that launches it, compiled or read first where it is None."""
    _ = (kernel or job.compiled()).run


def from_disk(jobs: Sequence[Job]) -> dict[Job, Any]:
    """Those that Triton's cache on disk has, read and not yet loaded."""
    found: dict[Job, Any] = {}
    caller, make = get_ident(), ASTSource.make_ir

    def refuse(*given: Any, **named: Any) -> Any:
        if get_ident() != caller:
            return make(*given, **named)
        raise FileNotFoundError

    ASTSource.make_ir = refuse  # where a compilation begins
    try:
        for job in jobs:
            with suppress(Exception):
                found[job] = job.compiled()
    finally:
        ASTSource.make_ir = make
    return found


@dataclass(frozen=True)
class _NoDriver:
    """Triton's driver for a child, which may compile for a GPU but not ask for it."""

    device: int

    def get_current_device(self) -> int:
        return self.device


def in_children(jobs: Sequence[Job]) -> None:
    """Compile in forked processes, which touch no GPU, the first jobs first.

    Gives up where none has ended for `PATIENCE`: a fork may wait forever for a thread that it lacks.
    """
    stand_in = _NoDriver(driver.active.get_current_device())
    (taken, given), (ended, ends) = os.pipe(), os.pipe()
    os.write(given, bytes(range(min(len(jobs), 256))))
    os.close(given)
    children: list[int] = []
    try:
        with warnings.catch_warnings(), suppress(OSError):  # fewer where there may be no more processes
            warnings.simplefilter("ignore", DeprecationWarning)
            for _ in range(min(len(jobs), cores(), MOST_AT_ONCE)):
                if (child := os.fork()) == 0:
                    _compile_and_exit(jobs, stand_in, taken, ends)
                children.append(child)
        os.close(ends)
        while select.select([ended], [], [], PATIENCE)[0] and os.read(ended, 1):
            pass
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(taken)
        os.close(ended)


def _compile_and_exit(jobs: Sequence[Job], stand_in: _NoDriver, taken: int, ends: int) -> None:
    """What a child does: take a job's number, compile it, tell that it has ended; until there are no more."""
    try:
        driver.set_active(stand_in)
        while number := os.read(taken, 1):
            with suppress(Exception):
                jobs[number[0]].compiled()
            os.write(ends, number)
    finally:
        os._exit(0)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
