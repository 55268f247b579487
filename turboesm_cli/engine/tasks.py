"""What a batch's slots decode (`batch.Task`): tokens that are given, or tokens that are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from turboesm_cli.engine.batch import Job, Stepper
from turboesm_cli.models.protocol import Model
from turboesm_cli.models.sampling import Sampling, draw, residue_logits, sample
from turboesm_cli.outputs.work import Tensors


@dataclass
class Forced:
    """Given tokens: the result is `hidden`, their final hidden states [steps, E].

    With `logits` also the `residue_logits` [steps, 20] of a `<mask>` in the place of each token, over what came
    before it: the distribution that `Sampled` draws from. That takes a second step per token.
    """

    tokens: Tensor
    hidden: Tensor
    at: Tensor
    logits: Tensor | None = None

    @classmethod
    def of(cls, model: Model, slots: int, steps: int, predict: bool = False) -> Self:
        """For jobs of at most `steps` steps; `predict` needs an LM head."""
        tokens = torch.full((slots, steps), model.alphabet.mask, device=model.device)
        hidden = torch.zeros((slots, steps, model.shape.width), dtype=model.dtype, device=model.device)
        at = torch.zeros((slots, 1), dtype=torch.int64, device=model.device)
        logits = (
            torch.zeros((slots, steps, len(model.alphabet.residues)), device=model.device) if predict else None
        )
        return cls(tokens, hidden, at, logits)

    def enter(self, slot: int, number: int, job: Job) -> None:
        """Job `number` starts in `slot`. Raises ValueError where its tokens are not given."""
        if job.rest is None:
            raise ValueError("a job without the tokens to decode")
        self.tokens[slot, : job.steps] = job.rest.to(self.tokens.device)
        self.at[slot] = 0

    def step(self, stepper: Stepper) -> None:
        """Decode one token of every slot."""
        if self.logits is not None:
            self._put(self.logits, _next_residue(stepper, len(self.at)))
        self._put(self.hidden, stepper.step(self.tokens.gather(1, self.at)[:, 0]))
        self.at.add_(1).clamp_(max=self.tokens.shape[1] - 1)

    def result(self, slot: int, job: Job) -> Tensors:
        """`hidden` [steps, E] and, where they were asked for, `logits` [steps, 20]."""
        found = {"hidden": self.hidden[slot, : job.steps].clone()}
        if self.logits is not None:
            found["logits"] = self.logits[slot, : job.steps].clone()
        return found

    def _put(self, into: Tensor, found: Tensor) -> None:
        """Row `at` of each slot of `into` [slots, steps, n] becomes found [slots, n]."""
        into.scatter_(1, self.at[:, :, None].expand(-1, -1, found.shape[1]), found[:, None])


@dataclass
class Sampled:
    """Sampled residues (see `models.sampling`): the result is `ids`, their token ids int64 [steps].

    Each job has random numbers of its own, from `seed` and its number, whatever the batch.
    """

    chances: Tensor
    ids: Tensor
    at: Tensor
    sampling: Sampling
    seed: int

    @classmethod
    def of(cls, model: Model, slots: int, steps: int, sampling: Sampling, seed: int) -> Sampled:
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
        logits = _next_residue(stepper, len(self.at))
        residues = sample(stepper.model.alphabet, logits, self.chances.gather(1, self.at)[:, 0], self.sampling)
        self.ids.scatter_(1, self.at, residues[:, None])
        stepper.step(residues)
        self.at.add_(1).clamp_(max=self.ids.shape[1] - 1)

    def result(self, slot: int, job: Job) -> Tensors:
        """`ids` int64 [steps]."""
        return {"ids": self.ids[slot, : job.steps].clone()}


def _next_residue(stepper: Stepper, slots: int) -> Tensor:
    """Every slot's `residue_logits` [slots, 20] at its next position; the cache is left as it was."""
    hidden = stepper.step(torch.full((slots,), stepper.model.alphabet.mask, device=stepper.model.device))
    stepper.cache.rewind()
    return residue_logits(stepper.model, hidden)
