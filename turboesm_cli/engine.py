"""Decode many proteins at once: finished ones leave the batch, waiting ones enter it.

A batch has slots, rows of one cache that is allocated once. Each step decodes one token of every slot; a slot
whose protein is finished is prefilled with the next one. On a GPU a step is one CUDA graph. Where the device's
memory does not suffice, the batch is halved and the proteins under way start again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from turboesm_cli import decode
from turboesm_cli.cache import PackedCache
from turboesm_cli.dense import DenseCache
from turboesm_cli.model import EsmModel
from turboesm_cli.sequences import PAD

PREFILL_TOKENS = 8192
"""Tokens that are encoded at once when slots are filled: what bounds the workspace of a prefill."""

AnyCache = PackedCache | DenseCache
NewCache = Callable[[int, int], AnyCache]
"""(slots, capacity) -> an empty cache."""


@dataclass(frozen=True)
class Job:
    """Token ids int64 of a protein's prompt; `steps` tokens are decoded after it, `rest` if they are given.

    `held`: a cache of one sequence that holds the prompt already, or None.
    """

    prompt: Tensor
    steps: int
    rest: Tensor | None = None
    held: PackedCache | None = None


class Task(Protocol):
    """What the slots of a batch do in a step. Its tensors stay where they are, for CUDA graphs."""

    def enter(self, slot: int, number: int, job: Job) -> None:
        """Job `number` starts in `slot`."""
        ...

    def step(self, stepper: Stepper) -> None:
        """Decode one token of every slot."""
        ...

    def result(self, slot: int, job: Job) -> Tensor:
        """What the job that ends in `slot` has given."""
        ...


TaskT = TypeVar("TaskT", bound=Task)


class Stepper:
    """A cache's slots, decoded together."""

    def __init__(self, model: EsmModel, cache: AnyCache) -> None:
        self.model, self.cache = model, cache
        self.unmasked = torch.ones(cache.batch, 1, 1, device=model.device)
        self._joint = decode.JointProjection(model, cache.capacity) if model.device.type == "cuda" else None

    def enter(self, start: int, jobs: Sequence[Job]) -> None:
        """Fill the slots from `start` on with prompts."""
        if jobs[0].held is None:
            self.prefill(start, [job.prompt for job in jobs])
            return
        for slot, job in enumerate(jobs, start):
            rows = self.cache.rows(slot, slot + 1)
            if job.held is None or not isinstance(rows, PackedCache):
                raise ValueError("packed caches go on in packed caches only")
            rows.load(job.held.leading(len(job.prompt)), len(job.prompt))
            self.unmasked[slot] = job.held.unmasked[0]

    def prefill(self, start: int, prompts: Sequence[Tensor]) -> Tensor:
        """Encode prompts into the slots from `start` on; final hidden states [n, P, E]."""
        tokens = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_value=PAD)
        tokens = tokens.to(self.model.device)
        rows = self.cache.rows(start, start + len(prompts))
        rows.truncate(0)
        self.unmasked[start : start + len(prompts)] = decode.unmasked_fraction(tokens)
        return decode.prefill(self.model, tokens, rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Decode tokens int64 [slots]: final hidden states [slots, E]."""
        return decode.step(self.model, tokens, self.cache, self.unmasked, self._joint)


class Graph:
    """A step, one token of every slot: as a CUDA graph once all are past the sinks, and before as it is."""

    def __init__(self, step: Callable[[], None], cache: AnyCache, sinks: int) -> None:
        self._step, self._cache, self._sinks = step, cache, sinks
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0

    def __call__(self) -> None:
        if self._cache.lengths.device.type != "cuda" or self._cache.fewest < self._sinks:
            self._step()
            return
        if self._graph is None and self._warm < 2:  # Triton compiles, libraries choose their kernels
            self._warm += 1
            self._step()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
            self._cache.replayed(-1)  # capturing counted, but did nothing
        self._graph.replay()
        self._cache.replayed(1)


class Batch(Generic[TaskT]):
    """Jobs through `slots` slots of `capacity` tokens.

    `new_task` makes the task of a batch of so many slots. `sinks`: tokens at the start that the cache keeps apart.
    `on_shrink` hears of each halving of the batch.
    """

    def __init__(
        self,
        model: EsmModel,
        new_cache: NewCache,
        new_task: Callable[[int], TaskT],
        slots: int,
        capacity: int,
        sinks: int = 0,
        on_shrink: Callable[[int], None] = lambda slots: None,
    ) -> None:
        self._model, self._new_cache, self._new_task = model, new_cache, new_task
        self._slots, self._capacity, self._sinks = slots, capacity, sinks
        self._on_shrink = on_shrink

    @torch.no_grad()
    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Tensor]]:
        """(number of the job, its result) as jobs finish. Jobs are taken when there is a slot for them."""
        waiting = _Queue(jobs)
        while waiting:
            active: dict[int, tuple[int, Job, int]] = {}
            try:
                yield from self._run(waiting, active)
            except torch.OutOfMemoryError:
                if self._slots == 1:
                    raise
                waiting.put_back([(number, job) for number, job, _ in active.values()])
                self._slots //= 2
            else:
                return
            torch.cuda.empty_cache()  # outside the handler, whose traceback holds on to tensors
            self._on_shrink(self._slots)

    def _run(self, waiting: _Queue, active: dict[int, tuple[int, Job, int]]) -> Iterator[tuple[int, Tensor]]:
        slots = min(self._slots, waiting.at_least(self._slots))
        stepper = Stepper(self._model, self._new_cache(slots, self._capacity))
        task = self._new_task(slots)
        graph = Graph(lambda: task.step(stepper), stepper.cache, self._sinks)
        while True:
            self._admit(stepper, task, waiting, active)
            if not active:
                return
            stepper.cache.park([slot for slot in range(slots) if slot not in active], self._sinks)
            graph()
            for slot, (number, job, left) in list(active.items()):
                active[slot] = number, job, left - 1
                if left == 1:
                    result = task.result(slot, job)
                    del active[slot]
                    yield number, result

    def _admit(
        self, stepper: Stepper, task: TaskT, waiting: _Queue, active: dict[int, tuple[int, Job, int]]
    ) -> None:
        """Prefill free slots, neighbours together."""
        free = [slot for slot in range(stepper.cache.batch) if slot not in active]
        if waiting.at_least(1) and len(free) * 8 < stepper.cache.batch and active:
            return  # a prefill serves several slots
        for run in _runs(free):
            while run and waiting.at_least(1):
                entered = waiting.take(run, PREFILL_TOKENS)
                for slot, (number, job) in zip(run, entered, strict=False):
                    active[slot] = number, job, job.steps
                    task.enter(slot, number, job)
                stepper.enter(run[0], [job for _, job in entered])
                run = run[len(entered) :]


class _Queue:
    """Jobs that wait, numbered; those put back come first."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._source = iter(enumerate(jobs))
        self._front: deque[tuple[int, Job]] = deque()

    def __bool__(self) -> bool:
        return self.at_least(1) > 0

    def at_least(self, count: int) -> int:
        """`count`, or how many are left if they are fewer."""
        self._front.extend(islice(self._source, max(0, count - len(self._front))))
        return min(count, len(self._front))

    def put_back(self, jobs: Iterable[tuple[int, Job]]) -> None:
        self._front.extendleft(sorted(jobs, key=lambda item: -item[0]))

    def take(self, run: Sequence[int], tokens: int) -> list[tuple[int, Job]]:
        """Jobs for the slots of `run`: at least one, of at most `tokens` tokens of prompt, padding counted."""
        taken: list[tuple[int, Job]] = []
        longest = 0
        while len(taken) < len(run) and self.at_least(1):
            longest = max(longest, len(self._front[0][1].prompt))
            if taken and (len(taken) + 1) * longest > tokens:
                break
            taken.append(self._front.popleft())
        return taken


def _runs(slots: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as runs of neighbours."""
    return [[slot for _, slot in run] for _, run in groupby(enumerate(slots), lambda pair: pair[1] - pair[0])]


ResultT = TypeVar("ResultT")


def in_order(results: Iterable[tuple[int, ResultT]]) -> Iterator[ResultT]:
    """Numbered results 0, 1, 2, ... in that order; those that come early wait."""
    early: dict[int, ResultT] = {}
    expected = 0
    for number, result in results:
        early[number] = result
        while expected in early:
            yield early.pop(expected)
            expected += 1
