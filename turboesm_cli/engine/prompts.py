"""How much of a protein is prompt: `all`, a fraction (`0.5`) or a number of residues (`40`). Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turboesm_cli.errors import InputError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.sequences.fasta import Protein

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A protein, how many of its tokens are prompt, and what gives the tensors of a cache of them, or None.

    `alphabet` is that of the model that decodes it.
    """

    protein: Protein
    cached: int
    alphabet: Alphabet
    held: Callable[[], Mapping[str, Tensor]] | None = None

    @property
    def tokens(self) -> Tensor:
        """Ids int64 [T] of the whole protein."""
        import torch

        return torch.tensor(self.alphabet.tokenize(self.protein))

    @property
    def length(self) -> int:
        """Tokens of the whole protein."""
        return self.alphabet.length(self.protein)

    @property
    def text(self) -> str:
        """The residues that are prompt, as they were read where that is all."""
        if self.cached >= self.alphabet.prompt_length(self.protein):
            return self.protein.sequence
        return self.alphabet.detokenize(self.tokens[: self.cached].tolist())


def parse_prompt(text: str, alphabet: Alphabet) -> Callable[[Protein], int]:
    """The number of prompt tokens, control tokens counted, of each protein. Raises InputError for other texts.

    A prompt has at least the front and at most all but the end, so that a token is left to decode.
    """
    if text == "all":
        return alphabet.prompt_length
    if text.isascii() and text.isdigit():
        return lambda protein: alphabet.prompt_length(protein, int(text))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise InputError(f"--prompt {text}: give 'all', a fraction below 1 (0.5) or a number of residues (40)")
    return lambda protein: alphabet.prompt_length(protein, int(protein.residues * value))
