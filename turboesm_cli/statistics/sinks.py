"""How many leading tokens a cache should keep whole, for an autoregressive model: found on a few proteins.

A token kept in float16 costs 13 bits more per value than one at 3 bits. The same bits, spread over all T tokens,
would make every error 4^(13 / T) times smaller: a saving of 18 / T of the sum, whatever T. So a token is worth it
where its own error costs 18 times what a token's does in the mean. Control tokens are always kept: other tokens
rest on them whatever the sequence, and codecs are fitted to residues.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turboesm_cli.models.protocol import Model
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import digest
from turboesm_cli.statistics.sensitivity import cost_by_position

PROTEINS = 8
MOST = 16
"""Sinks that a bundle may have."""

WORTH = 18.0
"""Times the mean error from which a token is kept whole."""


def choose_sinks(model: Model, proteins: Sequence[Protein], least: int) -> int:
    """Sinks for a model, from the proteins with the smallest hashes: at least `least` and all control tokens."""
    few = sorted(proteins, key=digest)[:PROTEINS]
    front = max(len(model.alphabet.front(protein)) for protein in few)
    return min(MOST, max(least, front, _worth(cost_by_position(model, few))))


def _worth(cost: Tensor) -> int:
    """Tokens up to the last one among the first `MOST` that is worth keeping; cost float64 [T]."""
    ratio = cost[:MOST] / cost.mean().clamp_min(torch.finfo(cost.dtype).tiny)
    found = (ratio > WORTH).nonzero()
    return int(found[-1]) + 1 if len(found) else 0
