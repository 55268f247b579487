"""What decoding needs, whether it compares or samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turboesm_cli import console
from turboesm_cli.cache.formats import PACKED

if TYPE_CHECKING:
    from turboesm_cli.codec.bundle import Bundle
    from turboesm_cli.engine.batch import Batch, TaskT
    from turboesm_cli.engine.workload import Workload
    from turboesm_cli.models.protocol import Model
    from turboesm_cli.outputs.work import Work


@dataclass(frozen=True)
class Decoding:
    """All that decoding needs."""

    bundle: Bundle
    model: Model
    work: Workload
    saved: Work
    kv: str
    slots: int
    capacity: int

    def batch(self, new_task: Callable[[int], TaskT], tick: console.Tick) -> Batch[TaskT]:
        """The engine; `tick` hears of decoded tokens."""
        from turboesm_cli.engine.batch import Batch
        from turboesm_cli.engine.jobs import new_cache

        def shrunk(slots: int) -> None:
            console.warn(f"out of memory: the batch is halved to {slots}, and the proteins under way start again")

        return Batch(
            self.model,
            lambda slots, capacity: new_cache(self.model, self.bundle.spec, self.kv, slots, capacity),
            new_task,
            self.slots,
            self.capacity,
            self.bundle.spec.recipe.sinks if self.kv == PACKED else 0,
            on_step=tick,
            on_shrink=shrunk,
        )
