"""Activations of calibration proteins -> streaming, mergeable statistics of every head.

The proteins run as they will in use: half of them are decoded from an empty cache, half after a prompt of half
their length (see `models.forward`). Keys and values of ESM-2 run on whole proteins are distributed otherwise: a
codec fitted to those alone made 1.3 to 2.4 times the error.

For each layer and head, sums over tokens in float64, of keys before and after RoPE, queries, values and RoPE's
phases; and a fixed number of keys and values, those of the tokens with the smallest hash. Memory depends on
the model alone, not on the number of proteins; two sets' statistics add up to those of their union; neither
order nor repetition of the runs matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from turboesm_kernels.reference import Rope

from turboesm_cli.console import Phases, Tick, quiet
from turboesm_cli.errors import InputError
from turboesm_cli.models.forward import encode, rope_at, shared
from turboesm_cli.models.protocol import Model, learned_positions
from turboesm_cli.models.sampling import mixed
from turboesm_cli.models.shapes import Shape
from turboesm_cli.outputs.shards import ALL, Shard, part_of
from turboesm_cli.outputs.work import NOTHING_KEPT, Tensors, Work
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.accumulators import (
    HELD_PART,
    Gathered,
    LayerSums,
    PositionSums,
    Sample,
    Statistics,
    added,
    sample_size,
    stacked,
)
from turboesm_cli.statistics.batching import (
    batches,
    cost_of,
    digest,
    hold_back,
    prompt_lengths,
    to_tokens,
    visible_keys,
)
from turboesm_cli.statistics.sensitivity import DRAWS, MOST_TOKENS, measure

BACKWARD_TOKENS = 512
"""Tokens of a batch at most where gradients are taken."""

HELD_COST = 6
"""What a residue held back costs, about, in residues to fit to: two passes forward, and two backward."""


def collect(
    model: Model,
    proteins: Sequence[Protein],
    tokens_per_batch: int = 4096,
    phase: Phases = quiet,
    work: Work = NOTHING_KEPT,
) -> Statistics:
    """Run the model over `proteins`, prompts as in `prompt_lengths`, and sum up what its attention works with.

    The phases "statistics" and "sensitivities" hear the number of proteins of each finished batch. `work` keeps
    what is done, batch by batch. Raises InputError for no proteins.
    """
    lengths = map(model.alphabet.length, proteins)
    return gather(model, proteins, tokens_per_batch, phase, work).statistics(len(proteins), sum(lengths))


def gather(
    model: Model,
    proteins: Sequence[Protein],
    tokens_per_batch: int = 4096,
    phase: Phases = quiet,
    work: Work = NOTHING_KEPT,
    shard: Shard = ALL,
) -> Gathered:
    """As `collect`, of the batches that `shard` takes: batches are those of all proteins, whoever runs them."""
    todo = batches_of(model, proteins, tokens_per_batch)
    fitted, held = todo.of_shard(shard)
    size = sample_size(model.shape.head_dim)

    def told(tick: Tick) -> Callable[[Sequence[Protein], bool], None]:
        return lambda batch, again: tick(len(batch), again, cost_of(batch, model.alphabet))

    kept, kept_held = _Keeper(model.shape, size), _Keeper(model.shape, size // HELD_PART, DRAWS * model.causal)
    costs = [sum(cost_of(batch, model.alphabet) for batch in each) for each in (fitted, held)]
    with phase("statistics", sum(map(len, fitted)), costs[0]) as tick:
        sums = _added_up(partial(_sum_batch, model), fitted, kept, work.under("fitted"), told(tick))
    with phase("sensitivities", sum(map(len, held)), costs[1]) as tick:
        gradients = _added_up(partial(_measure_batch, model), held, kept_held, work.under("held"), told(tick))
    return Gathered(sums, kept.merged(), gradients, kept_held.merged())


Batches = Sequence[Sequence[Protein]]


@dataclass(frozen=True)
class Todo:
    """Batches of proteins to fit to, and of those held back."""

    fitted: Batches
    held: Batches

    @property
    def total(self) -> int:
        """How many batches there are."""
        return len(self.fitted) + len(self.held)

    def numbers(self, shard: Shard) -> range:
        """The numbers of the batches that a shard takes, those held back last; balanced by residues."""
        each = [(batch, 1) for batch in self.fitted] + [(batch, HELD_COST) for batch in self.held]
        return part_of([cost * sum(protein.residues for protein in batch) for batch, cost in each], shard)

    def of_shard(self, shard: Shard) -> tuple[Batches, Batches]:
        """The batches that a shard takes, of both kinds."""
        own, fitted = self.numbers(shard), len(self.fitted)
        return self.fitted[own.start : own.stop], self.held[max(0, own.start - fitted) : max(0, own.stop - fitted)]


def batches_of(model: Model, proteins: Sequence[Protein], tokens_per_batch: int = 4096) -> Todo:
    """All batches of calibration proteins. Raises InputError for no proteins."""
    if not proteins:
        raise InputError("no proteins to calibrate on; name a FASTA file with at least one")
    fitted, held = hold_back(proteins)
    few = min(tokens_per_batch, BACKWARD_TOKENS)
    return Todo(list(batches(fitted, tokens_per_batch, model.alphabet)), list(batches(held, few, model.alphabet)))


Measure = Callable[[Sequence[Protein], int], tuple[Tensors, Sample]]
"""(batch, limit of hashes) -> what is summed up over batches, and the batch's tokens with the smallest hashes."""


def _added_up(
    measure: Measure,
    todo: Batches,
    keeper: _Keeper,
    work: Work,
    tick: Callable[[Sequence[Protein], bool], None],
) -> Tensors:
    """The sums that `measure` gives, over all batches in their order; the keeper takes in their tokens.

    A batch's tokens are saved as a unit, then the sums up to it; what is saved is not measured again.
    """
    total = work.total("sums")
    done = int(total.pop("batches", torch.tensor(0)))
    for number, batch in enumerate(todo):
        unit = f"tokens-{number}"
        if number < done:
            saved = work.unit(unit, partial(_tokens_of, measure, batch, keeper.limit))
            keeper.add(Sample.of(saved, keeper.layers))
        else:
            sums, sample = measure(batch, keeper.limit)
            keeper.add(sample)
            total = added(total, sums)
            work.unit(unit, partial(dict, sample.tensors))
            so_far = total | {"batches": torch.tensor(number + 1)}
            work.save_total("sums", so_far, last=number + 1 == len(todo))
        tick(batch, number < done)
    return total


def _tokens_of(measure: Measure, batch: Sequence[Protein], limit: int) -> Tensors:
    return measure(batch, limit)[1].tensors


class _Keeper:
    """The tokens with the smallest hashes so far; merges only now and then, since a merge copies them all."""

    def __init__(self, shape: Shape, size: int, draws: int = 0) -> None:
        self._kept, self._size, self.layers = Sample.empty(shape, draws), size, shape.layers
        self._pending: list[Sample] = []

    @property
    def limit(self) -> int:
        """Hashes from here on are too large to be kept."""
        full = len(self._kept.hashes) == self._size
        return int(self._kept.hashes[-1]) if full else torch.iinfo(torch.int64).max

    def add(self, sample: Sample) -> None:
        """Take in some tokens."""
        self._pending.append(sample)
        if sum(len(pending.hashes) for pending in self._pending) >= self._size:
            self.merged()

    def merged(self) -> Sample:
        """What is kept of all tokens taken in."""
        while self._pending:
            self._kept = self._kept.merged(self._pending.pop(), self._size)
        return self._kept


def _measure_batch(model: Model, proteins: Sequence[Protein], limit: int) -> tuple[Tensors, Sample]:
    """Gradients of a batch, and of its tokens with hashes up to `limit` those with the smallest."""
    found, gradients = measure(model, proteins)
    longest = MOST_TOKENS if gradients else None
    sample = _sum_batch(model, proteins, limit, gradients, longest)[1]
    return {"gram": found.gram, "tokens": torch.tensor(found.tokens)}, sample


def _sum_batch(
    model: Model,
    proteins: Sequence[Protein],
    limit: int,
    gradients: Sequence[Tensor] = (),
    longest: int | None = None,
) -> tuple[Tensors, Sample]:
    """Sums over a batch, and of its tokens with hashes up to `limit` those with the smallest.

    `gradients` [B, T, ...] of the tokens go with them; `longest`: proteins are cut here.
    """
    tokens = to_tokens(proteins, model)[:, :longest]
    real = model.alphabet.real(tokens)
    hashes = _hashes(proteins, tokens.shape[1]).to(model.device)[real]
    order = hashes.argsort()[: sample_size(model.shape.head_dim)]
    order = order[hashes[order] <= limit]
    rope = rope_at(model, 0, tokens.shape[1])
    visible = visible_keys(prompt_lengths(proteins, tokens.shape[1], model), tokens)
    layers: list[LayerSums] = []
    by_position = _no_keys(model, 0 if gradients else learned_positions(model)).to(tokens.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if by_position.shape[1]:
            by_position[layer, : k.shape[2]] = (k.float() * real[:, None, :, None]).sum(0).transpose(0, 1)
        layers.append(_sum_layer(q, k, v, real, rope))
        keys.append(_pick(k, real)[order].float().cpu())
        values.append(_pick(v, real)[order].float().cpu())
        return F.scaled_dot_product_attention(q, shared(k, q.shape[1]), shared(v, q.shape[1]), visible, scale=1.0)

    with torch.no_grad():
        encode(model, tokens, attend)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)[real]
    own = tuple(gradient[real][order].float().cpu() for gradient in gradients)
    counts = torch.bincount(positions, minlength=by_position.shape[1])[: by_position.shape[1]]
    sums = stacked(layers) | PositionSums(counts.cpu(), by_position.double().cpu()).tensors
    return sums, Sample(hashes[order].cpu(), positions[order].cpu(), tuple(keys), tuple(values), own)


def _no_keys(model: Model, positions: int) -> Tensor:
    """Zeros for `PositionSums.key`."""
    shape = model.shape
    return torch.zeros(shape.layers, positions, shape.key_value_heads, shape.head_dim)


def _pick(x: Tensor, real: Tensor) -> Tensor:
    """The tokens of x [B, H, T, d] that are not padding, [N, H, d]."""
    return x.transpose(1, 2)[real]


def _sum_layer(q: Tensor, k: Tensor, v: Tensor, real: Tensor, rope: Rope) -> LayerSums:
    """Both groups' sums over one batch of q [B, H, T, d], k and v [B, K, T, d]: float32 products, float64 sums.

    q and k after RoPE; query heads of one key/value head are summed up together.
    """
    d = k.shape[-1]
    phase = torch.cat((rope.cos[:, : d // 2], rope.sin[:, : d // 2]), -1)
    groups = []
    for tokens in (slice(0, 1), slice(1, None)):
        keep = real[:, tokens]
        asked, keys, values = (_pick(x[:, :, tokens].float(), keep) for x in (q, k, v))
        before = rope.rows(tokens).rotate_back(k[:, :, tokens].float())
        p = phase[tokens].expand(len(real), -1, -1)[keep]
        sums = (
            keep.sum().double(),
            _pick(before, keep).sum(0),
            values.sum(0),
            _gram(keys, keys),
            _gram(asked, asked).unflatten(0, (k.shape[1], -1)).sum(1),
            _gram(values, values),
            torch.einsum("nhd,ne->hde", keys, p),
            p.T @ p,
        )
        groups.append([part.double().cpu() for part in sums])
    return LayerSums(*(torch.stack(pair) for pair in zip(*groups, strict=True)))


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """[N, H, d], [N, H, e] -> [H, d, e]."""
    return x.permute(1, 2, 0) @ y.transpose(0, 1)


def _hashes(proteins: Sequence[Protein], length: int) -> Tensor:
    """Pseudo-random int64 [B, length] >= 0 of (sequence, position), the same in every run and batch."""
    seeds = [int.from_bytes(digest(protein)[:8], "little", signed=True) for protein in proteins]
    return mixed(torch.tensor(seeds)[:, None] + torch.arange(length) * 0x1E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF
