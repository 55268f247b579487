"""What a batch's slots decode (`engine.Task`): tokens that are given, or tokens that are sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turboesm_cli.decode import lm_logits
from turboesm_cli.engine import Job, Stepper
from turboesm_cli.generation import Sampling, draw, sample
from turboesm_cli.model import EsmModel
from turboesm_cli.sequences import MASK


@dataclass
class Forced:
    """Given tokens: the result is their final hidden states [steps, E]."""

    tokens: Tensor
    hidden: Tensor
    at: Tensor

    @classmethod
    def of(cls, model: EsmModel, slots: int, steps: int) -> Forced:
        """For jobs of at most `steps` steps."""
        tokens = torch.full((slots, steps), MASK, device=model.device)
        weight = model.net.embed_tokens.weight
        hidden = torch.zeros((slots, steps, weight.shape[1]), dtype=weight.dtype, device=model.device)
        return cls(tokens, hidden, torch.zeros((slots, 1), dtype=torch.int64, device=model.device))

    def enter(self, slot: int, number: int, job: Job) -> None:
        """Job `number` starts in `slot`. Raises ValueError where its tokens are not given."""
        if job.rest is None:
            raise ValueError("a job without the tokens to decode")
        self.tokens[slot, : job.steps] = job.rest.to(self.tokens.device)
        self.at[slot] = 0

    def step(self, stepper: Stepper) -> None:
        """Decode one token of every slot."""
        found = stepper.step(self.tokens.gather(1, self.at)[:, 0])
        self.hidden.scatter_(1, self.at[:, :, None].expand(-1, -1, found.shape[1]), found[:, None])
        self.at.add_(1).clamp_(max=self.tokens.shape[1] - 1)

    def result(self, slot: int, job: Job) -> Tensor:
        """Final hidden states [steps, E]."""
        return self.hidden[slot, : job.steps].clone()


@dataclass
class Sampled:
    """Sampled residues (see `generation`): the result is their token ids int64 [steps].

    Each job has random numbers of its own, from `seed` and its number, whatever the batch.
    """

    chances: Tensor
    ids: Tensor
    at: Tensor
    sampling: Sampling
    seed: int

    @classmethod
    def of(cls, model: EsmModel, slots: int, steps: int, sampling: Sampling, seed: int) -> Sampled:
        """For jobs of `steps` steps. Raises ModelError without an LM head."""
        model.require_lm_head("--generate")
        chances = torch.zeros((slots, steps), device=model.device)
        ids = torch.zeros((slots, steps), dtype=torch.int64, device=model.device)
        return cls(chances, ids, torch.zeros((slots, 1), dtype=torch.int64, device=model.device), sampling, seed)

    def enter(self, slot: int, number: int, job: Job) -> None:
        """Job `number` starts in `slot`."""
        self.chances[slot, : job.steps] = draw(self.seed + number, job.steps).to(self.chances.device)
        self.at[slot] = 0

    def step(self, stepper: Stepper) -> None:
        """Sample one residue of every slot."""
        masks = torch.full_like(self.at[:, 0], MASK)
        logits = lm_logits(stepper.model, stepper.step(masks))
        stepper.cache.rewind()
        residues = sample(logits.float(), self.chances.gather(1, self.at)[:, 0], self.sampling)
        self.ids.scatter_(1, self.at, residues[:, None])
        stepper.step(residues)
        self.at.add_(1).clamp_(max=self.ids.shape[1] - 1)

    def result(self, slot: int, job: Job) -> Tensor:
        """Token ids int64 [steps]."""
        return self.ids[slot, : job.steps].clone()
