"""The fast path on a CPU: Triton's interpreter runs its kernels, and `ptx_machine` the PTX that is in them.

Programs run one after another, and a kernel after the one before. That it may begin while that one still runs
(programmatic dependent launch) is played by what its programs see: until they wait, all bytes that kernels changed
which need not have ended yet are `POISON`. Bytes that were written as they had been are not known; nor is what a
kernel writes too early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ptx_machine import Warp
from turboesm_kernels.arguments import spread

Bytes = NDArray[np.uint8]
POISON = 0xFF
"""NaN, as float16, bfloat16 or float32; -1."""


@dataclass
class Change:
    """What a kernel made of some bytes of a piece of memory."""

    memory: Bytes
    places: NDArray[np.int64]
    now: Bytes

    def hide(self) -> None:
        self.memory[self.places] = POISON

    def show(self) -> None:
        self.memory[self.places] = self.now


@dataclass
class Device:
    """Memory by address, and the kernel that runs."""

    memory: dict[int, Bytes] = field(default_factory=dict)
    launched: list[str] = field(default_factory=list)
    unfinished: list[Change] = field(default_factory=list)
    early: bool = False
    waited: bool = False
    triggered: bool = False
    orderly: bool = False
    any_waited: bool = False
    warp: Warp | None = None

    def launch(self, kernel: Any, grid: tuple[int, ...], *given: Any, **named: Any) -> None:
        """Run a kernel; what it changes is not there for the next before that waits."""
        operands = spread(given)
        for tensor in (x for x in operands if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self.memory[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        before = {at: memory.copy() for at, memory in self.memory.items()}
        self.early, self.orderly = bool(named.pop("launch_pdl", False)), False
        self.any_waited = False
        kernel[grid](*operands, **named)
        self.end_program()
        assert self.any_waited or not self.early, "nobody waited for what was launched before"
        changes = []
        for at, memory in self.memory.items():
            places = np.flatnonzero(memory != before[at])
            changes.append(Change(memory, places, memory[places]))
        older = [] if self.orderly or not self.early else self.unfinished
        self.unfinished = [*older, *changes]
        self.launched.append(kernel.fn.__name__)

    def begin_program(self) -> None:
        self.end_program()
        self.waited, self.triggered = not self.early, False
        self.warp = None
        if self.early:
            for change in self.unfinished:
                change.hide()

    def end_program(self) -> None:
        for change in self.unfinished:
            change.show()

    def wait(self) -> None:
        """`gdc_wait`: what was launched before has ended."""
        for change in self.unfinished:
            change.show()
        self.waited = self.any_waited = True

    def trigger(self) -> None:
        """`gdc_launch_dependents`: the next kernel begins when all programs have called it, for the first time."""
        if not self.triggered:
            self.orderly |= self.waited
        self.triggered = True

    def run(self, text: str, kinds: str, inputs: Sequence[Any]) -> list[NDArray[Any]]:
        """Inline PTX by the program's warp."""
        if self.warp is None:
            self.warp = Warp()
            for at, memory in self.memory.items():
                self.warp.hold(memory, writable=True, at=at)
        return self.warp.run(text, kinds, *inputs)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Launches of the fast path run here, and nowhere else."""
    import triton
    from triton.runtime import interpreter
    from turboesm_kernels import (
        add_norm,
        grouped_kernels,
        grouped_launch,
        linear,
        pack,
        ptx_kernels,
        ptx_launch,
        rotary,
        triton_kernels,
        triton_launch,
    )

    own = Device()
    place: Callable[..., None] = interpreter.interpreter_builder.set_grid_idx

    def set_grid_idx(*at: int) -> None:
        own.begin_program()
        place(*at)

    def numbered(*bounds: Any) -> Iterator[Any]:
        """What a loop counts in, as a kernel has it."""
        for number in range(*(int(x.handle.data.item()) if hasattr(x, "handle") else x for x in bounds)):
            handle = interpreter.TensorHandle(np.array([number], np.int32), triton.language.int32)
            yield triton.language.tensor(handle, triton.language.int32)

    def create_inline_asm(text: str, kinds: str, handles: list[Any], types: list[Any], *rest: Any) -> Results:
        shape = handles[0].data.shape
        if text.startswith("prefetch"):
            return Results([interpreter.TensorHandle(np.zeros(shape, np.int32), types[0].scalar)])
        found = own.run(text, kinds, [np.broadcast_to(handle.data, shape).reshape(-1) for handle in handles])
        return Results(
            [interpreter.TensorHandle(x.copy(), kind.scalar) for x, kind in zip(found, types, strict=True)]
        )

    tuples = triton.language.core.tuple  # results of PTX; the interpreter leaves Python's own beside them
    monkeypatch.setattr(tuples, "__radd__", lambda mine, other: tuples([*other, *mine]), raising=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", set_grid_idx)
    monkeypatch.setattr(interpreter.interpreter_builder, "create_inline_asm", create_inline_asm)
    replaced: dict[str, object] = {
        "launch": own.launch, "launches_early": lambda x: True,
        "gdc_wait": own.wait, "gdc_launch_dependents": own.trigger,
    }  # fmt: skip
    modules: list[ModuleType] = [ptx_launch, grouped_launch, triton_launch, ptx_kernels, triton_kernels]
    for module in [*modules, grouped_kernels, pack, linear, rotary, add_norm]:
        for name in replaced.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, replaced[name])
    for module in (ptx_kernels, grouped_kernels):
        monkeypatch.setattr(module, "range", numbered, raising=False)
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.language.constexpr):  # which swallow tensors that are added to them
                monkeypatch.setattr(module, name, value.value)
    return own


@dataclass
class Results:
    """What the interpreter asks of an operation with several results."""

    handles: list[Any]

    def get_result(self, number: int) -> Any:
        return self.handles[number]
