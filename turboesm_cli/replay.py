"""One protein decoded from a filled cache, and what that is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turboesm_cli import decode, metrics
from turboesm_cli.cache import PackedCache
from turboesm_cli.codec import CodecSpec
from turboesm_cli.dense import DenseCache
from turboesm_cli.evaluation import ProteinResult, compare_predictions
from turboesm_cli.formats import FORMATS
from turboesm_cli.model import EsmModel
from turboesm_cli.sequences import Protein
from turboesm_cli.stats import to_tokens


@dataclass(frozen=True)
class Session:
    """A protein whose first `cached` tokens are in `cache`; `unmasked` as in `decode.step`."""

    model: EsmModel
    protein: Protein
    cached: int
    cache: decode.Cache
    unmasked: Tensor

    @property
    def prompt_tokens(self) -> list[int]:
        """Ids of the cached tokens."""
        tokens: list[int] = self.tokens[0, : self.cached].tolist()
        return tokens

    @property
    def tokens(self) -> Tensor:
        """Ids int64 [1, T] of the whole protein."""
        return to_tokens([self.protein], self.model.device)


def new_cache(model: EsmModel, spec: CodecSpec, kv: str, capacity: int) -> DenseCache | PackedCache:
    """An empty cache of one sequence: packed, fp32, fp16 or bf16."""
    if kv == "packed":
        return PackedCache(model, spec, 1, capacity)
    return DenseCache(model, 1, capacity, FORMATS[kv])


@torch.no_grad()
def start(model: EsmModel, spec: CodecSpec, protein: Protein, cached: int, kv: str, room: int) -> Session:
    """Prefill a prompt into a new cache (packed, fp32, fp16, bf16) with room for the rest and `room` more."""
    tokens = to_tokens([protein], model.device)
    capacity = tokens.shape[1] + room
    cache = new_cache(model, spec, kv, capacity)
    decode.prefill(model, tokens[:, :cached], cache)
    return Session(model, protein, cached, cache, decode.unmasked_fraction(tokens[:, :cached]))


@torch.no_grad()
def compare(session: Session) -> tuple[ProteinResult, ProteinResult]:
    """Decode the rest of the protein token by token: against an fp32 cache, and (drift) fp32 against ESM-2."""
    model, tokens, cached = session.model, session.tokens, session.cached
    found = decode.replay(model, tokens[:, cached:], session.cache, session.unmasked)[0]
    exact = decode.teacher_forced(model, tokens, [cached], None)[0, cached:]
    encoded = decode.encode(model, tokens)[0, cached:]
    targets = tokens[0, cached:]
    quantization = ProteinResult(
        session.protein,
        metrics.cosines(exact, found).cpu(),
        compare_predictions(model, targets, exact, found),
    )
    drift = ProteinResult(
        session.protein,
        metrics.cosines(encoded, exact).cpu(),
        compare_predictions(model, targets, encoded, exact),
    )
    return quantization, drift
