"""Sequences of letters ↔ token ids of ESM-2."""

from __future__ import annotations

from collections.abc import Iterable

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.residues import MASK_TEXT, SPELLED

CLS, PAD, EOS, UNK, MASK = 0, 1, 2, 3, 32
VOCABULARY = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", MASK_TEXT)

_SILENT = frozenset({CLS, PAD, EOS})
_TOKEN_OF = {text: token for token, text in enumerate(VOCABULARY) if token not in _SILENT}


def tokenize(sequence: str) -> list[int]:
    """Return the token ids of `sequence`, <cls> first and <eos> last.

    Raises InputError at what is no token of ESM-2; `read_fasta` yields no such sequence.
    """
    try:
        residues = [_TOKEN_OF[text] for text in SPELLED.findall(sequence)]
    except KeyError as error:
        raise InputError(f"{error.args[0]!r} is no token of ESM-2; write X for an unknown residue") from error
    return [CLS, *residues, EOS]


def detokenize(tokens: Iterable[int]) -> str:
    """Return the text of `tokens` without <cls>, <eos> and <pad>; the inverse of `tokenize`."""
    return "".join(VOCABULARY[token] for token in tokens if token not in _SILENT)
