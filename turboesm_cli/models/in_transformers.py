"""A model that Hugging Face's transformers holds in memory → the same as turboesm reads it.

Nothing of theirs is imported: weights go by the names that `decoder_weights` reads, as in a folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboesm_cli.errors import ModelError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.checkpoints import read_checkpoint
from turboesm_cli.models.decoder import Decoder, Linear
from turboesm_cli.models.decoder_config import read_layout
from turboesm_cli.models.decoder_weights import DecoderCheckpoint, build, channel_order
from turboesm_cli.models.protocol import Model

SERVED = ("gpt2", "gptj", "llama", "mistral")
"""Values of model_type that transformers has classes of, and turboesm reads."""


@dataclass(frozen=True)
class Loaded:
    """A model of transformers, on the host.

    dtype  of its weights
    order  where each channel of a query's or key's head comes from, int64 [d]; None where that is the same place
    """

    model: Decoder
    dtype: torch.dtype
    order: Tensor | None


@torch.no_grad()
def read_loaded(name: str, config: dict[str, Any], weights: dict[str, Tensor], alphabet: Alphabet) -> Loaded:
    """The model of a configuration, as config.json has it, and of weights by name; `alphabet`: its tokens.

    Raises ModelError for a model that is not served.
    """
    layout = read_layout(config, Path(name) / "config.json")
    held = {key: weight.cpu() for key, weight in weights.items()}
    model = build(DecoderCheckpoint(name, layout, alphabet, held))
    return Loaded(model, model.dtype, channel_order(layout) if layout.interleaved else None)


@torch.no_grad()
def unrounded(loaded: Loaded) -> Model:
    """The model of the files that a model's name leads to, of which it is a rounded copy.

    Raises ModelError where they cannot be read, or where their weights, rounded, are not the model's.
    """
    name, dtype = loaded.model.name, loaded.dtype
    found = read_checkpoint(name)
    if isinstance(found, DecoderCheckpoint):
        held = {key: weight.to(dtype) for key, weight in found.weights.items()}
        copy = build(replace(found, weights=held, alphabet=loaded.model.alphabet))
        if copy.fingerprint == loaded.model.fingerprint:
            return build(found)
    raise ModelError(f"the weights are not those of {name}, rounded to {str(dtype).removeprefix('torch.')}")


def for_caches(loaded: Loaded, keeps_tokens: bool) -> Model:
    """What caches need of a model: where they keep tokens, its first layer and embeddings, else next to nothing.

    It can tell its shape and frequencies, and make `first_layer_tables`; it cannot run.
    """
    model = loaded.model
    if keeps_tokens:
        return replace(model, blocks=model.blocks[:1], head=Linear(model.embedding, None))
    embedding = model.embedding[:1].clone()
    return replace(model, blocks=(), embedding=embedding, positions=None, head=Linear(embedding, None))
