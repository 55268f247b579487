"""Weights of autoregressive models by Hugging Face's names → a `Decoder`, every one of them checked and used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from turboesm_cli.errors import ModelError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.decoder import Block, Decoder, Linear
from turboesm_cli.models.decoder_config import UNUSED, Layout
from turboesm_cli.models.norms import Norm
from turboesm_cli.models.shapes import Shape
from turboesm_cli.models.weights import same, widened

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_PARTITIONS = 8
"""ProGen's joint projection is written in 8 parts, each with queries, values and keys of its own."""


@dataclass(frozen=True)
class DecoderCheckpoint:
    """What a folder of an autoregressive model holds: weights by Hugging Face's names."""

    name: str
    layout: Layout
    alphabet: Alphabet
    weights: dict[str, Tensor]
    is_random: bool = False
    note: str = ""


def frequencies(layout: Layout) -> Tensor:
    """As `decoder.Decoder.frequencies`."""
    found, turned = torch.zeros(layout.shape.head_dim // 2), layout.turned
    found[: turned // 2] = 1.0 / layout.theta ** (torch.arange(0, turned, 2).float() / max(1, turned))
    return found


def channel_order(layout: Layout) -> Tensor:
    """Where each channel of a head comes from, int64 [d]: pairs that RoPE turns lie half a head apart here."""
    channels = torch.arange(layout.shape.head_dim)
    return torch.cat((channels[::2], channels[1::2])) if layout.interleaved else channels


class _Weights:
    """Weights to be taken one by one, each once."""

    def __init__(self, found: DecoderCheckpoint) -> None:
        prefix = "model." if found.layout.gated else "transformer."
        self._left = {name.removeprefix(prefix): tensor for name, tensor in found.weights.items()}
        self._where = found.name
        if len(self._left) != len(found.weights):
            raise ModelError(f"{found.name} holds weights with and without {prefix!r}; save it again")

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int) -> Tensor:
        """A weight of this shape. Raises ModelError."""
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise ModelError(f"{self._where}: {name} is missing")
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{self._where}: {name} is {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{self._where}: {name} is stored as {dtype}: save the model in float16 or float32")
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{self._where}: {name} holds what is no number")
        return tensor

    def linear(self, name: str, out: int, into: int, bias: bool) -> Linear:
        """A matrix [out, in], with its bias."""
        return Linear(self.take(f"{name}.weight", out, into), self.take(f"{name}.bias", out) if bias else None)

    def conv(self, name: str, out: int, into: int) -> Linear:
        """GPT-2's matrices are stored transposed."""
        return Linear(self.take(f"{name}.weight", into, out).T.contiguous(), self.take(f"{name}.bias", out))

    def norm(self, name: str, width: int, epsilon: float, rms: bool = False) -> Norm:
        """A norm's weights."""
        return Norm(self.take(f"{name}.weight", width), None if rms else self.take(f"{name}.bias", width), epsilon)

    def finish(self) -> None:
        """Raise ModelError where a weight was not used: the model is more than what was read."""
        left = sorted(name for name in self._left if not UNUSED.fullmatch(name))
        if left:
            raise ModelError(
                f"{self._where} has {left[0][:200]!r}, which its kind of model does not have ({len(left)} such "
                "weights): if it computes the same without them, save it without"
            )


def build(found: DecoderCheckpoint) -> Decoder:
    """The model of a checkpoint, in the dtypes of its weights. Raises ModelError."""
    layout, weights = found.layout, _Weights(found)
    width, vocabulary = layout.shape.width, layout.vocabulary
    if len(found.alphabet) > vocabulary:
        raise ModelError(
            f"{found.name}: its tokenizer has {len(found.alphabet)} tokens, its embedding {vocabulary}"
        )
    read = _BLOCKS[layout.family]
    gated = layout.gated
    embedding = weights.take("embed_tokens.weight" if gated else "wte.weight", vocabulary, width)
    learned = layout.family == "gpt2"
    assert layout.shape.context is not None
    model = Decoder(
        found.name, layout.family, layout.shape, found.alphabet, "",
        embedding,
        weights.take("wpe.weight", layout.shape.context, width) if learned else None,
        frequencies(layout),
        tuple(read(weights, layout, index) for index in range(layout.shape.layers)),
        weights.norm("norm" if gated else "ln_f", width, layout.epsilon, gated),
        _head(weights, layout, embedding, found.name),
        layout.activation, gated, found.is_random, found.note,
    )  # fmt: skip
    weights.finish()
    model = replace(model, blocks=tuple(_with_scaled_queries(block, layout.shape) for block in model.blocks))
    count = sum(x.numel() for name, x in _tensors(model, "", {}) if name != ".frequencies")
    shape = replace(layout.shape, own_parameters=count)
    return replace(model, shape=shape, fingerprint=_fingerprint(model))


def _head(weights: _Weights, layout: Layout, embedding: Tensor, name: str) -> Linear:
    """The language-model head: the embedding where it is tied. Raises ModelError where the two differ."""
    bias = layout.family in ("gptj", "progen")
    if not layout.tied:
        return weights.linear("lm_head", layout.vocabulary, layout.shape.width, bias)
    if "lm_head.weight" in weights and not same(
        weights.take("lm_head.weight", layout.vocabulary, layout.shape.width), embedding
    ):
        raise ModelError(
            f"{name}: lm_head.weight is not the embedding; where that is meant, save the model with "
            "tie_word_embeddings false in config.json"
        )
    return Linear(embedding, weights.take("lm_head.bias", layout.vocabulary) if bias else None)


def _gpt2(weights: _Weights, layout: Layout, index: int) -> Block:
    at, width, epsilon = f"h.{index}", layout.shape.width, layout.epsilon
    return Block(
        weights.norm(f"{at}.ln_1", width, epsilon),
        weights.conv(f"{at}.attn.c_attn", 3 * width, width),
        weights.conv(f"{at}.attn.c_proj", width, width),
        weights.norm(f"{at}.ln_2", width, epsilon),
        weights.conv(f"{at}.mlp.c_fc", layout.inner, width),
        weights.conv(f"{at}.mlp.c_proj", width, layout.inner),
    )


def _gptj(weights: _Weights, layout: Layout, index: int) -> Block:
    at, width = f"h.{index}", layout.shape.width
    own = [weights.take(f"{at}.attn.{name}_proj.weight", width, width) for name in "qkv"]
    return _parallel(weights, layout, at, own)


def _progen(weights: _Weights, layout: Layout, index: int) -> Block:
    at, width = f"h.{index}", layout.shape.width
    parts = weights.take(f"{at}.attn.qkv_proj.weight", 3 * width, width).unflatten(0, (_PARTITIONS, 3, -1))
    q, v, k = (parts[:, part].flatten(0, 1) for part in range(3))
    return _parallel(weights, layout, at, [q, k, v])


def _parallel(weights: _Weights, layout: Layout, at: str, own: list[Tensor]) -> Block:
    """GPT-J's block: attention and feed-forward part side by side; queries' and keys' channels in our order."""
    shape, width = layout.shape, layout.shape.width
    for side in range(2):
        own[side] = own[side].unflatten(0, (shape.heads, -1))[:, channel_order(layout)].flatten(0, 1)
    return Block(
        weights.norm(f"{at}.ln_1", width, layout.epsilon),
        Linear(torch.cat(own), None),
        weights.linear(f"{at}.attn.out_proj", width, width, False),
        None,
        weights.linear(f"{at}.mlp.fc_in", layout.inner, width, True),
        weights.linear(f"{at}.mlp.fc_out", width, layout.inner, True),
    )


def _llama(weights: _Weights, layout: Layout, index: int) -> Block:
    at, shape, width = f"layers.{index}", layout.shape, layout.shape.width
    sizes = [heads * shape.head_dim for heads in (shape.heads, shape.key_value_heads, shape.key_value_heads)]
    own = [
        weights.linear(f"{at}.self_attn.{name}_proj", size, width, layout.attention_bias)
        for name, size in zip("qkv", sizes, strict=True)
    ]
    mlp = [
        weights.linear(f"{at}.mlp.{name}_proj", layout.inner, width, layout.mlp_bias) for name in ("gate", "up")
    ]
    return Block(
        weights.norm(f"{at}.input_layernorm", width, layout.epsilon, rms=True),
        _below(own),
        weights.linear(f"{at}.self_attn.o_proj", width, sizes[0], layout.attention_bias),
        weights.norm(f"{at}.post_attention_layernorm", width, layout.epsilon, rms=True),
        _below(mlp),
        weights.linear(f"{at}.mlp.down_proj", width, layout.inner, layout.mlp_bias),
    )


def _with_scaled_queries(block: Block, shape: Shape) -> Block:
    """The block with queries multiplied by d^-1/2 once and for all, in float32 at least."""
    rows = torch.ones(len(block.joint.weight), device=block.joint.weight.device)
    rows[: shape.heads * shape.head_dim] = shape.head_dim**-0.5
    weight, bias = block.joint
    scaled = Linear(widened(weight) * rows[:, None], None if bias is None else widened(bias) * rows)
    return replace(block, joint=scaled)


def _below(parts: list[Linear]) -> Linear:
    """Matrices below each other."""
    biases = [part.bias for part in parts if part.bias is not None]
    return Linear(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)


_BLOCKS: dict[str, Callable[[_Weights, Layout, int], Block]] = {
    "gpt2": _gpt2, "gptj": _gptj, "progen": _progen, "llama": _llama, "mistral": _llama,
}  # fmt: skip


def _tensors(part: Any, name: str, seen: dict[int, str]) -> Iterable[tuple[str, Tensor]]:
    """A model's tensors by name, what is tied once."""
    if isinstance(part, Tensor):
        if id(part) not in seen:
            seen[id(part)] = name
            yield name, part
    elif isinstance(part, tuple):
        for index, each in enumerate(part):
            yield from _tensors(each, f"{name}.{index}", seen)
    elif isinstance(part, Block | Decoder):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name), f"{name}.{field.name}", seen)


def _fingerprint(model: Decoder) -> str:
    """sha256 of settings, tokens, and up to 65,536 evenly spaced values of every weight, in float32."""
    settings = (
        model.family, replace(model.shape, own_parameters=None), model.activation, model.last_norm.epsilon,
        model.alphabet.vocabulary,
    )  # fmt: skip
    digest = hashlib.sha256(repr(settings).encode())
    for name, weight in _tensors(model, "", {}):
        if name.startswith(".head"):  # keys and values do not depend on it
            continue
        flat = weight.flatten()
        sample = flat[:: max(1, flat.numel() // 65536)].float().cpu().contiguous()
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
