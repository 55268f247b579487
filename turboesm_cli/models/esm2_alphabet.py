"""ESM-2's tokens."""

from __future__ import annotations

from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.sequences.residues import MASK_TEXT

ESM2_ALPHABET = Alphabet(
    "ESM-2",
    ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", MASK_TEXT),
    start=0,
    padding=1,
    end=2,
    mask=32,
)
