"""How likely an autoregressive model finds whole proteins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from turboesm_cli.engine.prompts import Prompt
from turboesm_cli.models import forward
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.work import Tensors, Work

AT_ONCE = 16
"""Proteins that a GPU scores together; a CPU takes one, so that no bytes depend on its neighbours."""


@dataclass(frozen=True)
class Score:
    """A protein's log-likelihood in nats: the sum over its residues and its end, given its control tokens.

    tokens  how many that are; several residues may be one token
    """

    accession: str
    residues: int
    tokens: int
    log_likelihood: float

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return float(torch.tensor(-self.log_likelihood / max(1, self.tokens), dtype=torch.float64).exp())

    def cells(self) -> list[str]:
        """A row of the table, as `COLUMNS`."""
        per_residue = self.log_likelihood / max(1, self.residues)
        figures = (f"{x:.6f}" for x in (self.log_likelihood, per_residue, self.perplexity))
        return [self.accession, str(self.residues), str(self.tokens), *figures]


COLUMNS = ("accession", "residues", "tokens", "log_likelihood", "log_likelihood_per_residue", "perplexity")


@torch.no_grad()
def scores(
    model: Model, prompts: Iterable[Prompt], codec: forward.Codec | None, work: Work
) -> Iterator[tuple[Score, bool]]:
    """Each protein's score, and whether it was there in `work`; decoded from what `codec` gives back.

    That is done in one pass, see `forward.teacher_forced`; `codec` None is an exact cache.
    """
    source, at_once = iter(prompts), 1 if model.device.type == "cpu" else AT_ONCE
    number = 0
    while few := list(islice(source, at_once)):
        unit = str(number)
        saved = work.unit(unit, partial(_log_likelihoods, model, few, codec))
        for row, prompt in enumerate(few):
            protein = prompt.protein
            tokens = prompt.length - len(prompt.alphabet.front(protein))
            found = Score(protein.accession, protein.residues, tokens, float(saved["log_p"][row]))
            yield found, work.resumed(unit)
        number += 1


def _log_likelihoods(model: Model, prompts: list[Prompt], codec: forward.Codec | None) -> Tensors:
    tokens = model.alphabet.padded([prompt.tokens for prompt in prompts]).to(model.device)
    hidden = forward.teacher_forced(model, tokens, [0] * len(tokens), codec)
    sums: list[Tensor] = []
    for row, prompt in enumerate(prompts):
        first, length = len(prompt.alphabet.front(prompt.protein)), prompt.length
        log_p = model.logits(hidden[row, first - 1 : length - 1]).float().log_softmax(-1)
        sums.append(log_p.gather(1, tokens[row, first:length, None]).double().sum().cpu())
    return {"log_p": torch.stack(sums)}
