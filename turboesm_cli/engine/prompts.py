"""How much of a protein is prompt: `all`, a fraction (`0.5`) or a number of residues (`40`)."""

from __future__ import annotations

from collections.abc import Callable

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import Protein


def parse_prompt(text: str) -> Callable[[Protein], int]:
    """The number of prompt tokens, `<cls>` counted, of each protein. Raises InputError for other texts.

    A prompt has at least `<cls>` and at most `<cls>` and all residues, so that a token is left to decode.
    """
    if text == "all":
        return lambda protein: protein.residues + 1
    if text.isascii() and text.isdigit():
        return lambda protein: 1 + min(int(text), protein.residues)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise InputError(f"--prompt {text}: give 'all', a fraction below 1 (0.5) or a number of residues (40)")
    return lambda protein: 1 + int(protein.residues * value)
