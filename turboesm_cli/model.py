"""ESM-2 models through one door: official names, fair-esm checkpoints, Hugging Face folders.

Whatever the format, what comes back is fair-esm's own `ESM2` module with the checkpoint's weights in float32,
its RoPE frequencies included (some checkpoints store them rounded).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import esm
import torch
from torch import Tensor, nn

from turboesm_cli.checkpoints import EMBEDDED, Checkpoint, empty_net, read_checkpoint
from turboesm_cli.errors import DeviceError, ModelError
from turboesm_cli.shapes import Shape


@dataclass(frozen=True)
class EsmModel:
    """A loaded ESM-2 model.

    name         as it appears in bundles and results
    net          fair-esm's ESM2 in evaluation mode
    shape        its size
    fingerprint  sha256 over a sample of the trunk's weights, so that a bundle can tell its model
    has_lm_head  False where the checkpoint is a trunk alone
    is_random    weights are random: good for time and memory, never for accuracy
    note         what a user should know about these weights, or ""
    """

    name: str
    net: esm.ESM2
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
    `.pt` file, a Hugging Face ESM folder, or "random:" and an official name (random weights, to measure time
    and memory). Raises ModelError where it cannot be found or read, DeviceError where the device is not there.
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
    has_lm_head = "lm_head.dense.weight" in weights
    _fill_in(net, weights, shape)
    problems = _mismatches(net, weights)
    if problems:
        raise ModelError(f"{found.name} is no ESM-2 checkpoint of {shape}: {problems[0]} ({len(problems)} in all)")
    net.load_state_dict({name: weights[name].float() for name in net.state_dict()}, assign=True)
    net.requires_grad_(False)
    net.eval()
    return EsmModel(
        found.name, net, shape, _fingerprint(net), has_lm_head, is_random=found.is_random, note=found.note
    )


def _fill_in(net: nn.Module, weights: dict[str, Tensor], shape: Shape) -> None:
    """Defaults for what a checkpoint may lack: RoPE's frequencies, the contact head, the LM head."""
    weights.setdefault("lm_head.weight", weights.get("embed_tokens.weight", torch.empty(0)))
    channels = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    for name, expected in net.state_dict().items():
        if name.endswith("rot_emb.inv_freq"):
            weights.setdefault(name, 1.0 / 10000**channels)
        elif name.startswith(("contact_head.", "lm_head.")):
            weights.setdefault(name, torch.zeros(expected.shape))


def _mismatches(net: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    problems = []
    for name, expected in net.state_dict().items():
        found = weights.get(name)
        if found is None:
            problems.append(f"{name} is missing")
        elif not (found.is_floating_point() and bool(found.isfinite().all())):
            problems.append(f"{name} holds what is no number")
        elif found.shape != expected.shape:
            problems.append(f"{name} is {list(found.shape)}, not {list(expected.shape)}")
    return problems


def _fingerprint(net: nn.Module) -> str:
    """sha256 of name, shape and up to 65,536 evenly spaced values of every weight of the trunk, in float32.

    The heads do not count, since keys and values do not depend on them: a bundle serves every model of a trunk.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(net.state_dict().items()):
        if not name.startswith(("contact_head.", "lm_head.")):
            flat = weight.flatten()
            sample = flat[:: max(1, flat.numel() // 65536)].float().cpu().contiguous()
            digest.update(f"{name}{list(weight.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
