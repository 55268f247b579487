"""The families of models that there are, and what is known of each without loading one."""

from __future__ import annotations

from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.checkpoints import empty_net
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.shapes import Shape

ALPHABETS = {"esm2": ESM2_ALPHABET}
FIRST = "esm2"
"""The family of bundles and caches that name none."""


def alphabet_of(family: str = FIRST) -> Alphabet:
    """A family's tokens."""
    return ALPHABETS[family]


def parameter_count(shape: Shape) -> int:
    """Weights of a model of this shape, its language-model head included."""
    return sum(weight.numel() for weight in empty_net(shape).state_dict().values())
