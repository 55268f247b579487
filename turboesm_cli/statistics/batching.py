"""Calibration proteins -> batches of tokens, and what each protein is for: decided by its hash alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.protocol import Model
from turboesm_cli.models.shapes import check_context
from turboesm_cli.sequences.fasta import Protein

HELD_BACK = 16
"""One protein in 16 is held back from fitting."""


ATTENTION_DOUBLES = 2500
"""Tokens from which attention takes as long as the rest of a pass: 2,200 to 3,200 on a CPU (8M, 25M)."""


def batches(proteins: Iterable[Protein], tokens_per_batch: int, alphabet: Alphabet) -> Iterator[list[Protein]]:
    """Proteins by length, in batches of at most `tokens_per_batch` tokens, padding counted.

    Beyond 512 tokens, where attention's score matrices outgrow everything else, batches shrink with the length,
    so that the longest proteins set the memory, not how many of them there are.
    """
    batch: list[Protein] = []
    for protein in sorted(proteins, key=lambda p: (p.residues, p.sequence, p.accession)):
        length = alphabet.length(protein)
        if batch and (len(batch) + 1) * length * max(1.0, length / 512) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(protein)
    if batch:
        yield batch


def cost_of(proteins: Sequence[Protein], alphabet: Alphabet) -> float:
    """What a pass over a batch takes, about, in tokens of short proteins: attention grows with the length."""
    longest = max(map(alphabet.length, proteins), default=0)
    return len(proteins) * longest * (1 + longest / ATTENTION_DOUBLES)


def to_tokens(proteins: Sequence[Protein], model: Model) -> Tensor:
    """Token ids int64 [B, T] of proteins, control tokens included, padded on the right.

    Raises InputError for one that is longer than the model's context.
    """
    tokens = model.alphabet.batch(proteins)
    if model.shape.context is not None and tokens.shape[1] > model.shape.context:
        longest = max(proteins, key=model.alphabet.length)
        check_context(longest, model.alphabet.length(longest), model.shape)
    return tokens.to(model.device)


def told(proteins: Sequence[Protein], alphabet: Alphabet) -> str:
    """sha256 of what a model is told before each sequence, whatever their order; "" where that is nothing."""
    tags = [(protein.sequence, alphabet.tags(protein)) for protein in proteins]
    if not any(tag for _, tag in tags):
        return ""
    return hashlib.sha256(repr(sorted(tags)).encode()).hexdigest()


def hold_back(proteins: Sequence[Protein]) -> tuple[list[Protein], list[Protein]]:
    """Proteins to fit to, and those held back to weigh and choose with: one in 16 by hash, at least one.

    A single protein serves as both.
    """
    held = [p for p in proteins if digest(p)[-2] % HELD_BACK == 0] or [min(proteins, key=digest)]
    chosen = {protein.sequence for protein in held}
    return [p for p in proteins if p.sequence not in chosen] or list(proteins), held


def prompt_lengths(proteins: Sequence[Protein], longest: int, model: Model) -> list[int]:
    """Tokens of each protein's prompt in calibration: by its hash none, or half of its first `longest` tokens.

    Those of a causal model have none: there a prompt's tokens see what they see without one.
    """
    halves = [not model.causal and digest(protein)[-1] % 2 == 0 for protein in proteins]
    return [
        min(model.alphabet.length(protein), longest) // 2 if half else 0
        for protein, half in zip(proteins, halves, strict=True)
    ]


def visible_keys(prompts: Sequence[int], tokens: Tensor) -> Tensor:
    """Which keys each of tokens [B, T] sees, bool [B, 1, T, T]: earlier ones and itself, within a prompt all."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    prompt = in_prompt(prompts, tokens)
    return ((positions <= positions[:, None]) | (prompt[:, None] & prompt[:, :, None]))[:, None]


def in_prompt(prompts: Sequence[int], tokens: Tensor) -> Tensor:
    """Which of tokens [B, T] belong to a prompt, bool."""
    lengths = torch.tensor(list(prompts), device=tokens.device)
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def digest(protein: Protein) -> bytes:
    """sha256 of the sequence: the source of everything random about a protein, so that runs repeat."""
    return hashlib.sha256(protein.sequence.encode()).digest()
