"""Autoregressive models of known shapes, which random weights are made for. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from turboesm_cli.models.decoder_config import Layout
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


def layout_of(name: str) -> Layout:
    """The settings of a model in `SHAPES`."""
    shape, rows, inner, rest = SHAPES[name]
    learned = rest["family"] == "gpt2"
    return Layout(
        rest["family"], shape, rows, inner, rest["activation"], 1e-5,
        0 if learned else shape.head_dim, 10000.0,
        interleaved=False, tied=learned, attention_bias=False, mlp_bias=False,
    )  # fmt: skip


def whole_shape(name: str) -> Shape:
    """The shape of a model in `SHAPES`, with the number of its weights."""
    layout = layout_of(name)
    return replace(layout.shape, own_parameters=sum(prod(size) for _, size in weight_sizes(layout)))


def weight_sizes(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face's name and the size of each weight; what has one dimension is a norm's or a bias."""
    shape, inner, rows = layout.shape, layout.inner, layout.vocabulary
    width, own = shape.width, shape.heads * shape.head_dim
    few = shape.key_value_heads * shape.head_dim

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        if not layout.gated:
            yield f"{name}.bias", (width,)

    yield ("embed_tokens.weight" if layout.gated else "wte.weight"), (rows, width)
    for index in range(shape.layers):
        if layout.gated:
            at = f"layers.{index}"
            for name, out, into in (
                ("self_attn.q_proj", own, width), ("self_attn.k_proj", few, width),
                ("self_attn.v_proj", few, width), ("self_attn.o_proj", width, own),
                ("mlp.gate_proj", inner, width), ("mlp.up_proj", inner, width),
                ("mlp.down_proj", width, inner),
            ):  # fmt: skip
                yield f"{at}.{name}.weight", (out, into)
            yield from norm(f"{at}.input_layernorm")
            yield from norm(f"{at}.post_attention_layernorm")
            continue
        at = f"h.{index}"
        yield from norm(f"{at}.ln_1")
        if layout.family == "gpt2":  # stored transposed
            yield from norm(f"{at}.ln_2")
            for name, out, into in (
                ("attn.c_attn", 3 * width, width), ("attn.c_proj", width, width),
                ("mlp.c_fc", inner, width), ("mlp.c_proj", width, inner),
            ):  # fmt: skip
                yield f"{at}.{name}.weight", (into, out)
                yield f"{at}.{name}.bias", (out,)
        else:
            yield f"{at}.attn.qkv_proj.weight", (3 * width, width)
            yield f"{at}.attn.out_proj.weight", (width, width)
            for name, out, into in (("mlp.fc_in", inner, width), ("mlp.fc_out", width, inner)):
                yield f"{at}.{name}.weight", (out, into)
                yield f"{at}.{name}.bias", (out,)
    yield from norm("norm" if layout.gated else "ln_f")
    if layout.family == "gpt2":
        yield "wpe.weight", (shape.context or 0, width)
    if not layout.tied:
        yield "lm_head.weight", (rows, width)
        if not layout.gated:
            yield "lm_head.bias", (rows,)
