"""Sequences of letters ↔ token ids, where a token is a residue or a control token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.residues import SPELLED

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 standard residues, in the order of every distribution over residues."""


@dataclass(frozen=True, eq=False)
class Alphabet:
    """The tokens of a family of models.

    family      what messages call the family
    vocabulary  each token's text, by its id
    start, end  control tokens around a protein's residues
    padding     what fills up shorter sequences of a batch, on the right
    mask        stands for a residue that is to be predicted
    """

    family: str
    vocabulary: tuple[str, ...]
    start: int
    padding: int
    end: int
    mask: int
    residues: tuple[int, ...] = field(init=False)
    """Ids of AMINO_ACIDS."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "residues", tuple(self.vocabulary.index(letter) for letter in AMINO_ACIDS))

    def __len__(self) -> int:
        return len(self.vocabulary)

    @property
    def control(self) -> int:
        """Control tokens of a sequence: its length in tokens is that of its residues, and these."""
        return 2

    def tokenize(self, sequence: str) -> list[int]:
        """Ids of a sequence, its start and its end.

        Raises InputError at what is no token; `read_fasta` yields no such sequence.
        """
        try:
            residues = [self._id_of[text] for text in SPELLED.findall(sequence)]
        except KeyError as error:
            raise InputError(
                f"{error.args[0]!r} is no token of {self.family}; write X for an unknown residue"
            ) from error
        return [self.start, *residues, self.end]

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of ids without start, end and padding; the inverse of `tokenize`."""
        return "".join(self.vocabulary[token] for token in ids if token not in self._silent)

    def batch(self, sequences: Sequence[str]) -> Tensor:
        """Ids int64 [B, T] of sequences, padded on the right."""
        rows = [torch.tensor(self.tokenize(sequence)) for sequence in sequences]
        return self.padded(rows)

    def random(self, batch: int, length: int) -> Tensor:
        """Ids int64 [batch, length] of random residues, the same at every call: to measure time with."""
        drawn = torch.randint(len(self.residues), (batch, length), generator=torch.Generator().manual_seed(0))
        return torch.tensor(self.residues)[drawn]

    def padded(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of ids as one tensor int64 [B, T]."""
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=self.padding)

    def lengths(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B] of each sequence of [B, T], padding left out."""
        return self.real(tokens).sum(-1)

    def real(self, tokens: Tensor) -> Tensor:
        """Which of tokens [...] are no padding, bool."""
        return tokens.ne(self.padding)

    @cached_property
    def _silent(self) -> frozenset[int]:
        return frozenset({self.start, self.padding, self.end})

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.vocabulary) if token not in self._silent}
