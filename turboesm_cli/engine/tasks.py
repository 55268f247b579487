"""What a batch's slots decode (`batch.Task`): tokens that are given, or tokens that are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from turboesm_cli.engine.batch import Job, Stepper
from turboesm_cli.models.protocol import Model
from turboesm_cli.models.sampling import Sampling, draw, gumbel, residue_logits, sample, sample_tokens, seed_of
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
        tokens = torch.full((slots, steps), model.alphabet.end, device=model.device)
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

    def ended(self) -> Tensor | None:
        """None: all tokens are decoded."""
        return None

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
    """Residues that ESM-2 samples (see `models.sampling`): the result is `ids`, their token ids int64 [steps].

    Each job has random numbers of its own, from the seed, its prompt and its sample, whatever the batch.
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
        seed = seed_of(self.seed, job.number, job.sample)
        self.chances[slot, : job.steps] = draw(seed, job.steps).to(self.chances.device)
        self.at[slot] = 0

    def step(self, stepper: Stepper) -> None:
        """Sample one residue of every slot."""
        logits = _next_residue(stepper, len(self.at))
        residues = sample(stepper.model.alphabet, logits, self.chances.gather(1, self.at)[:, 0], self.sampling)
        self.ids.scatter_(1, self.at, residues[:, None])
        stepper.step(residues)
        self.at.add_(1).clamp_(max=self.ids.shape[1] - 1)

    def ended(self) -> Tensor | None:
        """None: ESM-2's samples have no end."""
        return None

    def result(self, slot: int, job: Job) -> Tensors:
        """`ids` int64 [steps]."""
        return {"ids": self.ids[slot, : job.steps].clone()}


@dataclass
class Generated:
    """Tokens that an autoregressive model samples: the result is `ids` int64 [n], the end last where it came, and
    `log_p`, their log-likelihood.

    A step decodes the token before the one that it samples, `Job.feed` first. Random numbers as in `Sampled`. A
    token that the alphabet does not let be sampled never is; log-likelihoods are the model's own all the same.
    """

    token: Tensor
    seeds: Tensor
    ids: Tensor
    log_p: Tensor
    at: Tensor
    done: Tensor
    never: Tensor
    there: Tensor
    end: int
    sampling: Sampling
    seed: int

    @classmethod
    def of(cls, model: Model, slots: int, steps: int, sampling: Sampling, seed: int) -> Generated:
        """For jobs of at most `steps` steps."""
        device, end = model.device, model.alphabet.end
        never = torch.ones(len(model.alphabet), dtype=torch.bool, device=device)
        never[list(model.alphabet.sampled)] = False
        penalised = len(model.alphabet) if sampling.repetition_penalty != 1 else 0
        return cls(
            torch.full((slots,), end, device=device),
            torch.zeros(slots, dtype=torch.int64, device=device),
            torch.zeros((slots, steps), dtype=torch.int64, device=device),
            torch.zeros((slots, steps), device=device),
            torch.zeros((slots, 1), dtype=torch.int64, device=device),
            torch.zeros(slots, dtype=torch.bool, device=device),
            never,
            torch.zeros((slots, penalised), dtype=torch.bool, device=device),
            end, sampling, seed,
        )  # fmt: skip

    def enter(self, slot: int, number: int, job: Job) -> None:
        """Job `number` starts in `slot`. Raises ValueError where it has no token to start from."""
        if job.feed is None:
            raise ValueError("a job without a token to start from")
        self.seeds[slot] = seed_of(self.seed, job.number, job.sample)
        self.token[slot], self.at[slot], self.done[slot] = job.feed, 0, False
        if self.there.shape[1]:
            self.there[slot] = False
            self.there[slot, torch.cat((job.prompt, torch.tensor([job.feed]))).to(self.there.device)] = True

    def step(self, stepper: Stepper) -> None:
        """Sample one token of every slot."""
        logits = stepper.model.logits(stepper.step(self.token)).float()
        noise = gumbel(self.seeds, self.at[:, 0], logits.shape[1])
        there = self.there if self.there.shape[1] else None
        token = sample_tokens(logits.masked_fill(self.never, -torch.inf), noise, self.sampling, there)
        self.ids.scatter_(1, self.at, token[:, None])
        self.log_p.scatter_(1, self.at, logits.log_softmax(-1).gather(1, token[:, None]))
        if self.there.shape[1]:
            self.there.scatter_(1, token[:, None], True)
        self.token.copy_(token)
        self.done |= token == self.end
        self.at.add_(1).clamp_(max=self.ids.shape[1] - 1)

    def ended(self) -> Tensor | None:
        """Where the end has come."""
        return self.done

    def result(self, slot: int, job: Job) -> Tensors:
        """`ids` int64 [n] and `log_p` float64 []."""
        ids = self.ids[slot, : job.steps]
        ends = (ids == self.end).nonzero()[:1, 0].tolist() if bool(self.done[slot]) else []
        count = ends[0] + 1 if ends else job.steps
        return {"ids": ids[:count].clone(), "log_p": self.log_p[slot, :count].double().sum()}


def _next_residue(stepper: Stepper, slots: int) -> Tensor:
    """Every slot's `residue_logits` [slots, 20] at its next position; the cache is left as it was."""
    hidden = stepper.step(torch.full((slots,), stepper.model.alphabet.mask, device=stepper.model.device))
    stepper.cache.rewind()
    return residue_logits(stepper.model, hidden)
