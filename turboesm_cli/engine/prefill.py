"""A protein → its prompt encoded, its keys and values packed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from turboesm_cli.cache.cache_file import CachedProtein
from turboesm_cli.cache.packed import PackedCache
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.engine.prompts import Prompt
from turboesm_cli.models import forward
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.archive import to_bytes
from turboesm_cli.outputs.work import Work
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens


@torch.no_grad()
def cache_protein(model: Model, spec: CodecSpec, protein: Protein, cached: int, room: int = 0) -> PackedCache:
    """The first `cached` tokens of a protein, prefilled into a new cache with room for `room` more."""
    cache = PackedCache(model, spec, 1, cached + room)
    forward.prefill(model, to_tokens([protein], model)[:, :cached], cache)
    return cache


def cache_proteins(
    model: Model, spec: CodecSpec, prompts: Iterable[Prompt], work: Work
) -> Iterator[CachedProtein]:
    """Each protein's prompt in a cache of its own, from `work` where it is saved there."""
    for index, prompt in enumerate(prompts):
        data = work.piece(str(index))
        if data is None:
            data = to_bytes(cache_protein(model, spec, prompt.protein, prompt.cached).tensors)
        yield CachedProtein(prompt.protein, prompt.cached, data)
