"""Sample residues after a prompt, from a cache.

ESM-2 predicts masked residues. To sample the residue at the next position, `<mask>` is decoded there, the LM
head's distribution over the 20 amino acids is sampled, the mask is forgotten and the residue decoded in its
place. Two steps a residue, and no promise that the sequences are proteins: ESM-2 was not trained to generate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turboesm_cli.decode import Cache, lm_logits, step
from turboesm_cli.model import EsmModel
from turboesm_cli.sequences import MASK, VOCABULARY

AMINO_ACIDS = tuple(VOCABULARY.index(letter) for letter in "ACDEFGHIKLMNPQRSTVWY")


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely residue; top_p keeps the likeliest residues that make up this mass.

    At least one residue is always kept.
    """

    temperature: float = 1.0
    top_p: float = 1.0


@torch.no_grad()
def generate(
    model: EsmModel, cache: Cache, unmasked: Tensor, count: int, sampling: Sampling, generator: torch.Generator
) -> list[int]:
    """`count` token ids after what a cache of one sequence holds. Raises ModelError without an LM head."""
    model.require_lm_head("--generate")
    residues: list[int] = []
    for _ in range(count):
        hidden = step(model, torch.tensor([MASK], device=model.device), cache, unmasked)
        cache.rewind()
        residues.append(pick(lm_logits(model, hidden)[0].float().cpu(), sampling, generator))
        step(model, torch.tensor(residues[-1:], device=model.device), cache, unmasked)
    return residues


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one amino acid's token id from logits float32 [33]."""
    allowed = torch.tensor(AMINO_ACIDS)
    scores = logits[allowed]
    if sampling.temperature < 1e-3:  # below, the division overflows
        return int(allowed[scores.argmax()])
    chances, order = (scores / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    kept = chances.cumsum(0) - chances < sampling.top_p
    kept[0] = True
    chances = (chances * kept).nan_to_num()
    return int(allowed[order[torch.multinomial(chances, 1, generator=generator)]])
