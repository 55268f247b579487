"""Hugging Face folders for tests."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from turboesm_cli.models.loading import load_model


def to_hugging_face(path: Path, folder: Path, trunk_only: bool = False) -> Path:
    """A Hugging Face folder with the weights of a tiny fair-esm checkpoint, names mapped by hand."""
    model = load_model(str(path), "cpu")
    names = [
        ("self_attn.q_proj", "attention.self.query"), ("self_attn.k_proj", "attention.self.key"),
        ("self_attn.v_proj", "attention.self.value"), ("self_attn.out_proj", "attention.output.dense"),
        ("self_attn.rot_emb", "attention.self.rotary_embeddings"), ("self_attn_layer_norm", "attention.LayerNorm"),
        ("fc1", "intermediate.dense"), ("fc2", "output.dense"), ("final_layer_norm", "LayerNorm"),
        ("layers.", "esm.encoder.layer."), ("embed_tokens", "esm.embeddings.word_embeddings"),
        ("emb_layer_norm_after", "esm.encoder.emb_layer_norm_after"), ("contact_head", "esm.contact_head"),
    ]  # fmt: skip
    weights = {}
    for key, tensor in model.net.state_dict().items():
        for old, new in names:
            key = key.replace(old, new)
        if key != "lm_head.weight" and not (trunk_only and key.startswith("lm_head")):
            weights[key] = tensor.clone()
    folder.mkdir()
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    config = {
        "model_type": "esm", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
        "token_dropout": True, "position_embedding_type": "rotary", "emb_layer_norm_before": False,
        "layer_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
