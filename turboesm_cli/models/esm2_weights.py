"""A checkpoint's weights, checked, in fair-esm's own `ESM2` module.

They are float32, RoPE's frequencies included (some checkpoints store them rounded).
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn
from turboesm_kernels.reference import ROPE_BASE

from turboesm_cli.errors import ModelError
from turboesm_cli.models.checkpoints import empty_net
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.shapes import Shape
from turboesm_cli.models.weights import LAYER_NORM_EPS, Checkpoint, same


def build(found: Checkpoint) -> EsmModel:
    """fair-esm's module around the checkpoint's weights, with no copy of them."""
    shape, weights = found.shape, dict(found.weights)
    net = empty_net(shape, found.token_dropout)
    _fill_in(net, weights, shape)
    problems = _mismatches(net, weights)
    if problems:
        raise ModelError(f"{found.name} is no ESM-2 checkpoint of {shape}: {problems[0]} ({len(problems)} in all)")
    has_lm_head = _has_lm_head(found)
    net.load_state_dict({name: weights[name].float() for name in net.state_dict()}, assign=True)
    _set_epsilon(net, found.layer_norm_eps)
    net.requires_grad_(False)
    net.eval()
    fingerprint = _fingerprint(net, found)
    return EsmModel(found.name, net, shape, fingerprint, has_lm_head, is_random=found.is_random, note=found.note)


_LM_HEAD = ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "bias")


def _has_lm_head(found: Checkpoint) -> bool:
    """Whether there is a language-model head. Raises ModelError where there is a part of one, or two in one."""
    there = [f"lm_head.{part}" in found.weights for part in _LM_HEAD]
    if any(there) and not all(there):
        missing = _LM_HEAD[there.index(False)]
        raise ModelError(f"{found.name} has a part of a language-model head: lm_head.{missing} is missing")
    output = found.weights.get("lm_head.weight")
    if any(there) and not found.tied and output is None:
        raise ModelError(f"{found.name}: tie_word_embeddings is false, but lm_head.decoder.weight is missing")
    if found.tied and output is not None and not same(output, found.weights["embed_tokens.weight"]):
        raise ModelError(
            f"{found.name}: lm_head.weight is not the embedding, as ESM-2's is; where that is meant, save the "
            "model with tie_word_embeddings false in config.json"
        )
    return any(there)


def _fill_in(net: nn.Module, weights: dict[str, Tensor], shape: Shape) -> None:
    """Defaults for what a checkpoint may lack: RoPE's frequencies, the contact head, the LM head."""
    weights.setdefault("lm_head.weight", weights.get("embed_tokens.weight", torch.empty(0)))
    channels = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    for name, expected in net.state_dict().items():
        if name.endswith("rot_emb.inv_freq"):
            weights.setdefault(name, 1.0 / ROPE_BASE**channels)
        elif name.startswith(("contact_head.", "lm_head.")):
            weights.setdefault(name, torch.zeros(expected.shape))


HARMLESS = re.compile(
    r"embeddings\.position_(ids|embeddings\.weight)|pooler\.dense\.(weight|bias)|classifier\.[\w.]+"
)
"""Weights that hidden states and predicted residues do not depend on, beside the contact head: learned positions,
which models with RoPE carry without use, and heads of other tasks."""

_HINTS = (
    (
        r"lora|adapter|base_layer|base_model|ia3|modules_to_save",
        "of an adapter that is not merged: merge it into its base (peft: merge_and_unload()) and save that",
    ),
    (
        r"scale|zero|absmax|quant|SCB|qweight|g_idx|packed",
        "of a quantized checkpoint: save the model in float16 or float32",
    ),
    (r"emb_layer_norm_before|embeddings\.layer_norm|embed_positions", "of ESM-1b or ESM-1v"),
    (r"crossattention", "of a decoder that attends to an encoder"),
)
"""What weights that ESM-2 does not have tell of a model."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _mismatches(net: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """What keeps these weights from being ESM-2's, weights that it does not have first."""
    expected = net.state_dict()
    unknown = sorted(name for name in weights if name not in expected and not HARMLESS.fullmatch(name))
    problems = [f"it has {name[:200]!r}, {_hint(name)}" for name in unknown]
    for name, like in expected.items():
        problem = _mismatch(weights.get(name), like)
        if problem:
            problems.append(f"{name} {problem}")
    if not problems:
        problems = _uneven_frequencies(weights)
    return problems


def _hint(name: str) -> str:
    found = next((what for pattern, what in _HINTS if re.search(pattern, name)), None)
    return found or "which ESM-2 does not have: if the model computes the same without it, save it without"


def _mismatch(found: Tensor | None, like: Tensor) -> str | None:
    if found is None:
        return "is missing"
    if found.dtype not in DTYPES:
        dtype = str(found.dtype).removeprefix("torch.")
        return f"is stored as {dtype}: a quantized checkpoint; save the model in float16 or float32"
    if found.shape != like.shape:
        return f"is {list(found.shape)}, not {list(like.shape)}"
    return None if bool(found.isfinite().all()) else "holds what is no number"


def _uneven_frequencies(weights: dict[str, Tensor]) -> list[str]:
    """RoPE's frequencies that are not those of layer 0, by which every layer turns its keys."""
    names = [name for name in weights if name.endswith("rot_emb.inv_freq")]
    first = weights["layers.0.self_attn.rot_emb.inv_freq"]
    return [f"{name} differs from layer 0's" for name in names if not same(weights[name], first)]


def _set_epsilon(net: nn.Module, epsilon: float) -> None:
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = epsilon


def _fingerprint(net: nn.Module, found: Checkpoint) -> str:
    """sha256 of name, shape and up to 65,536 evenly spaced values of every weight of the trunk, in float32.

    The heads do not count, since keys and values do not depend on them: a bundle serves every model of a trunk.
    Settings count where they are not ESM-2's usual ones.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(net.state_dict().items()):
        if not name.startswith(("contact_head.", "lm_head.")):
            flat = weight.flatten()
            sample = flat[:: max(1, flat.numel() // 65536)].float().cpu().contiguous()
            digest.update(f"{name}{list(weight.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    if found.layer_norm_eps != LAYER_NORM_EPS:
        digest.update(f"layer_norm_eps {found.layer_norm_eps!r}".encode())
    if not found.token_dropout:
        digest.update(b"without token_dropout")
    return digest.hexdigest()
