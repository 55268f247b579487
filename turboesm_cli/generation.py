"""Sample residues from the language model's head.

ESM-2 predicts masked residues. To sample the residue at the next position, `<mask>` is decoded there, the LM
head's distribution over the 20 amino acids is sampled, the mask is forgotten and the residue decoded in its
place (`tasks.Sampled`). Two steps a residue, and no promise that the sequences are proteins: ESM-2 was not trained
to generate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from turboesm_cli.sequences import VOCABULARY

AMINO_ACIDS = tuple(VOCABULARY.index(letter) for letter in "ACDEFGHIKLMNPQRSTVWY")
COLDEST = 1e-3
"""Below this temperature the likeliest residue is taken: the division would overflow."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely residue; top_p keeps the likeliest residues that make up this mass.

    At least one residue is always kept.
    """

    temperature: float = 1.0
    top_p: float = 1.0


def draw(seed: int, count: int) -> Tensor:
    """`count` random numbers float32 in [0, 1) of a seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def sample(logits: Tensor, chances: Tensor, sampling: Sampling) -> Tensor:
    """One amino acid's token id int64 [B] for each row of logits float32 [B, 33], by random numbers [B] in [0, 1).

    The residue whose share of the cumulated distribution, likeliest first, the number falls into. Nothing is
    synchronized: safe in a CUDA graph.
    """
    scores = logits.masked_fill(_other_tokens(logits.device), -torch.inf)
    if sampling.temperature < COLDEST:
        return scores.argmax(-1)
    weights, order = (scores / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = weights.cumsum(-1) - weights
    weights = torch.where(before < sampling.top_p, weights, 0.0)
    weights[:, 0] = weights[:, 0].clamp_min(1e-30)  # the likeliest is always kept
    upto = weights.cumsum(-1)
    chosen = (upto <= chances[:, None] * upto[:, -1:]).sum(-1).clamp(max=weights.shape[-1] - 1)
    return order.gather(1, chosen[:, None])[:, 0]


@cache
def _other_tokens(device: torch.device) -> Tensor:
    """Which of the vocabulary's tokens are no amino acid, bool [33]."""
    other = torch.ones(len(VOCABULARY), dtype=torch.bool)
    other[list(AMINO_ACIDS)] = False
    return other.to(device)
