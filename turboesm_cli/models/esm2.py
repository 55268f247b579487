"""ESM-2 models through one door: official names, fair-esm checkpoints, Hugging Face folders.

Whatever the format, what comes back is fair-esm's own `ESM2` module with the checkpoint's weights in float32,
its RoPE frequencies included (some checkpoints store them rounded).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from turboesm_cli.errors import DeviceError, ModelError
from turboesm_cli.models.checkpoints import EMBEDDED, empty_net, read_checkpoint
from turboesm_cli.models.fair_esm import ESM2
from turboesm_cli.models.shapes import Shape
from turboesm_cli.models.weights import LAYER_NORM_EPS, Checkpoint, same


@dataclass(frozen=True)
class EsmModel:
    """A loaded ESM-2 model.

    name         as it appears in bundles and results
    net          fair-esm's ESM2 in evaluation mode
    shape        its size
    fingerprint  sha256 over a sample of the trunk's weights, and settings unlike ESM-2's usual ones, so that a
                 bundle can tell its model
    has_lm_head  False where the checkpoint is a trunk alone
    is_random    weights are random: good for time and memory, never for accuracy
    note         what a user should know about these weights, or ""
    """

    name: str
    net: ESM2
    shape: Shape
    fingerprint: str
    has_lm_head: bool
    is_random: bool = False
    note: str = ""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.net.parameters()).device

    @property
    def dtype_name(self) -> str:
        """The weights' dtype: float32, bfloat16, ..."""
        return str(next(self.net.parameters()).dtype).removeprefix("torch.")

    @property
    def inverse_frequencies(self) -> Tensor:
        """RoPE's inverse frequencies float32 [d / 2], the same in every layer."""
        return self.net.layers[0].self_attn.rot_emb.inv_freq

    def require_lm_head(self, purpose: str) -> None:
        """Raise ModelError where there is no language-model head to do `purpose` with."""
        if not self.has_lm_head:
            raise ModelError(
                f"{self.name} is a trunk without a language-model head, which {purpose} needs; "
                "name a full ESM-2 checkpoint with --model"
            )

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> EsmModel:
        """The model on another device or in another dtype (RoPE's frequencies stay float32)."""
        frequencies = [layer.self_attn.rot_emb.inv_freq for layer in self.net.layers]
        net = self.net.to(device=device, dtype=dtype)
        for layer, exact in zip(net.layers, frequencies, strict=True):
            layer.self_attn.rot_emb.inv_freq = exact.to(device)
        return replace(self, net=net)


def load_model(name: str = EMBEDDED, device: str = "auto", dtype: torch.dtype = torch.float32) -> EsmModel:
    """Load the model that `name` names, in `dtype`, on `device` ("auto", "cpu", "cuda", "cuda:1").

    `name` is "embedded", an official name (`esm2_t33_650M`, with or without `esm2_` and `_UR50D`), a fair-esm
    `.pt` file, a Hugging Face ESM folder, OWNER/MODEL of the hub where it is in its cache, or "random:" and an
    official name (random weights, to measure time and memory). Raises ModelError where it cannot be found or read,
    or is no plain ESM-2, DeviceError where the device is not there.
    """
    target = pick_device(device)
    with torch.no_grad():
        return _build(read_checkpoint(name)).to(target, dtype)


def pick_device(name: str) -> torch.device:
    """The torch device of `name`; "auto" is CUDA where there is one. Raises DeviceError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise DeviceError(f"--device {name} cannot be used: turboesm runs on cpu and cuda")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"--device {name}: {torch.cuda.device_count()} CUDA devices here; use --device cpu")
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where Triton launches and graphs are captured
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def parameter_count(shape: Shape) -> int:
    """Weights of an ESM-2 of this shape, its language-model head included."""
    return sum(weight.numel() for weight in empty_net(shape).state_dict().values())


def _build(found: Checkpoint) -> EsmModel:
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
            weights.setdefault(name, 1.0 / 10000**channels)
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
