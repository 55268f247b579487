"""Kernels compiled and loaded many at a time, each once, before anything is launched.

What a run would compile is recorded without launching it, by Triton's own hook and in Triton's own words
(`specialization_data`), so that what is compiled ahead has the key under which the launch looks. Most of a
compilation lets go of the interpreter's lock, so threads do. What is in Triton's cache on disk is read from there.

Nothing depends on it. What is not there afterwards, for whatever reason, is compiled where it is launched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import triton
from triton.runtime.driver import driver

MOST_THREADS = 16


@dataclass(frozen=True)
class Job:
    """A kernel to compile: a `triton.jit` function, and for what, as Triton writes it (JSON)."""

    kernel: Any
    data: str

    @property
    def arguments(self) -> int:
        """How many it takes: the more, the longer it compiles."""
        return len(json.loads(self.data)["signature"])

    def compile(self) -> None:
        """Compile it, with the code that launches it, and load it."""
        _ = self.kernel.preload(self.data).run


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
    at, use = driver.active.get_current_device(), driver.active.set_current_device
    with ThreadPoolExecutor(min(len(jobs), cores(), MOST_THREADS), initializer=use, initargs=(at,)) as pool:
        return [future.exception() for future in [pool.submit(job.compile) for job in jobs]]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
