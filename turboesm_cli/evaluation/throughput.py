"""Tokens per second of whole models, and the memory they take, for each kind of cache.

A batch is prefilled with random residues up to the context's last token; that token is then decoded again and
again: on a GPU one CUDA graph of the whole step, language-model head and sampling included, of an autoregressive
model over its whole vocabulary and greedily. Sequences are full and of one length, which spares the dense caches a
mask that they would need otherwise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.engine.batch import LOOK_EVERY, Graph, Stepper
from turboesm_cli.engine.jobs import new_cache
from turboesm_cli.engine.memory_plan import PREFILL_TOKENS, RESERVED, sequence_bytes
from turboesm_cli.evaluation import timing
from turboesm_cli.evaluation.rows import Coded
from turboesm_cli.models.protocol import Model
from turboesm_cli.models.sampling import Sampling, draw, residue_logits, sample, sample_tokens

REPEATS = 20
PREFILLS = 3
PREFILLING, STEPPING = 1e6, 4e6
"""Microseconds that prefills and a GPU's steps are measured for, where `PREFILLS` and `ROWS` of them take less."""

ROWS = 3

TRIES = 6
WARM_STEPS = 2
"""After a first one: one as it is, and one that is captured (`Graph`)."""


@dataclass(frozen=True)
class Load:
    """B sequences of `context` tokens."""

    batch: int
    context: int


class AnyKind(Protocol):
    """What is measured: one of our caches, or a peer.

    form    kind of cache
    name    in tables
    recipe  as results name it
    """

    @property
    def form(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def recipe(self) -> Coded | str: ...


@dataclass(frozen=True)
class Kind:
    """A kind of cache (`formats.KINDS`), the codec where it is packed, and the name it goes by in tables."""

    form: str
    spec: CodecSpec
    name: str

    @classmethod
    def of(cls, form: str, spec: CodecSpec) -> Kind:
        """Any codec of the model serves for a dense kind: it tells the model's shape."""
        recipe = spec.recipe
        packed = recipe.typed
        return cls(form, spec, packed if form == "packed" else form)

    @property
    def recipe(self) -> Coded | str:
        """As results name it."""
        return self.spec.recipe if self.form == "packed" else self.form

    def nbytes(self, context: int) -> int:
        """Bytes of one sequence."""
        return sequence_bytes(self.spec.size, self.form, context)


@dataclass(frozen=True)
class Throughput:
    """What one kind of cache does under a load.

    step          microseconds of a decode step
    first_token   microseconds from tokens to the first decoded token of all sequences, kernels and graph there
    prefill_peak  most bytes in use at once until then, weights included; on a CPU of the process
    peak          likewise, decoding included
    held          bytes of the cache
    """

    kind: AnyKind
    load: Load
    step: timing.Timing
    first_token: timing.Timing
    prefill_peak: int
    peak: int
    held: int

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch."""
        return self.load.batch / self.step.median * 1e6


def sweep(
    model: Model, kinds: Sequence[Kind], loads: Sequence[Load], memory: int, skipped: Callable[[str], None]
) -> Iterator[Throughput]:
    """Measure each kind under each load that fits in `memory` bytes; `skipped` hears of those that do not."""
    for load in loads:
        for kind in kinds:
            what = f"{kind.name}, {load.batch} x {load.context}"
            if load.batch * kind.nbytes(load.context) > memory * (1 - RESERVED):
                skipped(f"{what}: the cache alone does not fit in memory")
                continue
            try:
                yield measure(model, kind, load)
            except torch.OutOfMemoryError:
                skipped(f"{what}: out of memory")
            free_memory(model.device)


@torch.no_grad()
def measure(model: Model, kind: Kind, load: Load, repeats: int = REPEATS, prefills: int = PREFILLS) -> Throughput:
    """One kind of cache under one load, prefilled `prefills` times, or up to `repeats` while it is quick.

    All is done once before: kernels are compiled and chosen, and the step captured, as the engine has them for
    every prompt but a run's first.
    """
    device = model.device
    tokens = model.alphabet.random(load.batch, load.context).to(device)
    cache = new_cache(model, kind.spec, kind.form, load.batch, load.context)
    free_memory(device)  # of what checked the kernels
    if isinstance(cache, DenseCache):
        cache.is_full = True
    stepper = Stepper(model, cache)
    step = Graph(_step(stepper, tokens), cache, 0)

    def first_token() -> None:
        cache.truncate(0)
        _prefill(stepper, tokens)
        step()

    first_token()
    for _ in range(WARM_STEPS):  # captured with all sequences past the sinks
        cache.rewind()
        step()

    first = first_tokens(first_token, device, repeats, prefills)
    prefill_peak = peak_memory(device)
    cache.rewind()
    steps = decode_steps(step, cache.rewind, device, repeats)
    return Throughput(kind, load, steps, first, prefill_peak, peak_memory(device), cache.nbytes)


def _step(stepper: Stepper, tokens: Tensor) -> Callable[[], None]:
    """Decode the last of tokens [B, T] and sample from the LM head: the likeliest of all tokens, or a residue."""
    last, chances = tokens[:, -1].contiguous(), draw(0, len(tokens)).to(tokens.device)
    model = stepper.model

    def step() -> None:
        hidden = stepper.step(last)
        if model.causal:
            sample_tokens(model.logits(hidden), chances, Sampling(temperature=0))
        elif model.has_lm_head:
            sample(model.alphabet, residue_logits(model, hidden), chances, Sampling())

    return step


def _prefill(stepper: Stepper, tokens: Tensor) -> None:
    """All but the last token of each sequence, so many sequences at once as the engine takes."""
    each = max(1, PREFILL_TOKENS // tokens.shape[1])
    for start in range(0, len(tokens), each):
        stepper.prefill(start, list(tokens[start : start + each, :-1]))


def first_tokens(
    first_token: Callable[[], object], device: torch.device, repeats: int, prefills: int
) -> timing.Timing:
    """Of `prefills` prefills with a step after each, or up to `repeats` while they are quick."""
    return timing.Timing.of(_repeated(first_token, device, prefills, repeats, PREFILLING))


def _repeated(
    call: Callable[[], object], device: torch.device, least: int, most: int, microseconds: float
) -> list[float]:
    """Microseconds of each of `least` calls, or of up to `most` that fit into so many microseconds."""
    took = [timing.once(call, device)]
    more = max(least, min(most, int(microseconds / took[0]))) - 1
    return took + [timing.once(call, device) for _ in range(more)]


def decode_steps(
    step: Callable[[], object], rewind: Callable[[], object], device: torch.device, repeats: int
) -> timing.Timing:
    """Of the step alone, rewound each time; the first four warm up and capture.

    On a GPU of so many in a row as `decode` waits for at once; of `repeats` rows, or fewer that take long.
    """
    on_gpu = device.type == "cuda"
    row = LOOK_EVERY if on_gpu else 1

    def steps() -> None:
        for _ in range(row):
            step()
            rewind()

    for _ in range(4):
        step()
        rewind()
    rows = _repeated(steps, device, min(ROWS, repeats) if on_gpu else repeats, repeats, STEPPING)
    return timing.Timing.of([took / row for took in rows])


def largest_batch(model: Model, kind: Kind, context: int, memory: int, planned: int) -> Throughput | None:
    """The largest batch found whose peak stays within `memory` bytes, from the planned one on; None for none.

    What is beside the model grows with the batch: each try is where the one before says that memory is full.
    """
    free_memory(model.device)
    fixed = peak_memory(model.device)
    if fixed >= memory:
        return None
    best: Throughput | None = None
    too_many = math.inf
    batch = max(1, planned)
    for _ in range(TRIES):
        try:
            found = measure(model, kind, Load(batch, context), repeats=5, prefills=1)
            wanted = int((memory - fixed) / max(1, found.peak - fixed) * batch)
        except torch.OutOfMemoryError:
            found, wanted = None, int(batch * 0.9)
        free_memory(model.device)
        if found is not None and found.peak <= memory:
            best = found
            wanted = int(min(max(wanted, batch), too_many - 1))
        else:
            too_many = min(too_many, batch)
            wanted = max(best.load.batch if best else 1, min(wanted, batch - 1))
        if wanted == batch or (best is not None and wanted <= best.load.batch * 1.005) or wanted < 1:
            break
        batch = wanted
    return best


def free_memory(device: torch.device) -> None:
    """Give freed memory back and forget the peak, so that the next peak is of one measurement."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # on Linux the peak starts anew
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since `free_memory`: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0
