"""The language model's distribution over the next residue, and samples of it.

An autoregressive model predicts the next token. ESM-2 predicts masked residues: for the residue at the next
position `<mask>` is decoded there, the LM head's distribution is taken over the 20 amino acids, the mask is
forgotten, and the residue that was given or sampled is decoded in its place (`tasks`). Two steps per residue, and
no promise that sampled sequences are proteins: ESM-2 was not trained to generate.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.norms import by_kernel, launches_on
from turboesm_cli.models.protocol import Model

COLDEST = 1e-3
"""Below this temperature the likeliest residue is taken: the division would overflow."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token; top_p keeps the likeliest tokens that make up this mass, top_k so
    many of them, 0 all; at least one is always kept. repetition_penalty divides the logits of tokens that are
    there already, those below 0 times it (Keskar et al., arXiv 1909.05858); 1 leaves them.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


def residue_logits(model: Model, hidden: Tensor) -> Tensor:
    """Logits float32 [..., 20] of the amino acids, in the order of AMINO_ACIDS, of masks' hidden states [..., E].

    Raises ModelError without an LM head.
    """
    return model.logits(hidden).float()[..., _residues(model.alphabet, hidden.device)]


def residue_indices(alphabet: Alphabet, tokens: Tensor) -> Tensor:
    """Each token's place in AMINO_ACIDS int64 [...], -1 for what is no amino acid (X, `<mask>`, the end, ...)."""
    places = torch.full((len(alphabet),), -1, dtype=torch.int64)
    places[list(alphabet.residues)] = torch.arange(len(alphabet.residues))
    return places.to(tokens.device)[tokens]


def draw(seed: int, count: int) -> Tensor:
    """`count` random numbers float32 in [0, 1) of a seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def sample(alphabet: Alphabet, logits: Tensor, chances: Tensor, sampling: Sampling) -> Tensor:
    """One amino acid's token id int64 [B] for each row of `residue_logits` [B, 20], by random numbers [B] in 0..1.

    The residue whose share of the cumulated distribution, likeliest first, the number falls into. Nothing is
    synchronized: safe in a CUDA graph.
    """
    tokens = _residues(alphabet, logits.device)
    if sampling.temperature < COLDEST:
        return tokens[logits.argmax(-1)]
    if by_kernel(logits):
        from turboesm_kernels.sampling import draw as draw_by_kernel

        return draw_by_kernel(logits, tokens, chances, sampling.temperature, sampling.top_p)
    weights, order = (logits / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = weights.cumsum(-1) - weights
    weights = torch.where(before < sampling.top_p, weights, 0.0)
    weights[:, 0] = weights[:, 0].clamp_min(1e-30)  # the likeliest is always kept
    upto = weights.cumsum(-1)
    chosen = (upto <= chances[:, None] * upto[:, -1:]).sum(-1).clamp(max=weights.shape[-1] - 1)
    return tokens[order.gather(1, chosen[:, None])[:, 0]]


def sample_tokens(logits: Tensor, noise: Tensor, sampling: Sampling, there: Tensor | None = None) -> Tensor:
    """One token id int64 [B] for each row of logits float [B, V]; none of -inf. `noise` as `gumbel` gives it.

    The largest of logits / temperature + noise is a sample of their softmax (Gumbel-max). With the same noise,
    logits that differ little nearly always give the same token, which an inverted distribution function does not.

    there [B, V] bool: tokens that the sequence has already, for the penalty. The order of penalty, temperature,
    top k and top p is that of transformers' `generate`. Nothing is synchronized: safe in a CUDA graph.
    """
    if there is not None:
        logits = logits.float()
        less = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(there, less, logits)
    if sampling.temperature < COLDEST:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        lowest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < sampling.top_p
        kept[:, 0] = True
        logits = logits.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), -torch.inf)
    return (logits + noise).argmax(-1)


OF_STEP, OF_KIND = 0x1E3779B97F4A7C15, 0x3C6EF372FE94F82B
"""What a step and a kind of token add to a seed before its bits are mixed."""

ALIKE = 64
"""Numbers of which a CPU takes logarithms in one way; it takes those left over in another."""


def gumbel(seeds: Tensor, steps: Tensor, kinds: int) -> Tensor:
    """Gumbel noise float32 [B, V] of seeds int64 [B] at steps int64 [B]: the same wherever and beside whatever."""
    if launches_on(seeds.device):
        from turboesm_kernels.sampling import gumbel as gumbel_by_kernel

        return gumbel_by_kernel(seeds, steps, kinds, OF_STEP, OF_KIND)
    of_step = mixed(seeds[:, None] + steps[:, None] * OF_STEP)
    padded = -(-kinds // ALIKE) * ALIKE
    return gumbel_of(mixed(of_step + torch.arange(padded, device=seeds.device) * OF_KIND))[:, :kinds]


def gumbel_of(bits: Tensor) -> Tensor:
    """Gumbel noise float32 of the last 31 of random bits int64: -3 to 22.2, the more the larger they are.

    -log(-log u) by 1 - u, which is small where noise is large: u itself would be 1 in float32 in 1 of 2^25 cases,
    whose noise is above everything that a model predicts.
    """
    rest = (((~bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31).clamp_max(1 - 2.0**-24)
    return -(-(-rest).log1p()).log()


def mixed(x: Tensor) -> Tensor:
    """Pseudo-random int64 of int64: splitmix64's finalizer (Steele et al., OOPSLA 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def seed_of(seed: int, number: int, sample: int) -> int:
    """The seed of one sample of one prompt: streams of different ones are never the same.

    The first sample of prompt `number` has seed + number.
    """
    if sample == 0:
        return seed + number
    described = f"{seed} {number} {sample}".encode()
    return int.from_bytes(hashlib.sha256(described).digest()[:8], "little") >> 1


@cache
def _residues(alphabet: Alphabet, device: torch.device) -> Tensor:
    """Ids int64 [20] of AMINO_ACIDS, made once per device: a CUDA graph may not copy from the host."""
    return torch.tensor(alphabet.residues, device=device)
