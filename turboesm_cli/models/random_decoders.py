"""Autoregressive models of known shapes with random weights: to measure time and memory, never accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from turboesm_cli.models.alphabet import AMINO_ACIDS
from turboesm_cli.models.decoder_alphabets import NO_TOKEN, Plain
from turboesm_cli.models.decoder_config import Layout
from turboesm_cli.models.decoder_weights import DecoderCheckpoint
from turboesm_cli.models.shapes import Shape

_GPT2 = {"family": "gpt2", "activation": "gelu_new"}
_PROGEN = {"family": "progen", "activation": "gelu_new"}
_LLAMA = {"family": "llama", "activation": "silu"}

SHAPES: dict[str, tuple[Shape, int, int, dict[str, str]]] = {
    "protgpt2": (Shape(36, 1280, 20, context=1024), 50257, 5120, _GPT2),
    "progen2-small": (Shape(12, 1024, 16, context=2048), 32, 4096, _PROGEN),
    "progen2-large": (Shape(32, 2560, 32, context=2048), 32, 10240, _PROGEN),
    "progen2-xlarge": (Shape(32, 4096, 16, context=2048), 32, 16384, _PROGEN),
    "llama-1b-gqa": (Shape(16, 4096, 32, 128, 8, context=4096), 128, 14336, _LLAMA),
}
"""Shape, rows of the embedding, channels of the feed-forward part and the rest, by name."""


def random_decoder(name: str) -> DecoderCheckpoint:
    """Seeded random weights, scaled so that activations stay of order one."""
    shape, rows, inner, rest = SHAPES[name]
    turned = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    learned = rest["family"] == "gpt2"
    layout = Layout(
        rest["family"], shape, rows, inner, rest["activation"], 1e-5,
        torch.zeros(shape.head_dim // 2) if learned else 1.0 / 10000**turned, torch.arange(shape.head_dim),
        tied=learned, attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    texts = ("<bos>", "<eos>", *AMINO_ACIDS)
    vocabulary = texts + tuple(f"<unused_{token}>" for token in range(len(texts), rows))
    alphabet = Plain(name, vocabulary, 0, NO_TOKEN, 1)
    note = f"random weights in the shape of {name}: for time and memory, never for accuracy"
    return DecoderCheckpoint(f"random_{name}", layout, alphabet, _weights(layout), is_random=True, note=note)


def _weights(layout: Layout) -> dict[str, Tensor]:
    """By Hugging Face's names."""
    generator = torch.Generator().manual_seed(0)
    shape, inner, rows = layout.shape, layout.inner, layout.vocabulary
    width, own = shape.width, shape.heads * shape.head_dim
    few = shape.key_value_heads * shape.head_dim
    found: dict[str, Tensor] = {}

    def matrix(name: str, out: int, into: int) -> None:
        found[f"{name}.weight"] = torch.randn(out, into, generator=generator) * (2.0 / (out + into)) ** 0.5

    def flat(name: str, size: int, weight: bool = False) -> None:
        if weight:
            found[f"{name}.weight"] = torch.ones(size)
        if not layout.gated:
            found[f"{name}.bias"] = torch.zeros(size)

    matrix("embed_tokens" if layout.gated else "wte", rows, width)
    for index in range(shape.layers):
        if layout.gated:
            at = f"layers.{index}"
            for name, out, into in (
                ("self_attn.q_proj", own, width), ("self_attn.k_proj", few, width),
                ("self_attn.v_proj", few, width), ("self_attn.o_proj", width, own),
                ("mlp.gate_proj", inner, width), ("mlp.up_proj", inner, width),
                ("mlp.down_proj", width, inner),
            ):  # fmt: skip
                matrix(f"{at}.{name}", out, into)
            for name in ("input_layernorm", "post_attention_layernorm"):
                flat(f"{at}.{name}", width, weight=True)
        else:
            at = f"h.{index}"
            flat(f"{at}.ln_1", width, weight=True)
            if layout.family == "gpt2":  # stored transposed
                flat(f"{at}.ln_2", width, weight=True)
                for name, out, into in (
                    ("attn.c_attn", 3 * width, width), ("attn.c_proj", width, width),
                    ("mlp.c_fc", inner, width), ("mlp.c_proj", width, inner),
                ):  # fmt: skip
                    matrix(f"{at}.{name}", into, out)
                    flat(f"{at}.{name}", out)
            else:
                matrix(f"{at}.attn.qkv_proj", 3 * width, width)
                matrix(f"{at}.attn.out_proj", width, width)
                for name, out, into in (("mlp.fc_in", inner, width), ("mlp.fc_out", width, inner)):
                    matrix(f"{at}.{name}", out, into)
                    flat(f"{at}.{name}", out)
    flat("norm" if layout.gated else "ln_f", width, weight=True)
    if layout.family == "gpt2":
        matrix("wpe", shape.context or 0, width)
    if not layout.tied:
        matrix("lm_head", rows, width)
        flat("lm_head", rows)
    return found
