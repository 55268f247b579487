"""What everything else needs of a protein language model: the seam that each family is behind.

`forward` runs any such model over a cache. Shapes: B sequences, T tokens, E channels of a hidden state, H heads of
d channels, V kinds of token.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol, Self

import torch
from torch import Tensor
from turboesm_kernels.token_tables import TokenTables

from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.shapes import Shape


class Model(Hashable, Protocol):
    """A loaded model.

    name         as it appears in bundles and results
    family       as `families` calls it
    shape        its size
    alphabet     its tokens
    causal       whether a token sees earlier ones alone when the model encodes a sequence
    fingerprint  sha256, in hex, of what its keys and values follow from, so that a bundle can tell its model
    has_lm_head  whether it can say which residue is likely
    is_random    weights are random: good for time and memory, never for accuracy
    note         what a user should know about these weights, or ""
    """

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def alphabet(self) -> Alphabet: ...
    @property
    def causal(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def has_lm_head(self) -> bool: ...
    @property
    def is_random(self) -> bool: ...
    @property
    def note(self) -> str: ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        ...

    @property
    def inverse_frequencies(self) -> Tensor:
        """RoPE's inverse frequencies float32 [d / 2], the same in every layer; 0 does not turn a pair."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """The model on another device or in another dtype."""
        ...

    def require_lm_head(self, purpose: str) -> None:
        """Raise ModelError where there is no language-model head to do `purpose` with."""
        ...

    def unmasked_fraction(self, tokens: Tensor) -> Tensor:
        """What embeddings of a prompt's tokens [B, T] are divided by, float32 [B, 1, 1]: 1 in most families."""
        ...

    def embed(self, tokens: Tensor, positions: Tensor, unmasked: Tensor) -> Tensor:
        """The first layer's input [B, T, E] of tokens int64 [B, T] at positions int [T] or [B, T].

        `unmasked` as `unmasked_fraction` gives it.
        """
        ...

    def attention_input(self, layer: int, x: Tensor) -> Tensor:
        """What queries, keys and values of hidden states x [B, T, E] are projections of: x, normed.

        Of the first layer's x; further layers are given theirs by `after_attention`.
        """
        ...

    def project(self, layer: int, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, d] (scaled), k and v [B, K, T, d] of `attention_input`, before RoPE; K key/value heads."""
        ...

    def joint_projection(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Weight [(H + 2 K) d, E] and bias of queries, keys, values; the model's own become views of them."""
        ...

    @property
    def query_scale(self) -> float:
        """What the joint projection's queries are still to be multiplied by."""
        ...

    def after_attention(self, layer: int, x: Tensor, normed: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output [B, T, E], and that normed: the next layer's attention input, or what is final.

        Of its input x [B, T, E], that normed, and its attention output [B, H, T, d]. A norm belongs to the sum
        that it is taken of, so that both can be one kernel.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., E]. Raises ModelError without a language-model head."""
        ...

    def first_layer_tables(self) -> TokenTables:
        """Layer 0's keys and values of every kind of token, for all prompts, in float32 at least."""
        ...

    def output_weight(self, layer: int) -> Tensor:
        """Weight [E, H d] of the attention's output projection."""
        ...


def learned_positions(model: Model) -> int:
    """How many positions a model has learned; 0 where it turns queries and keys instead."""
    return 0 if bool(model.inverse_frequencies.any()) else model.shape.context or 0
