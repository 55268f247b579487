"""How far a candidate is from its reference. Pure functions of tensors; nothing here runs a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Cosines of the hidden states of n tokens with their reference: mean, 5th percentile and minimum."""

    n: int
    mean: float
    p05: float
    minimum: float

    @property
    def error(self) -> float:
        """1 - mean cosine."""
        return 1.0 - self.mean


@dataclass(frozen=True)
class Divergence:
    """Distributions over the next residue against their reference, n positions.

    kl_mean, kl_p95   KL(reference || candidate) in nats
    top1_agreement    fraction of positions with the same most likely residue
    perplexity        of the true residues under the candidate; reference_perplexity under the reference
    """

    n: int
    kl_mean: float
    kl_p95: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        """Candidate's over reference's."""
        return self.perplexity / self.reference_perplexity


def cosines(reference: Tensor, candidate: Tensor) -> Tensor:
    """Cosine float64 [...] of vectors [..., E]."""
    return torch.nn.functional.cosine_similarity(reference.double(), candidate.double(), dim=-1)


def agreement(values: Sequence[Tensor]) -> Agreement:
    """Summary of the cosines of some groups of tokens, each float64 [n_i]. Raises ValueError for no tokens."""
    joined = torch.cat(list(values)) if values else torch.empty(0)
    if not len(joined):
        raise ValueError("no tokens to compare")
    return Agreement(len(joined), float(joined.mean()), quantile(joined, 0.05), float(joined.min()))


@dataclass(frozen=True)
class Predictions:
    """Per position: KL float64 [n], whether the likeliest agrees, and the true one's log-probabilities."""

    kl: Tensor
    same_top: Tensor
    log_p: Tensor
    reference_log_p: Tensor


def predictions(reference: Tensor, candidate: Tensor, targets: Tensor) -> Predictions:
    """Compare logits [n, C] of C classes with their reference; targets int64 [n] are the true ones."""
    log_p = reference.double().log_softmax(-1)
    log_q = candidate.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    index = targets[:, None]
    same = log_p.argmax(-1) == log_q.argmax(-1)
    return Predictions(kl, same, log_q.gather(1, index)[:, 0], log_p.gather(1, index)[:, 0])


def divergence(parts: Sequence[Predictions]) -> Divergence:
    """Summary of the predictions at some groups of positions. Raises ValueError for none."""
    kl = torch.cat([part.kl for part in parts]) if parts else torch.empty(0)
    if not len(kl):
        raise ValueError("no positions to compare")
    return Divergence(
        len(kl),
        float(kl.mean()),
        quantile(kl, 0.95),
        float(torch.cat([part.same_top for part in parts]).double().mean()),
        _perplexity(torch.cat([part.log_p for part in parts])),
        _perplexity(torch.cat([part.reference_log_p for part in parts])),
    )


def relative_errors(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> Tensor:
    """Squared error and squared norm, float64 [L, 2], of L pairs of tensors; their ratio's root is the error."""
    pairs = [(x.double(), y.double()) for x, y in zip(reference, candidate, strict=True)]
    return torch.stack([torch.stack(((x - y).square().sum(), x.square().sum())) for x, y in pairs])


def quantile(values: Tensor, fraction: float) -> float:
    """A quantile of a vector of any length (torch.quantile stops at 2^24), linearly interpolated."""
    ordered = values.sort().values
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (position - low))


def _perplexity(log_p: Tensor) -> float:
    return math.exp(-float(log_p.mean()))
