"""A `Decoder` → weights by Hugging Face's names and their configuration: `decoder_weights.build`, undone.

Queries are unscaled again, GPT-2's matrices transposed, GPT-J's channels in the order that its RoPE expects.
Embeddings, values and whatever else is as transformers has it are views of the model's own. Not for ProGen, of
which transformers has no class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboesm_cli.errors import ModelError
from turboesm_cli.models.decoder import Block, Decoder, Linear
from turboesm_cli.models.norms import Norm
from turboesm_cli.models.protocol import Model

Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Exported:
    """A model as Hugging Face's libraries take it.

    family    as config.json calls it, model_type
    settings  further fields of config.json
    weights   by their names, what is tied twice
    buffers   what follows from the settings and is in no checkpoint, by the last part of its name
    """

    family: str
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]


def check_exportable(model: Model) -> Decoder:
    """The model, where transformers has an autoregressive class of its kind. Raises ModelError."""
    if not isinstance(model, Decoder) or model.family not in _BLOCKS:
        served = ", ".join(sorted(_BLOCKS))
        raise ModelError(
            f"{model.name} is of the family {model.family}; transformers can decode the same models of {served}"
        )
    return model


def exported(model: Model) -> Exported:
    """A model for transformers. Raises ModelError where that has no autoregressive class of its kind."""
    decoder = check_exportable(model)
    tied = decoder.head.weight is decoder.embedding
    found = _llama_settings(decoder, tied) if decoder.gated else _gpt_settings(decoder, tied)
    return Exported(decoder.family, found, _weights(decoder), _buffers(decoder))


def _weights(model: Decoder) -> dict[str, Tensor]:
    prefix = "model." if model.gated else "transformer."
    found = {f"{prefix}{name}": tensor for name, tensor in _body(model)}
    return found | dict(_linear("lm_head", model.head))


def _buffers(model: Decoder) -> dict[str, Tensor]:
    """Inverse frequencies of RoPE; GPT-J's sines and cosines of all positions."""
    shape, turned = model.shape, model.frequencies[model.frequencies != 0]
    angles = torch.arange(shape.context or 0, device=turned.device).float()[:, None] * turned
    return {
        "inv_freq": model.frequencies,
        "original_inv_freq": model.frequencies,
        "embed_positions": torch.cat((angles.sin(), angles.cos()), 1),
    }


def _gpt_settings(model: Decoder, tied: bool) -> dict[str, Any]:
    shape = model.shape
    found = {
        "vocab_size": len(model.embedding), "n_positions": shape.context, "n_embd": shape.width,
        "n_layer": shape.layers, "n_head": shape.heads, "n_inner": len(model.blocks[0].up.weight),
        "activation_function": model.activation, "layer_norm_epsilon": model.last_norm.epsilon,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    return found if model.family == "gpt2" else found | {"rotary_dim": 2 * int(model.frequencies.count_nonzero())}


def _llama_settings(model: Decoder, tied: bool) -> dict[str, Any]:
    shape, block = model.shape, model.blocks[0]
    theta = float(model.frequencies[1].double()) ** -(shape.head_dim / 2)
    return {
        "vocab_size": len(model.embedding), "max_position_embeddings": shape.context, "hidden_size": shape.width,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "head_dim": shape.head_dim,
        "num_key_value_heads": shape.key_value_heads, "intermediate_size": len(block.up.weight) // 2,
        "hidden_act": model.activation, "rms_norm_eps": model.last_norm.epsilon, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "sliding_window": None,
        "attention_bias": block.joint.bias is not None, "mlp_bias": block.up.bias is not None,
    }  # fmt: skip


def _body(model: Decoder) -> Named:
    yield "embed_tokens.weight" if model.gated else "wte.weight", model.embedding
    if model.positions is not None:
        yield "wpe.weight", model.positions
    for index, block in enumerate(model.blocks):
        at = f"layers.{index}" if model.gated else f"h.{index}"
        yield from _BLOCKS[model.family](model, block, at)
    yield from _norm("norm" if model.gated else "ln_f", model.last_norm)


def _gpt2(model: Decoder, block: Block, at: str) -> Named:
    q, k, v = _queries_keys_values(model, block)
    assert block.mlp_norm is not None
    yield from _norm(f"{at}.ln_1", block.norm)
    yield from _conv(f"{at}.attn.c_attn", _below(q, k, v))
    yield from _conv(f"{at}.attn.c_proj", block.out)
    yield from _norm(f"{at}.ln_2", block.mlp_norm)
    yield from _conv(f"{at}.mlp.c_fc", block.up)
    yield from _conv(f"{at}.mlp.c_proj", block.down)


def _gptj(model: Decoder, block: Block, at: str) -> Named:
    q, k, v = _queries_keys_values(model, block)
    yield from _norm(f"{at}.ln_1", block.norm)
    for name, part in (("q", _interleaved(model, q)), ("k", _interleaved(model, k)), ("v", v)):
        yield from _linear(f"{at}.attn.{name}_proj", part)
    yield from _linear(f"{at}.attn.out_proj", block.out)
    yield from _linear(f"{at}.mlp.fc_in", block.up)
    yield from _linear(f"{at}.mlp.fc_out", block.down)


def _llama(model: Decoder, block: Block, at: str) -> Named:
    assert block.mlp_norm is not None
    yield from _norm(f"{at}.input_layernorm", block.norm)
    for name, part in zip("qkv", _queries_keys_values(model, block), strict=True):
        yield from _linear(f"{at}.self_attn.{name}_proj", part)
    yield from _linear(f"{at}.self_attn.o_proj", block.out)
    yield from _norm(f"{at}.post_attention_layernorm", block.mlp_norm)
    inner = len(block.up.weight) // 2
    for name, part in zip(("gate", "up"), _split(block.up, [inner, inner]), strict=True):
        yield from _linear(f"{at}.mlp.{name}_proj", part)
    yield from _linear(f"{at}.mlp.down_proj", block.down)


_BLOCKS = {"gpt2": _gpt2, "gptj": _gptj, "llama": _llama, "mistral": _llama}


def _queries_keys_values(model: Decoder, block: Block) -> list[Linear]:
    """The parts of the joint projection, queries no longer scaled."""
    shape = model.shape
    heads = (shape.heads, shape.key_value_heads, shape.key_value_heads)
    q, k, v = _split(block.joint, [count * shape.head_dim for count in heads])
    bias = None if q.bias is None else _unscaled(q.bias, shape.head_dim)
    return [Linear(_unscaled(q.weight, shape.head_dim), bias), k, v]


def _unscaled(x: Tensor, head_dim: int) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * head_dim**0.5).to(x.dtype)


def _interleaved(model: Decoder, part: Linear) -> Linear:
    """Channel i and i + d / 2 of each head beside each other, as GPT-J turns them."""
    heads = part.weight.unflatten(0, (model.shape.heads, 2, -1))
    return Linear(heads.transpose(1, 2).reshape(part.weight.shape), None)


def _split(joint: Linear, sizes: list[int]) -> list[Linear]:
    """Matrices that lie below each other: views."""
    biases = [None] * len(sizes) if joint.bias is None else list(joint.bias.split(sizes))
    return [Linear(weight, bias) for weight, bias in zip(joint.weight.split(sizes), biases, strict=True)]


def _below(*parts: Linear) -> Linear:
    biases = [part.bias for part in parts if part.bias is not None]
    return Linear(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)


def _linear(name: str, part: Linear) -> Named:
    yield f"{name}.weight", part.weight
    if part.bias is not None:
        yield f"{name}.bias", part.bias


def _conv(name: str, part: Linear) -> Named:
    yield from _linear(name, part._replace(weight=part.weight.T.contiguous()))


def _norm(name: str, part: Norm) -> Named:
    yield f"{name}.weight", part.weight
    if part.bias is not None:
        yield f"{name}.bias", part.bias
