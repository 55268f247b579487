"""Autoregressive models of known shapes with random weights: to measure time and memory, never accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from turboesm_cli.models.alphabet import AMINO_ACIDS
from turboesm_cli.models.decoder_alphabets import NO_TOKEN, Plain
from turboesm_cli.models.decoder_config import Layout
from turboesm_cli.models.decoder_weights import DecoderCheckpoint
from turboesm_cli.models.random_shapes import layout_of, weight_sizes


def random_decoder(name: str) -> DecoderCheckpoint:
    """Seeded random weights, scaled so that activations stay of order one."""
    layout = layout_of(name)
    texts = ("<bos>", "<eos>", *AMINO_ACIDS)
    vocabulary = texts + tuple(f"<unused_{token}>" for token in range(len(texts), layout.vocabulary))
    alphabet = Plain(name, vocabulary, 0, NO_TOKEN, 1)
    note = f"random weights in the shape of {name}: for time and memory, never for accuracy"
    return DecoderCheckpoint(f"random_{name}", layout, alphabet, _weights(layout), is_random=True, note=note)


def _weights(layout: Layout) -> dict[str, Tensor]:
    """By Hugging Face's names: matrices random, norms 1, biases 0."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, size in weight_sizes(layout):
        if len(size) == 1:
            found[name] = torch.ones(size) if name.endswith(".weight") else torch.zeros(size)
        else:
            found[name] = torch.randn(size, generator=generator) * (2.0 / sum(size)) ** 0.5
    return found
