"""Run proteins through a codec and beside it the reference, and keep what `metrics` summarises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from turboesm_kernels import reference

from turboesm_cli import decode, metrics
from turboesm_cli.cache import on_device
from turboesm_cli.codec import CodecSpec, without_residual
from turboesm_cli.model import EsmModel
from turboesm_cli.outcomes import ProteinResult as ProteinResult
from turboesm_cli.outcomes import from_tensors, to_tensors
from turboesm_cli.sequences import PAD, Protein
from turboesm_cli.stats import batches, to_tokens
from turboesm_cli.work import NOTHING_KEPT, Tensors, Work

DRIFT = ""
"""Stands for a codec's name where the cache is fp32 and the reference ESM-2 itself."""

Prompt = Callable[[Protein], int]
"""How many tokens of a protein, `<cls>` counted, are prefilled; 0 for a decode from an empty cache."""


def empty_cache(_protein: Protein) -> int:
    """Prompt of the protocol `decode`: every token, `<cls>` included, is decoded."""
    return 0


@torch.no_grad()
def compare_decoding(
    model: EsmModel,
    proteins: Sequence[Protein],
    codecs: Mapping[str, decode.Codec],
    prompt: Prompt = empty_cache,
    tokens_per_batch: int = 4096,
    work: Work = NOTHING_KEPT,
) -> Iterator[tuple[str, ProteinResult]]:
    """Each protein decoded with each codec against the same decode with an fp32 cache, teacher-forced.

    Yields (codec's name, result), batch after batch, and under DRIFT the fp32 decode against encoding the
    whole protein with ESM-2. `work` keeps each batch's results of each codec.
    """
    for number, proteins_of_batch in enumerate(batches(proteins, tokens_per_batch)):
        batch = _Batch(model, proteins_of_batch, prompt)
        units: dict[str, Callable[[], list[ProteinResult]]] = {DRIFT: batch.drift}
        units |= {name: partial(batch.quantized, codec) for name, codec in codecs.items()}
        for index, (name, compute) in enumerate(units.items()):
            saved = work.unit(f"{number}-{index}", partial(_tensors_of, compute))
            for result in from_tensors(saved, proteins_of_batch):
                yield name, result


def _tensors_of(compute: Callable[[], list[ProteinResult]]) -> Tensors:
    return to_tensors(compute())


class _Batch:
    """Proteins decoded together; the fp32 decode, which codecs are compared with, is computed once, if at all."""

    def __init__(self, model: EsmModel, proteins: Sequence[Protein], prompt: Prompt) -> None:
        self._model, self._proteins = model, proteins
        self._prompts = [prompt(protein) for protein in proteins]
        self._wanted: list[Tensor] = []

    @cached_property
    def _tokens(self) -> Tensor:
        return to_tokens(self._proteins, self._model.device)

    @cached_property
    def _exact(self) -> Tensor:
        return decode.teacher_forced(self._model, self._tokens, self._prompts, None, self._wanted.append)

    def drift(self) -> list[ProteinResult]:
        """The fp32 decode against ESM-2 on whole proteins."""
        return list(self._compare(decode.encode(self._model, self._tokens), self._exact))

    def quantized(self, codec: decode.Codec) -> list[ProteinResult]:
        """The decode with a codec against the fp32 decode."""
        exact, found = self._exact, list[Tensor]()
        candidate = decode.teacher_forced(self._model, self._tokens, self._prompts, codec, found.append)
        return list(self._compare(exact, candidate, (self._wanted, found)))

    def _compare(
        self, expected: Tensor, found: Tensor, traces: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None
    ) -> Iterator[ProteinResult]:
        cosines = metrics.cosines(expected, found)
        for row, (protein, start) in enumerate(zip(self._proteins, self._prompts, strict=True)):
            stop = int(self._tokens[row].ne(PAD).sum())
            own = (x[row, start:stop] for x in (self._tokens, expected, found))
            yield ProteinResult(
                protein,
                cosines[row, start:stop].cpu(),
                compare_predictions(self._model, *own),
                traces
                and metrics.relative_errors(*([x[row, :, start:stop] for x in side] for side in traces)).cpu(),
            )


@dataclass(frozen=True)
class FirstLayer:
    """Cosines float64 of layer 0's attention output: `joined` [n], all heads as one vector; `heads` [n H]."""

    joined: Tensor
    heads: Tensor


@torch.no_grad()
def first_layer_cosines(
    model: EsmModel, proteins: Sequence[Protein], spec: CodecSpec, work: Work = NOTHING_KEPT
) -> Iterator[FirstLayer]:
    """Protocol `paper`: layer 0's attention output, batch after batch.

    As the paper's public code measures it (github.com/YueHuLab/TurboESM): bidirectional attention over the
    quantized keys and values of layer 0 alone, exact queries, without the residual bit. That code takes the
    cosine of each head on its own (`heads`).
    """
    spec = on_device(spec, model.device)
    for number, batch in enumerate(batches(proteins, 4096)):
        saved = work.unit(str(number), partial(_first_layer_cosines, model, batch, spec))
        yield FirstLayer(saved["joined"], saved["heads"])


def _first_layer_cosines(model: EsmModel, batch: Sequence[Protein], spec: CodecSpec) -> Tensors:
    tokens = to_tokens(batch, model.device)
    real = tokens.ne(PAD)
    q, k, v = _first_layer(model, tokens)
    exact = candidate = reference.attend(q, k, v, real.sum(-1))
    layer = spec.layers[0]
    if layer is not None:
        side = without_residual(layer.k) if spec.recipe.residual == "sign" else layer.k
        back_k = reference.roundtrip(k, side, decode.rope_at(model, 0, tokens.shape[1]))
        candidate = reference.attend(q, back_k, reference.roundtrip(v, layer.v), real.sum(-1))
    pair = [x.transpose(1, 2)[real] for x in (exact, candidate)]
    joined = metrics.cosines(*(x.flatten(1) for x in pair))
    return {"joined": joined.cpu(), "heads": metrics.cosines(*pair).flatten().cpu()}


def _first_layer(model: EsmModel, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer 0's q, k, v [B, H, T, d] when ESM-2 encodes tokens [B, T]."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    attention = decode.bidirectional(tokens)

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == 0:
            found.append((q, k, v))
        return attention(layer, q, k, v)

    decode.encode(model, tokens, observe)
    return found[0]


def compare_predictions(
    model: EsmModel, targets: Tensor, expected: Tensor, found: Tensor
) -> metrics.Predictions | None:
    """The LM head's distributions at hidden states [n, E], against the true tokens int64 [n].

    ESM-2 is a masked language model: its head says which residue stands *here*, and it has seen that residue.
    None without an LM head.
    """
    if not model.has_lm_head:
        return None
    parts = metrics.predictions(decode.lm_logits(model, expected), decode.lm_logits(model, found), targets)
    return metrics.Predictions(
        parts.kl.cpu(), parts.same_top.cpu(), parts.log_p.cpu(), parts.reference_log_p.cpu()
    )
