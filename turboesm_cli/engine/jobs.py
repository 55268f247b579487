"""Proteins decoded from a cache after their prompts, and what that is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import PackedCache
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.engine.batch import AnyCache, Batch, Job, TaskT
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.work import Tensors, Work
from turboesm_cli.sequences.fasta import Protein


@dataclass(frozen=True)
class Prompt:
    """A protein, how many of its tokens are prompt, and what gives the tensors of a cache of them, or None.

    `alphabet` is that of the model that decodes it.
    """

    protein: Protein
    cached: int
    alphabet: Alphabet
    held: Callable[[], Mapping[str, Tensor]] | None = None

    @property
    def tokens(self) -> Tensor:
        """Ids int64 [T] of the whole protein."""
        return self.alphabet.batch([self.protein.sequence])[0]

    @property
    def length(self) -> int:
        """Tokens of the whole protein."""
        return self.protein.residues + self.alphabet.control

    @property
    def text(self) -> str:
        """The residues that are prompt, as they were read where that is all."""
        if self.cached > self.protein.residues:
            return self.protein.sequence
        return self.alphabet.detokenize(self.tokens[: self.cached].tolist())

    def job(self, steps: int | None = None) -> Job:
        """Decode the rest of the protein, or `steps` tokens that are not known yet."""
        prompt, rest = self.tokens.tensor_split([self.cached])
        if steps is None:
            return Job(prompt, len(rest), rest, self.held)
        return Job(prompt, steps, None, self.held)


def new_cache(model: Model, spec: CodecSpec, kv: str, slots: int, capacity: int) -> AnyCache:
    """An empty cache: packed, or a kind of `FORMATS`."""
    if kv == "packed":
        return PackedCache(model, spec, slots, capacity)
    return DenseCache(model, slots, capacity, FORMATS[kv])


def run(
    batch: Batch[TaskT],
    prompts: Callable[[], Iterable[Prompt]],
    finish: Callable[[Prompt, Tensors], Tensors],
    work: Work,
    steps: int | None = None,
) -> Iterator[tuple[Prompt, Tensors]]:
    """Each prompt with what `finish` makes of its job's result, in the order of the prompts.

    What overtakes a slower protein waits as `finish` leaves it. What `work` has is not decoded again.
    """
    started: dict[int, Prompt] = {}

    def jobs() -> Iterator[tuple[int, Job]]:
        for number, prompt in enumerate(prompts()):
            if str(number) not in work:
                started[number] = prompt
                yield number, prompt.job(steps)

    fresh = batch.run(jobs())
    early: dict[int, Tensors] = {}
    for expected, prompt in enumerate(prompts()):
        while expected not in early and str(expected) not in work:
            number, found = next(fresh)
            early[number] = work.unit(str(number), partial(finish, started.pop(number), found))
        held = early.pop(expected) if expected in early else work.unit(str(expected), dict)
        yield prompt, held
