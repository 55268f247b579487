"""Kernels compiled many at a time, each once, before anything is launched.

What a run would compile is recorded without launching it, by Triton's own hook and in Triton's own words
(`specialization_data`), so that what is compiled ahead has the key under which the launch looks. Most of a
compilation lets go of the interpreter's lock, so threads do.

Nothing depends on it. What is not compiled afterwards, for whatever reason, is compiled where it is launched.
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
from triton.compiler import ASTSource
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
    if not triton.knobs.runtime.interpret and (jobs := missing(run)):
        compile_all(jobs)


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
            found[Job(fn.jit_function, data)] = None
        return True

    triton.knobs.runtime.jit_cache_hook = record
    try:
        run()
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    return sorted(found, key=lambda job: -job.arguments)


def compile_all(jobs: Sequence[Job]) -> None:
    """Compile side by side. What fails is left to its launch, which says why."""
    at, use = driver.active.get_current_device(), driver.active.set_current_device
    with ThreadPoolExecutor(min(len(jobs), cores(), MOST_THREADS), initializer=use, initargs=(at,)) as pool:
        for job in jobs:
            pool.submit(job.compile)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
