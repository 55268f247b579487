"""Hugging Face folders: their files and settings, and the hub's cache. Imports no torch.

| beside config.json | |
|---|---|
| model.safetensors, its index, pytorch_model.bin or its index | the weights: the first, as in transformers |
| a tokenizer's files | of ESM-2 must give its tokens its numbers; of other models say their tokens |
| an adapter, a quantizer's settings, weights of another name | refused: the model may be more than its base |
| a trainer's state, weights of other frameworks | not read |
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from turboesm_cli.errors import ModelError
from turboesm_cli.models.decoder_config import FAMILIES, UNUSED, Layout, read_layout
from turboesm_cli.models.esm_config import check_config, read_json
from turboesm_cli.models.shapes import Shape, check_shape
from turboesm_cli.models.unreadable import one_line, sign_of

INDEX_LIMIT = 16 << 20
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
NOT_READ = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?(\.\w+)?\.(safetensors|bin)"
    r"|(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.(bin|pt|pth)"
)
"""Files with the endings of weights that hold the same model once more, or a trainer's state."""

ADAPTER = re.compile(r"(.*[^a-z])?(adapters?|lora|loha|lokr|ia3)([^a-z].*)?\.(json|safetensors|bin|pt|pth)", re.I)


@dataclass(frozen=True)
class Settings:
    """What config.json says; `layout` of an autoregressive model. `folder`: where it is, that of a snapshot."""

    folder: Path
    config: dict[str, Any]
    shape: Shape
    layout: Layout | None = None


def read_settings(folder: Path) -> Settings:
    """The settings in a Hugging Face folder. Raises ModelError where its model is not served, or is more."""
    if (folder / "snapshots").is_dir() and folder.resolve().name.startswith("models--"):
        return read_settings(snapshot(folder))
    _refuse_adapters(folder)
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder} has no config.json: no Hugging Face model folder; check the path")
    config = read_json(path)
    family = config.get("model_type") if isinstance(config, dict) else None
    if family in FAMILIES:
        layout = read_layout(config, path)
        return Settings(folder, config, layout.shape, layout)
    check_config(config, path)
    try:
        shape = Shape(config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"])
    except KeyError as error:
        raise ModelError(f"{folder}/config.json names no {error}: not a Hugging Face ESM folder") from error
    check_shape(shape, folder)
    return Settings(folder, config, shape)


def family_and_shape(folder: Path) -> tuple[str, Shape] | None:
    """Of a folder's model, by its settings and the headers of its weights; None where those do not tell.

    Raises ModelError.
    """
    found = read_settings(folder)
    if found.layout is None:
        return "esm2", found.shape
    files = weight_files(found.folder)
    if any(path.suffix != ".safetensors" for path in files):
        return None
    sizes = {name: size for path in files for name, size in _sizes(path).items()}
    tied = "lm_head.weight" if found.layout.tied else ""
    count = sum(size for name, size in sizes.items() if name != tied and not UNUSED.fullmatch(name))
    return found.layout.family, replace(found.shape, own_parameters=count)


def _sizes(path: Path) -> dict[str, int]:
    """Numbers in each tensor of a safetensors file, by its header. Raises ModelError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > INDEX_LIMIT:
                raise ValueError(f"a header of {length:,} bytes")
            described = json.loads(file.read(length))
        return {name: prod(each["shape"]) for name, each in described.items() if name != "__metadata__"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = sign_of(path) or f"no safetensors file ({one_line(error)}); download it again"
        raise ModelError(f"{path} is {what}") from error


def folder_name(folder: Path) -> str:
    """A model's name by its folder; in the hub's cache that of the repository, where folders are commits."""
    real = folder.resolve()
    repository = real.parents[1].name if real.parent.name == "snapshots" else ""
    return repository.split("--")[-1] if repository.startswith("models--") else real.name


def hub_name(name: str) -> bool:
    """Whether a name may be OWNER/MODEL of the hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def hub_folder(name: str) -> Path:
    """Where Hugging Face's cache keeps a model OWNER/MODEL."""
    return hub_cache() / f"models--{name.replace('/', '--')}"


def in_hub_cache(name: str) -> Path | None:
    """The folder of the model OWNER/MODEL in Hugging Face's cache, or None. Raises ModelError."""
    folder = hub_folder(name)
    there = [path.name for path in (folder / "snapshots").glob("*/*")]
    if "config.json" in there and any(name.endswith((".safetensors", ".bin")) for name in there):
        found = snapshot(folder)
        return found if _is_whole(found) else None
    return None


def _is_whole(folder: Path) -> bool:
    """Whether all files of weights are there: a download may have been cut off. What is wrong, reading tells."""
    try:
        return all(path.exists() for path in weight_files(folder))
    except ModelError:
        return True


def hub_cache() -> Path:
    """As huggingface_hub finds it."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(os.path.expanduser(cache or f"{home}/hub"))  # noqa: PTH111 (Path's raises for unknown users)


def snapshot(repository: Path) -> Path:
    """The snapshot of a repository in the hub's cache: that of `main`, or the only one. Raises ModelError."""
    snapshots = repository / "snapshots"
    with suppress(FileNotFoundError):
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        if re.fullmatch(r"\w+", main) and (snapshots / main).is_dir():
            return snapshots / main
    found = [path for path in snapshots.glob("*") if path.is_dir()]
    if len(found) == 1:
        return found[0]
    raise ModelError(f"{snapshots} holds {len(found)} snapshots and none is refs/main; name the folder of one")


def _refuse_adapters(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if ADAPTER.match(path.name):
            what = "an adapter beside the base" if (folder / "config.json").exists() else "an adapter, not a model"
            raise ModelError(
                f"{path} is {what}: merge it into its base (peft: merge_and_unload(), save_pretrained), and name "
                "that folder; or take it out of a copy of the folder"
            )
        if re.fullmatch(r"quant\w*_config\.json", path.name):
            raise ModelError(f"{path}: a quantized checkpoint; save the model in float16 or float32")


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights. Raises ModelError where there are none, or others beside them."""
    files = _weight_files(folder)
    read = {path.name for path in files}
    for path in sorted(folder.iterdir()):
        is_weights = path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
        if is_weights and path.name not in read and not NOT_READ.fullmatch(path.name):
            raise ModelError(
                f"{path}: weights that turboesm does not know, beside {files[0].name}; if the model is "
                f"{files[0].name} alone, put it with config.json into a folder of its own"
            )
    return files


def _weight_files(folder: Path) -> list[Path]:
    for single in WEIGHT_FILES:
        if (folder / single).exists():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.exists():
            return [folder / part for part in _parts_of(index)]
    raise ModelError(f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}; copy the weights there")


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
        raise ModelError(f"{index} names no weight files ({one_line(error)}); download it again") from error


def _is_weight_file(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and name.endswith((".safetensors", ".bin"))
