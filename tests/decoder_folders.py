"""Hugging Face folders of tiny autoregressive models with random weights, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
VOCABULARY = ("<pad>", "<bos>", "<eos>", *AMINO_ACIDS, "X", "<unk>")
BOS, EOS = VOCABULARY.index("<bos>"), VOCABULARY.index("<eos>")
ROWS = 32
"""Of the embedding: some have no token."""
CONTEXT = 256

_GPT2 = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT}
_GPTJ = {**_GPT2, "n_embd": 64, "rotary_dim": 8}
_LLAMA = {
    "hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4, "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "gpt2 n_inner": ("GPT2", {**_GPT2, "n_inner": 40}),
    "gpt2 untied relu": ("GPT2", {**_GPT2, "tie_word_embeddings": False, "activation_function": "relu"}),
    "gptj half turned": ("GPTJ", _GPTJ),
    "gptj all turned": ("GPTJ", {**_GPTJ, "rotary_dim": 16, "n_inner": 72}),
    "gptj tied": ("GPTJ", {**_GPTJ, "tie_word_embeddings": True}),
    "llama 1:1": ("Llama", {**_LLAMA, "num_key_value_heads": 4}),
    "llama 2:1": ("Llama", {**_LLAMA, "num_key_value_heads": 2}),
    "llama 8:1": ("Llama", {**_LLAMA, "num_attention_heads": 8, "num_key_value_heads": 1}),
    "llama biases": ("Llama", {**_LLAMA, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "llama attention_bias": ("Llama", {**_LLAMA, "attention_bias": True, "rope_theta": 500.0}),
    "llama mlp_bias tied": ("Llama", {**_LLAMA, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama own head_dim": ("Llama", {**_LLAMA, "head_dim": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "mistral": ("Mistral", {**_LLAMA, "num_key_value_heads": 2, "sliding_window": None}),
    "mistral window": ("Mistral", {**_LLAMA, "num_key_value_heads": 2, "sliding_window": 4096}),
    "mistral short window": ("Mistral", {**_LLAMA, "num_key_value_heads": 2, "sliding_window": 64}),
}
"""Name → transformers' class and its configuration."""


def tiny_net(case: str) -> Any:
    """transformers' model of a case, its weights large enough that attention is far from uniform."""
    import transformers

    kind, settings = CASES[case]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=ROWS, bos_token_id=BOS, eos_token_id=EOS, **settings
    )
    net = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        is_norm = weight.ndim == 1 and name.endswith("weight")
        weight.data = 1 + 0.2 * noise if is_norm else (0.3 if weight.ndim == 2 else 0.1) * noise
    return net


def save_tokenizer(folder: Path) -> None:
    """`<bos>` SEQUENCE `<eos>`, one token a residue."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {text: token for token, text in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens([text for text in VOCABULARY if len(text) > 1])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def save_tiny(folder: Path, case: str) -> Any:
    """The folder of a case; transformers' model of it is given back."""
    net = tiny_net(case)
    net.save_pretrained(folder)
    save_tokenizer(folder)
    return net


def change_config(folder: Path, **changes: object) -> None:
    """Fields of config.json set to other values; those set to ... are taken out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Weights set to others; those set to None are taken out."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path) | changes
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    safetensors.torch.save_file(kept, path)
