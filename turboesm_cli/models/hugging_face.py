"""Hugging Face folders: their files, their names for ESM-2's weights, and the hub's cache, filled if need be.

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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from turboesm_cli.errors import ModelError
from turboesm_cli.models.decoder_config import FAMILIES, read_layout
from turboesm_cli.models.decoder_tokens import read_alphabet
from turboesm_cli.models.decoder_weights import DecoderCheckpoint
from turboesm_cli.models.esm_config import check_config, check_tokenizer, flag, layer_norm_eps, read_json
from turboesm_cli.models.shapes import Shape, check_shape, official_name
from turboesm_cli.models.weights import Checkpoint, load_tensors, one_line, renamed

INDEX_LIMIT = 16 << 20
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
NOT_READ = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?(\.\w+)?\.(safetensors|bin)"
    r"|(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.(bin|pt|pth)"
)
"""Files with the endings of weights that hold the same model once more, or a trainer's state."""

ADAPTER = re.compile(r"(.*[^a-z])?(adapters?|lora|loha|lokr|ia3)([^a-z].*)?\.(json|safetensors|bin|pt|pth)", re.I)


def read_folder(folder: Path, name: str = "", note: str = "") -> Checkpoint | DecoderCheckpoint:
    """The checkpoint in a Hugging Face folder. Raises ModelError where its model is not served, or is more."""
    if (folder / "snapshots").is_dir() and folder.resolve().name.startswith("models--"):
        return read_folder(_snapshot(folder), name, note)
    _refuse_adapters(folder)
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder} has no config.json: no Hugging Face model folder; check the path")
    config = read_json(path)
    family = config.get("model_type") if isinstance(config, dict) else None
    if family in FAMILIES:
        return _decoder(folder, path, config, name or folder_name(folder), note)
    check_config(config, path)
    try:
        shape = Shape(config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"])
    except KeyError as error:
        raise ModelError(f"{folder}/config.json names no {error}: not a Hugging Face ESM folder") from error
    check_shape(shape, folder)
    check_tokenizer(folder)
    return Checkpoint(
        name or folder_name(folder),
        shape,
        renamed(_weights(folder), _fair_esm_name, folder),
        token_dropout=flag(config, "token_dropout", False, folder),
        layer_norm_eps=layer_norm_eps(config, folder),
        tied=flag(config, "tie_word_embeddings", True, folder),
        note=note,
    )


def _decoder(folder: Path, path: Path, config: dict[str, Any], name: str, note: str) -> DecoderCheckpoint:
    layout = read_layout(config, path)
    alphabet = read_alphabet(folder, layout.family, name, layout.vocabulary)
    return DecoderCheckpoint(name, layout, alphabet, renamed(_weights(folder), str, folder), note=note)


def folder_name(folder: Path) -> str:
    """A model's name by its folder; in the hub's cache that of the repository, where folders are commits."""
    real = folder.resolve()
    repository = real.parents[1].name if real.parent.name == "snapshots" else ""
    return repository.split("--")[-1] if repository.startswith("models--") else real.name


def read_from_hub_cache(name: str) -> Checkpoint | DecoderCheckpoint:
    """The model `name` (OWNER/MODEL) of the hub, from its cache or else downloaded. Raises ModelError."""
    folder = _hub_cache() / f"models--{name.replace('/', '--')}"
    there = [path.name for path in (folder / "snapshots").glob("*/*")]
    if "config.json" in there and any(name.endswith((".safetensors", ".bin")) for name in there):
        return read_folder(_snapshot(folder))
    reason = _download(name)
    if reason is None:
        return read_folder(_snapshot(folder))
    official = official_name(name.split("/")[1]) if name.startswith("facebook/") else None
    other = f", or name {official}, fair-esm's file of that model" if official else ""
    raise ModelError(
        f"no model {name!r}: neither a path here nor in Hugging Face's cache ({folder}), nor downloaded "
        f"({reason}); run `hf download {name}` where there is a network, or put its config.json, weights and "
        f"tokenizer into a folder and name that{other}"
    )


_WANTED = ("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt",
           "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_IN_ITS_PLACE = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Files of a model; the latter where there are no safetensors."""


def _download(name: str) -> str | None:
    """Put a model into Hugging Face's cache; why not, or None. HF_HOME and HF_HUB_OFFLINE are respected."""
    offline = [
        key for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(key, "0") not in ("0", "")
    ]
    if offline:
        return f"{offline[0]} is set"
    from huggingface_hub import HfApi, snapshot_download

    try:
        found = HfApi().model_info(name, timeout=20).siblings or []
        safe = any(each.rfilename.endswith(".safetensors") for each in found)
        snapshot_download(
            name, allow_patterns=[*_WANTED, *(() if safe else _IN_ITS_PLACE)], cache_dir=_hub_cache()
        )
    except Exception as error:  # it raises what its HTTP library raises
        return one_line(error)
    return None


def _hub_cache() -> Path:
    """As huggingface_hub finds it."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(os.path.expanduser(cache or f"{home}/hub"))  # noqa: PTH111 (Path's raises for unknown users)


def _snapshot(repository: Path) -> Path:
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


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = _weight_files(folder)
    read = {path.name for path in files}
    for path in sorted(folder.iterdir()):
        is_weights = path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
        if is_weights and path.name not in read and not NOT_READ.fullmatch(path.name):
            raise ModelError(
                f"{path}: weights that turboesm does not know, beside {files[0].name}; if the model is "
                f"{files[0].name} alone, put it with config.json into a folder of its own"
            )
    for path in files:
        yield from load_tensors(path).items()


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


_NAMES = (
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


def _fair_esm_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name
