"""Decode many proteins at once: finished ones leave the batch, waiting ones enter it.

A batch has slots, rows of one cache that is allocated once. Each step decodes one token of every slot; a slot
whose protein is finished is prefilled with the next one. On a GPU a step is one CUDA graph. Where the device's
memory does not suffice, the batch is halved and the proteins under way start again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from turboesm_kernels.available import has_triton

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import PACKED
from turboesm_cli.cache.packed import PackedCache, rows_apart
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.engine.memory_plan import PREFILL_TOKENS
from turboesm_cli.models import forward
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.work import Tensors

LOOK_EVERY = 8
"""Steps on a GPU between looks at which sequences have ended: each look waits for the device."""

REHEARSED = 100
"""Tokens of the prompt that kernels are compiled with: a short one takes others (`linear.MOST_ROWS`)."""

CPU_SLOTS = 8
"""Slots of a CPU's batch, which are there however few proteins there are: rows of matrix products have the same
bits whatever the others hold, as long as their number stays (tested in `tests/test_engine.py`)."""

WIDEST = 2048
"""Channels up to which that goes for activations, too: torch cuts longer ones into pieces that end anywhere."""

AnyCache = PackedCache | DenseCache
NewCache = Callable[[int, int], AnyCache]
"""(slots, capacity) -> an empty cache."""


@dataclass(frozen=True)
class Job:
    """Token ids int64 of a protein's prompt; up to `steps` tokens are decoded after it, `rest` if they are given.

    held    gives the tensors of a `PackedCache` that holds the prompt already, or is None
    shared  what other jobs of the same prompt encode, too, or is None
    feed    the token to decode first, where tokens are sampled: the prompt's last one, which `prompt` leaves out
    number  of its prompt, and `sample` of the job among those of that prompt
    """

    prompt: Tensor
    steps: int
    rest: Tensor | None = None
    held: Callable[[], Mapping[str, Tensor]] | None = None
    shared: Shared | None = None
    feed: int | None = None
    number: int = 0
    sample: int = 0

    @property
    def cached(self) -> int:
        """Tokens that are cached of its prompt: a file's caches hold the token that is to be fed, too."""
        return len(self.prompt) + (self.held is not None and self.feed is not None)


@dataclass
class Shared:
    """A prompt that several jobs share: it is encoded once, and `tensors` of the cache copied."""

    tensors: Mapping[str, Tensor] | None = None


class Task(Protocol):
    """What the slots of a batch do in a step. Its tensors stay where they are, for CUDA graphs."""

    def enter(self, slot: int, number: int, job: Job) -> None:
        """Job `number` starts in `slot`."""
        ...

    def step(self, stepper: Stepper) -> None:
        """Decode one token of every slot."""
        ...

    def ended(self) -> Tensor | None:
        """Which slots are done before their steps are, bool [slots]; None where none ever is."""
        ...

    def result(self, slot: int, job: Job) -> Tensors:
        """What the job that ends in `slot` has given, by name."""
        ...


TaskT = TypeVar("TaskT", bound=Task)


class Stepper:
    """A cache's slots, decoded together."""

    def __init__(self, model: Model, cache: AnyCache) -> None:
        self.model, self.cache = model, cache
        self._joint = (
            forward.JointProjection(model, cache.capacity)
            if model.device.type == "cuda" and has_triton()
            else None
        )

    def make_ready(self) -> None:
        """Compile for a GPU what prompts and steps will launch, all at once: they would do it one by one.

        The cache has to be empty, and is left so.
        """
        if self._joint is None or self.cache.capacity < 2:
            return
        from turboesm_kernels import compiling

        prompt = min(REHEARSED, self.cache.capacity - 1)
        compiling.compile_ahead(lambda: self._rehearse(prompt))
        self.cache.rows(0, 1).wipe(prompt + 1)
        self.cache.wipe(1)

    def _rehearse(self, prompt: int) -> None:
        """A prompt of so many tokens and a step, whose numbers are those of memory that nothing was written to."""
        residues = self.model.alphabet.random(self.cache.batch, prompt)
        self.prefill(0, [residues[0]])
        hidden = self.step(residues[:, 0].to(self.model.device))
        if self.model.has_lm_head:
            self.model.logits(hidden)

    def enter(self, start: int, jobs: Sequence[Job]) -> None:
        """Fill the slots from `start` on with prompts."""
        if all(job.held is None and job.shared is None for job in jobs):
            self.prefill(start, [job.prompt for job in jobs])
            return
        self._encode_shared(start, jobs)
        slot = start
        for _, same in groupby(jobs, lambda job: id(job.shared or job)):
            count = len(list(same))
            self._fill(slot, count, jobs[slot - start])
            slot += count

    def _encode_shared(self, start: int, jobs: Sequence[Job]) -> None:
        """Encode prompts that several jobs share, all at once, and keep what the cache holds of each."""
        fresh: dict[int, tuple[Shared, Job]] = {}
        for job in jobs:
            if job.shared is not None and job.shared.tensors is None:
                fresh.setdefault(id(job.shared), (job.shared, job))
        for shared, job in fresh.values():
            if job.held is not None:
                shared.tensors = job.held()
                self._load(start, shared.tensors, job)
        found = [
            (shared, job.prompt) for shared, job in fresh.values() if shared.tensors is None and len(job.prompt)
        ]
        if found:
            self.prefill(start, [prompt for _, prompt in found])
        for slot, (shared, prompt) in enumerate(found, start):
            held = self.cache.rows(slot, slot + 1).leading(len(prompt))
            shared.tensors = {name: tensor.clone() for name, tensor in held.items()}

    def _fill(self, slot: int, count: int, job: Job) -> None:
        """The prompt of a job into its slot, and into those of the next jobs of the same prompt."""
        if job.shared is None:
            if job.held is None:
                raise ValueError("packed caches go on in packed caches only")
            self._load(slot, job.held(), job)
            return
        rows = self.cache.rows(slot, slot + count)
        if job.shared.tensors is not None:
            rows.fill(job.shared.tensors, job.cached)
        rows.truncate(len(job.prompt))

    def _load(self, slot: int, tensors: Mapping[str, Tensor], job: Job) -> None:
        """A prompt's tensors, once they are checked, into its slot. Raises ValueError."""
        rows = self.cache.rows(slot, slot + 1)
        if not isinstance(rows, PackedCache):
            raise ValueError("packed caches go on in packed caches only")
        rows.load(tensors, job.cached)
        rows.truncate(len(job.prompt))

    def prefill(self, start: int, prompts: Sequence[Tensor]) -> Tensor:
        """Encode prompts into the slots from `start` on; final hidden states [n, P, E]."""
        tokens = self.model.alphabet.padded(prompts)
        if not tokens.shape[1]:
            self.cache.rows(start, start + len(prompts)).truncate(0)
            return torch.zeros(len(prompts), 0, self.model.shape.width, device=self.model.device)
        rows = self.cache.rows(start, start + len(prompts))
        rows.truncate(0)
        return forward.prefill(self.model, tokens.to(self.model.device), rows, self._joint)

    def step(self, tokens: Tensor) -> Tensor:
        """Decode tokens int64 [slots]: final hidden states [slots, E]."""
        return forward.step(self.model, tokens, self.cache, self._joint)


class Graph:
    """A step, one token of every slot: as a CUDA graph once all are past the sinks, and before as it is."""

    def __init__(self, step: Callable[[], None], cache: AnyCache, sinks: int) -> None:
        self._step, self._cache, self._sinks = step, cache, sinks
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0

    def __call__(self) -> None:
        on_gpu = self._cache.lengths.device.type == "cuda" and self._cache.fits_a_graph
        if not on_gpu or self._cache.fewest < self._sinks:
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


def prefill_tokens(device: torch.device) -> int:
    """Tokens that a device encodes at once; a CPU encodes each prompt alone, since padding rounds otherwise."""
    return PREFILL_TOKENS if device.type == "cuda" else 0


def cpu_slots(model: Model, spec: CodecSpec, kv: str, wanted: int | None) -> int:
    """Slots on a CPU, where results are to be the same bytes whatever shares the batch.

    A multiple of `CPU_SLOTS`, or 1 where that is wanted, or where a step of this model or cache rounds otherwise
    in other company.
    """
    alike = kv == PACKED and model.dtype == torch.float32 and model.shape.width <= WIDEST
    if wanted == 1 or not alike or not rows_apart(model, spec):
        return 1
    return -(-(wanted or CPU_SLOTS) // CPU_SLOTS) * CPU_SLOTS


@dataclass
class _Active:
    """A job in a slot; `left` steps are still to do."""

    number: int
    job: Job
    left: int


class Batch(Generic[TaskT]):
    """Jobs through `slots` slots of `capacity` tokens.

    `new_task` makes the task of a batch of so many slots. `sinks`: tokens at the start that the cache keeps apart.
    `on_step` hears how many tokens each step decoded (less than none where work is lost and starts again),
    `on_shrink` of each halving of the batch.
    """

    def __init__(
        self,
        model: Model,
        new_cache: NewCache,
        new_task: Callable[[int], TaskT],
        slots: int,
        capacity: int,
        sinks: int = 0,
        on_step: Callable[[int], None] = lambda tokens: None,
        on_shrink: Callable[[int], None] = lambda slots: None,
    ) -> None:
        self._model, self._new_cache, self._new_task = model, new_cache, new_task
        self._slots, self._sinks = slots, sinks
        self._capacity = max(capacity, sinks + 1)  # a slot that nobody uses stands at the end of its sinks
        self._on_step, self._on_shrink = on_step, on_shrink
        on_gpu = model.device.type == "cuda"
        self._look_every = LOOK_EVERY if on_gpu else 1
        self._prefilled = prefill_tokens(model.device)

    @torch.no_grad()
    def run(self, jobs: Iterable[tuple[int, Job]]) -> Iterator[tuple[int, Tensors]]:
        """(number of the job, its result) as jobs finish. Jobs are taken when there is a slot for them."""
        waiting = _Queue(jobs)
        active: dict[int, _Active] = {}
        while True:
            try:
                yield from self._run(waiting, active)
            except torch.OutOfMemoryError:
                if self._slots == 1:
                    raise
            else:
                return
            self._shrink(waiting, active)  # outside the handler, whose traceback holds on to tensors

    def _shrink(self, waiting: _Queue, active: dict[int, _Active]) -> None:
        """Half the slots; jobs under way start again."""
        waiting.put_back([(item.number, item.job) for item in active.values()])
        self._on_step(-sum(item.job.steps - item.left for item in active.values()))
        active.clear()
        self._slots //= 2
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._on_shrink(self._slots)

    def _run(self, waiting: _Queue, active: dict[int, _Active]) -> Iterator[tuple[int, Tensors]]:
        stepper = Stepper(self._model, self._new_cache(self._slots, self._capacity))
        stepper.make_ready()
        task = self._new_task(self._slots)
        graph = Graph(lambda: task.step(stepper), stepper.cache, self._sinks)
        steps = 0
        while True:
            self._admit(stepper, task, waiting, active)
            if not active:
                return
            stepper.cache.park([slot for slot in range(self._slots) if slot not in active], self._sinks)
            graph()
            self._on_step(len(active))
            steps += 1
            ended = task.ended() if steps % self._look_every == 0 else None
            early = ended.tolist() if ended is not None else [False] * self._slots
            for slot, item in list(active.items()):
                item.left -= 1
                if item.left == 0 or early[slot]:
                    self._on_step(item.left)
                    result = task.result(slot, item.job)
                    del active[slot]
                    yield item.number, result

    def _admit(self, stepper: Stepper, task: TaskT, waiting: _Queue, active: dict[int, _Active]) -> None:
        """Prefill free slots, neighbours together, prompts of like length at once: padding is computed, too."""
        free = [slot for slot in range(self._slots) if slot not in active]
        if active and len(free) * 8 < self._slots:
            return  # a prefill serves several slots
        entering = sorted(waiting.take(len(free)), key=lambda item: len(item[1].prompt))
        entered = {
            slot: _Active(number, job, job.steps) for slot, (number, job) in zip(free, entering, strict=False)
        }
        active |= entered  # first of all: what comes now may run out of memory
        for slot, item in entered.items():
            task.enter(slot, item.number, item.job)
        for run in _runs(list(entered)):
            start = run[0]
            for group in _groups([entered[slot].job for slot in run], self._prefilled):
                stepper.enter(start, group)
                start += len(group)


class _Queue:
    """Numbered jobs that wait; those put back come first."""

    def __init__(self, jobs: Iterable[tuple[int, Job]]) -> None:
        self._source = iter(jobs)
        self._front: deque[tuple[int, Job]] = deque()

    def __bool__(self) -> bool:
        if not self._front:
            self._front.extend(islice(self._source, 1))
        return bool(self._front)

    def put_back(self, jobs: Iterable[tuple[int, Job]]) -> None:
        """Jobs that were taken: the lowest number comes first again."""
        self._front.extendleft(sorted(jobs, key=lambda item: -item[0]))

    def take(self, count: int) -> list[tuple[int, Job]]:
        """The next `count` jobs, or as many as there are."""
        taken: list[tuple[int, Job]] = []
        while len(taken) < count and self:
            taken.append(self._front.popleft())
        return taken


def _groups(jobs: Sequence[Job], tokens: int) -> Iterator[list[Job]]:
    """Jobs, shortest prompts first, in groups of at most `tokens` tokens of prompt, or of one prompt.

    Padding is counted; a prompt that jobs share is counted once.
    """
    group: list[Job] = []
    prompts = 0
    for job in jobs:
        more = not group or job.shared is None or job.shared is not group[-1].shared
        if group and more and (prompts + 1) * len(job.prompt) > tokens:
            yield group
            group, prompts = [], 0
        group.append(job)
        prompts += more
    if group:
        yield group


def _runs(slots: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as runs of neighbours."""
    return [[slot for _, slot in run] for _, run in groupby(enumerate(slots), lambda pair: pair[1] - pair[0])]
