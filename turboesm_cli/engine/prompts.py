"""How much of a protein is prompt: `all`, a fraction (`0.5`) or a number of residues (`40`)."""

from __future__ import annotations

from collections.abc import Callable

from turboesm_cli.errors import InputError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.sequences.fasta import Protein


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
