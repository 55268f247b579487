"""The families of models that there are, and what is known of each without loading one."""

from __future__ import annotations

from typing import Any

from turboesm_cli.models.alphabet import Alphabet
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
    width, kinds = shape.width, len(ESM2_ALPHABET)
    square, norm = width * width + width, 2 * width
    layer = 4 * square + 2 * (4 * width * width) + 5 * width + 2 * norm + shape.head_dim // 2
    contacts, head = shape.layers * shape.heads + 1, square + norm + kinds * width + kinds
    return kinds * width + shape.layers * layer + norm + contacts + head
