"""Kernels compiled and loaded many at a time, each once, before anything is launched.

What a run would compile is recorded without launching it, by Triton's own hook and in Triton's own words
(`specialization_data`), so that what is compiled ahead has the key under which the launch looks. What is in
Triton's cache on disk is read from there. A third of a compilation is Python, which threads would do one after
another: child processes compile what is not on disk, and leave it there.

Nothing depends on it. What is not there afterwards, for whatever reason, is compiled where it is launched.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock, get_ident
from typing import IO, Any

import triton
from triton.compiler import ASTSource
from triton.runtime.driver import driver

MOST_AT_ONCE = 16
"""Processes, and threads, however many cores there are: each process takes memory."""

PATIENCE = 30.0
"""Seconds: the longest compilation takes a third of it on a slow machine that is busy."""

SIGNALS = {each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")}
"""Those that users and schedulers send."""

_ONE_AT_A_TIME = RLock()
"""Triton has one hook for all threads."""


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
    if triton.knobs.runtime.interpret:
        return
    with _ONE_AT_A_TIME:
        if jobs := missing(run):
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
    if len(jobs) - len(kernels) > 1 and hasattr(os, "fork"):
        with suppress(Exception), _alone() as waited:
            if waited:
                kernels |= from_disk([job for job in jobs if job not in kernels])
            in_children([job for job in jobs if job not in kernels])
    at, use = driver.active.get_current_device(), driver.active.set_current_device
    with ThreadPoolExecutor(min(len(jobs), cores(), MOST_AT_ONCE), initializer=use, initargs=(at,)) as pool:
        loading = [pool.submit(load, job, kernels.get(job)) for job in jobs]
        return [future.exception() for future in loading]


@contextmanager
def _alone() -> Iterator[bool]:
    """While no other process compiles into this cache, or after `PATIENCE` all the same: one for each GPU may.

    Gives whether there was another.
    """
    import fcntl

    waited = False
    with ExitStack() as stack:
        with suppress(OSError):  # where no file can be written, or locked
            folder, until = Path(triton.knobs.cache.dir), time.monotonic() + PATIENCE
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "turboesm.lock").open("w"))
            while time.monotonic() < until:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waited = True
                    time.sleep(0.1)
        yield waited


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
    stand_in, parent = _NoDriver(driver.active.get_current_device()), os.getpid()
    children: list[int] = []
    with ExitStack() as stack:
        pipes = [*zip(os.pipe(), "rw", strict=True), *zip(os.pipe(), "rw", strict=True)]
        taken, given, ended, ends = (stack.enter_context(os.fdopen(fd, f"{way}b", 0)) for fd, way in pipes)
        given.write(bytes(range(min(len(jobs), 256))))
        given.close()
        stack.callback(_end, children)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none unwinds this function in a child
        try:
            with warnings.catch_warnings(), suppress(OSError):  # fewer where there may be no more processes
                warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
                for _ in range(min(len(jobs), cores(), MOST_AT_ONCE)):
                    if (child := os.fork()) == 0:
                        _compile_and_exit(jobs, stand_in, parent, taken, ends)
                    children.append(child)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ends.close()
        told = select.poll()
        told.register(ended, select.POLLIN)
        while told.poll(1000 * PATIENCE) and ended.read(1):
            pass


def _compile_and_exit(
    jobs: Sequence[Job], stand_in: _NoDriver, parent: int, taken: IO[bytes], ends: IO[bytes]
) -> None:
    """What a child does: take a job's number, compile it, tell that it has ended; while there are more."""
    try:
        gc.disable()  # what is the parent's to free may be on the GPU
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        driver.set_active(stand_in)
        while os.getppid() == parent and (number := taken.read(1)):
            with suppress(Exception):
                jobs[number[0]].compiled()
            ends.write(number)
    finally:
        os._exit(0)


def _end(children: Sequence[int]) -> None:
    """Stop those that have not ended."""
    for child in children:
        with suppress(ChildProcessError, ProcessLookupError):
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
