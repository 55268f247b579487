"""What decoding needs, whether it compares or samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboesm_cli import console
from turboesm_cli.cache.formats import PACKED
from turboesm_cli.commands.sharding import seal_of

if TYPE_CHECKING:
    from turboesm_cli.codec.bundle import Bundle
    from turboesm_cli.engine.batch import Batch, TaskT
    from turboesm_cli.engine.workload import Workload
    from turboesm_cli.models.protocol import Model
    from turboesm_cli.outputs.shard_records import Seal
    from turboesm_cli.outputs.shards import Shard
    from turboesm_cli.outputs.work import Work


@dataclass(frozen=True)
class Decoding:
    """All that decoding needs; `run`: what the output of the whole follows from."""

    bundle: Bundle
    model: Model
    work: Workload
    saved: Work
    kv: str
    slots: int
    capacity: int
    run: Mapping[str, str] = field(default_factory=dict)
    shard: Shard | None = None

    def seal(self, path: Path, kind: str, extra: Callable[[], Mapping[str, Any]] = dict) -> Seal | None:
        """Writes the record of a shard's output; see `sharding.seal_of`."""
        return seal_of(path, self.run, self.shard, kind, self.work.place, self.saved.devices, extra)

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
