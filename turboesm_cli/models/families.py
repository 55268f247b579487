"""The families of models that there are, and what is known of each without loading one."""

from __future__ import annotations

from typing import Any

from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.checkpoints import empty_net
from turboesm_cli.models.decoder_alphabets import alphabet_from
from turboesm_cli.models.decoder_config import FAMILIES as DECODERS
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.shapes import Shape

FIRST = "esm2"
"""The family of bundles and caches that name none."""

FAMILIES = (FIRST, *DECODERS)


def alphabet_of(family: str = FIRST, described: dict[str, Any] | None = None) -> Alphabet:
    """A family's tokens; those of an autoregressive model as its bundle describes them.

    Raises LookupError, TypeError or ValueError where the description is none.
    """
    return ESM2_ALPHABET if family == FIRST else alphabet_from(described or {})


def is_causal(family: str) -> bool:
    """Whether its models see earlier tokens alone, so that a cache is exact."""
    return family != FIRST


def parameter_count(shape: Shape) -> int:
    """Weights of a model of this shape, its language-model head included."""
    if shape.own_parameters is not None:
        return shape.own_parameters
    return sum(weight.numel() for weight in empty_net(shape).state_dict().values())
