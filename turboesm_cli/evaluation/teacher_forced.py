"""Run proteins through a codec and beside it the reference, and keep what `metrics` summarises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
from torch import Tensor
from turboesm_kernels import reference

from turboesm_cli.cache.packed import on_device
from turboesm_cli.codec.fit import CodecSpec, without_residual
from turboesm_cli.console import Tick
from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.protein_results import ProteinResult, from_tensors, to_tensors
from turboesm_cli.models import forward
from turboesm_cli.models.protocol import Model
from turboesm_cli.models.sampling import residue_indices, residue_logits
from turboesm_cli.outputs.work import NOTHING_KEPT, Tensors, Work
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import batches, cost_of, to_tokens

LOGITS = 1 << 22
"""Logits that are compared at once."""

DRIFT = ""
"""Stands for a codec's name where the cache is fp32 and the reference ESM-2 itself."""

Prompt = Callable[[Protein], int]
"""How many tokens of a protein, `<cls>` counted, are prefilled; 0 for a decode from an empty cache."""


def empty_cache(_protein: Protein) -> int:
    """Prompt of the protocol `decode`: every token, `<cls>` included, is decoded."""
    return 0


@torch.no_grad()
def compare_decoding(
    model: Model,
    proteins: Sequence[Protein],
    codecs: Mapping[str, forward.Codec],
    prompt: Prompt = empty_cache,
    tokens_per_batch: int = 4096,
    work: Work = NOTHING_KEPT,
    tick: Tick | None = None,
    own: range | None = None,
    drift: bool = True,
) -> Iterator[tuple[str, ProteinResult]]:
    """Each protein decoded with each codec against the same decode with an fp32 cache, teacher-forced.

    Yields (codec's name, result), batch after batch, and for an encoder under DRIFT the fp32 decode against
    encoding the whole protein, of which hidden states alone are compared: ESM-2's own distribution over a residue,
    which must not see it, would take a pass per residue. `work` keeps each batch's results of each codec; `tick`
    hears of each batch and codec. `own`: the numbers of the batches to decode, if not all. Without `drift` that is
    left out.
    """
    for number, proteins_of_batch in enumerate(batches(proteins, tokens_per_batch, model.alphabet)):
        if own is not None and number not in own:
            continue
        batch = _Batch(model, proteins_of_batch, prompt)
        units: dict[str, Callable[[], list[ProteinResult]]] = (
            {DRIFT: batch.drift} if drift and not model.causal else {}
        )
        units |= {name: partial(batch.quantized, codec) for name, codec in codecs.items()}
        cost = cost_of(proteins_of_batch, model.alphabet)
        for index, (name, compute) in enumerate(units.items()):
            unit = f"{number}-{index}"
            saved = work.unit(unit, partial(_tensors_of, compute))
            if tick:
                passes = PASSES_OF_DRIFT if name == DRIFT else PASSES_OF_CODEC + (index == 0)
                tick(len(proteins_of_batch), work.resumed(unit), passes * cost)
            for result in from_tensors(saved, proteins_of_batch):
                yield name, result


PASSES_OF_DRIFT, PASSES_OF_CODEC = 2.5, 1.25
"""What a batch takes, in fp32 decodes, of which the first has one more; measured on a CPU (8M, 25M)."""


def decoding_cost(
    model: Model, proteins: Sequence[Protein], codecs: int, drift: bool = True, own: range | None = None
) -> float:
    """What `compare_decoding` takes, in the measure in which its `tick` hears of it."""
    few = [
        batch
        for number, batch in enumerate(batches(proteins, 4096, model.alphabet))
        if own is None or number in own
    ]
    passes = codecs * PASSES_OF_CODEC + (PASSES_OF_DRIFT if drift and not model.causal else 1)
    return passes * sum(cost_of(batch, model.alphabet) for batch in few)


def _tensors_of(compute: Callable[[], list[ProteinResult]]) -> Tensors:
    return to_tensors(compute())


@dataclass(frozen=True)
class _Decoded:
    """Final hidden states [B, T, E] of tokens and, for a model with an LM head, of masks in their places."""

    hidden: Tensor
    masked: Tensor | None


class _Batch:
    """Proteins decoded together; the fp32 decode, which codecs are compared with, is computed once, if at all."""

    def __init__(self, model: Model, proteins: Sequence[Protein], prompt: Prompt) -> None:
        self._model, self._proteins = model, proteins
        self._prompts = [prompt(protein) for protein in proteins]
        self._wanted: list[Tensor] = []

    @cached_property
    def _tokens(self) -> Tensor:
        return to_tokens(self._proteins, self._model)

    @cached_property
    def _exact(self) -> _Decoded:
        return self._decode(None, self._wanted.append)

    def drift(self) -> list[ProteinResult]:
        """The fp32 decode against ESM-2 on whole proteins."""
        encoded = forward.encode(self._model, self._tokens)
        return list(self._compare(_Decoded(encoded, None), _Decoded(self._exact.hidden, None)))

    def quantized(self, codec: forward.Codec) -> list[ProteinResult]:
        """The decode with a codec against the fp32 decode."""
        exact, found = self._exact, list[Tensor]()
        candidate = self._decode(codec, found.append)
        return list(self._compare(exact, candidate, (self._wanted, found)))

    def _decode(self, codec: forward.Codec | None, trace: Callable[[Tensor], None]) -> _Decoded:
        if self._model.has_lm_head and not self._model.causal:
            return _Decoded(
                *forward.teacher_forced_with_masks(self._model, self._tokens, self._prompts, codec, trace)
            )
        return _Decoded(forward.teacher_forced(self._model, self._tokens, self._prompts, codec, trace), None)

    def _compare(
        self,
        expected: _Decoded,
        found: _Decoded,
        traces: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> Iterator[ProteinResult]:
        cosines, lengths = (
            metrics.cosines(expected.hidden, found.hidden),
            self._model.alphabet.lengths(self._tokens),
        )
        for row, (protein, start) in enumerate(zip(self._proteins, self._prompts, strict=True)):
            stop = int(lengths[row])
            yield ProteinResult(
                protein,
                cosines[row, start:stop].cpu(),
                self._predictions(expected, found, row, start, stop),
                traces
                and metrics.relative_errors(*([x[row, :, start:stop] for x in side] for side in traces)).cpu(),
            )

    def _predictions(
        self, expected: _Decoded, found: _Decoded, row: int, start: int, stop: int
    ) -> metrics.Predictions | None:
        if self._model.causal:
            front = len(self._model.alphabet.front(self._proteins[row]))
            exact, candidate = (each.hidden[row, :stop] for each in (expected, found))
            first = max(start, front - 1)
            return compare_next(self._model, self._tokens[row, :stop], exact, candidate, first)
        if expected.masked is None or found.masked is None:
            return None
        at = (row, slice(start, stop))
        logits = (residue_logits(self._model, masked[at]) for masked in (expected.masked, found.masked))
        return compare_predictions(self._model, self._tokens[at], *logits)


@dataclass(frozen=True)
class FirstLayer:
    """Cosines float64 of layer 0's attention output: `joined` [n], all heads as one vector; `heads` [n H]."""

    joined: Tensor
    heads: Tensor


@torch.no_grad()
def first_layer_cosines(
    model: Model,
    proteins: Sequence[Protein],
    spec: CodecSpec,
    work: Work = NOTHING_KEPT,
    own: range | None = None,
) -> Iterator[FirstLayer]:
    """Protocol `paper`: layer 0's attention output, batch after batch; `own` as in `compare_decoding`.

    As the paper's public code measures it (github.com/YueHuLab/TurboESM): bidirectional attention over the
    quantized keys and values of layer 0 alone, exact queries, without the residual bit. That code takes the
    cosine of each head on its own (`heads`).
    """
    spec = on_device(spec, model.device)
    for number, batch in enumerate(batches(proteins, 4096, model.alphabet)):
        if own is not None and number not in own:
            continue
        saved = work.unit(str(number), partial(_first_layer_cosines, model, batch, spec))
        yield FirstLayer(saved["joined"], saved["heads"])


def first_layer_cost(model: Model, proteins: Sequence[Protein], own: range | None = None) -> float:
    """What `first_layer_cosines` takes, about, in any measure: scores of all pairs of tokens are most of it."""
    few = [
        batch
        for number, batch in enumerate(batches(proteins, 4096, model.alphabet))
        if own is None or number in own
    ]
    longest = [max(map(model.alphabet.length, batch)) for batch in few]
    return sum(len(batch) * tokens * (1 + tokens / 600) for batch, tokens in zip(few, longest, strict=True))


def _first_layer_cosines(model: Model, batch: Sequence[Protein], spec: CodecSpec) -> Tensors:
    tokens = to_tokens(batch, model)
    real = model.alphabet.real(tokens)
    q, k, v = _first_layer(model, tokens)
    exact = candidate = reference.attend(q, k, v, real.sum(-1))
    layer = spec.layers[0]
    if layer is not None:
        side = without_residual(layer.k) if spec.recipe.residual == "sign" else layer.k
        back_k = reference.roundtrip(k, side, forward.rope_at(model, 0, tokens.shape[1]))
        candidate = reference.attend(q, back_k, reference.roundtrip(v, layer.v), real.sum(-1))
    pair = [x.transpose(1, 2)[real] for x in (exact, candidate)]
    joined = metrics.cosines(*(x.flatten(1) for x in pair))
    return {"joined": joined.cpu(), "heads": metrics.cosines(*pair).flatten().cpu()}


def _first_layer(model: Model, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer 0's q, k, v [B, H, T, d] when ESM-2 encodes tokens [B, T]."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    attention = forward.own_attention(model, tokens)

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == 0:
            found.append((q, k, v))
        return attention(layer, q, k, v)

    forward.encode(model, tokens, observe)
    return found[0]


def compare_next(model: Model, tokens: Tensor, expected: Tensor, found: Tensor, first: int) -> metrics.Predictions:
    """Distributions over the next token, all tokens, that hidden states [T, E] from `first` on give.

    tokens int64 [T] of a whole protein. Control tokens before the residues are no targets; the end is one.
    """
    each = max(1, LOGITS // len(model.alphabet))
    parts = []
    for start in range(first, len(tokens) - 1, each):
        stop = min(start + each, len(tokens) - 1)
        exact, candidate = (model.logits(hidden[start:stop]).float() for hidden in (expected, found))
        parts.append(_on_cpu(metrics.predictions(exact, candidate, tokens[start + 1 : stop + 1])))
    joined = (torch.cat([getattr(part, f.name) for part in parts]) for f in fields(metrics.Predictions))
    return metrics.Predictions(*joined)


def compare_predictions(model: Model, tokens: Tensor, expected: Tensor, found: Tensor) -> metrics.Predictions:
    """`residue_logits` [n, 20] of masks in the places of tokens int64 [n], where these are amino acids.

    Each is a distribution over the next residue, given what came before it: neither has seen the residue.
    """
    targets = residue_indices(model.alphabet, tokens)
    known = targets >= 0
    return _on_cpu(metrics.predictions(expected[known], found[known], targets[known]))


def _on_cpu(parts: metrics.Predictions) -> metrics.Predictions:
    return metrics.Predictions(
        parts.kl.cpu(), parts.same_top.cpu(), parts.log_p.cpu(), parts.reference_log_p.cpu()
    )
