"""Proteins ↔ token ids: control tokens in front, a token for each residue, an end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.sequences.residues import SPELLED, count, slices
from turboesm_cli.sequences.tags import where

if TYPE_CHECKING:
    from torch import Tensor

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 standard residues, in the order of every distribution over residues."""


@dataclass(frozen=True, eq=False)
class Alphabet:
    """The tokens of a family of models, or of one model.

    family      what messages call it
    vocabulary  each token's text, by its id
    start, end  control tokens around a protein's residues
    padding     what fills up shorter sequences of a batch, on the right; -1 where it is no token
    mask        stands for a residue that is to be predicted; -1 where there is none
    """

    family: str
    vocabulary: tuple[str, ...]
    start: int
    padding: int
    end: int
    mask: int = -1
    residues: tuple[int, ...] = field(init=False)
    """Ids of AMINO_ACIDS."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Names of the tags that it is told, see `sequences.tags`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "residues", tuple(self.vocabulary.index(letter) for letter in AMINO_ACIDS))

    def __len__(self) -> int:
        return len(self.vocabulary)

    def front(self, protein: Protein) -> list[int]:
        """Ids of the control tokens before a protein's residues. Raises InputError where its header lacks them."""
        return [self.start]

    def tags(self, protein: Protein) -> str:
        """What of a protein's header its front follows from, in a form that gives the same front, or ""."""
        return ""

    def tokenize(self, protein: Protein) -> list[int]:
        """Ids of a whole protein: its front, its residues, its end.

        Raises InputError at what is no token; of ESM-2's letters `read_fasta` yields no others.
        """
        return [*self.front(protein), *self._body(protein, protein.sequence), self.end]

    def prompt(self, protein: Protein, residues: int | None = None) -> list[int]:
        """Ids of the front and the first `residues` residues, or all: where sampling goes on."""
        sequence = protein.sequence
        if residues is not None and residues < count(sequence):
            sequence = next(slices(sequence, residues)) if residues else ""
        return [*self.front(protein), *self._body(protein, sequence)]

    def length(self, protein: Protein) -> int:
        """Tokens of a whole protein."""
        return len(self.front(protein)) + protein.residues + 1

    def prompt_length(self, protein: Protein, residues: int | None = None) -> int:
        """How many of a whole protein's tokens its front and first residues are; None: all but its end."""
        return len(self.front(protein)) + (
            protein.residues if residues is None else min(residues, protein.residues)
        )

    def detokenize(self, ids: Iterable[int]) -> str:
        """Residues of ids, control tokens left out; the inverse of `tokenize`."""
        return "".join(self.vocabulary[token] for token in ids if token not in self._silent)

    def described(self) -> dict[str, Any]:
        """What a bundle keeps of it; see `families.alphabet_from`. Empty where the family tells it."""
        return {}

    def unknown(self, sequence: str) -> str | None:
        """The first letter of a sequence that is no token, or None."""
        return next((text for text in SPELLED.findall(sequence) if text not in self._id_of), None)

    def batch(self, proteins: Sequence[Protein]) -> Tensor:
        """Ids int64 [B, T] of proteins, padded on the right."""
        import torch

        return self.padded([torch.tensor(self.tokenize(protein)) for protein in proteins])

    def random(self, batch: int, length: int) -> Tensor:
        """Ids int64 [batch, length] of random residues, the same at every call: to measure time with."""
        import torch

        drawn = torch.randint(len(self.residues), (batch, length), generator=torch.Generator().manual_seed(0))
        return torch.tensor(self.residues)[drawn]

    def padded(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of ids as one tensor int64 [B, T]."""
        import torch

        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=self.padding)

    def lengths(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B] of each sequence of [B, T], padding left out."""
        return self.real(tokens).sum(-1)

    def real(self, tokens: Tensor) -> Tensor:
        """Which of tokens [...] are no padding, bool."""
        return tokens.ne(self.padding)

    def _body(self, protein: Protein, sequence: str) -> list[int]:
        try:
            return [self._id_of[text] for text in SPELLED.findall(sequence)]
        except KeyError as error:
            what = f"{error.args[0]!r} is no token of {self.family}; {self._instead}"
            raise InputError(where(protein) + what) from error

    @cached_property
    def sampled(self) -> tuple[int, ...]:
        """Tokens that sampling may give."""
        return self.residues

    @property
    def _instead(self) -> str:
        return "write X for an unknown residue" if "X" in self._id_of else "remove the record, or the residue"

    @cached_property
    def _silent(self) -> frozenset[int]:
        return frozenset({self.start, self.padding, self.end})

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.vocabulary) if token not in self._silent}
