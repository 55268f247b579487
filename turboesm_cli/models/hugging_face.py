"""Weights in Hugging Face folders, by fair-esm's names or as they are; the hub's cache, filled if need be."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from turboesm_cli import console
from turboesm_cli.errors import ModelError
from turboesm_cli.models.decoder_tokens import read_alphabet
from turboesm_cli.models.decoder_weights import DecoderCheckpoint
from turboesm_cli.models.downloads import size_text
from turboesm_cli.models.esm_config import check_tokenizer, flag, layer_norm_eps
from turboesm_cli.models.folders import (
    folder_name,
    hub_cache,
    hub_folder,
    in_hub_cache,
    read_settings,
    snapshot,
    weight_files,
)
from turboesm_cli.models.shapes import Shape, official_name
from turboesm_cli.models.unreadable import one_line
from turboesm_cli.models.weights import Checkpoint, load_tensors, renamed
from turboesm_cli.outputs.files import file_sha256


def read_folder(folder: Path, name: str = "", note: str = "") -> Checkpoint | DecoderCheckpoint:
    """The checkpoint in a Hugging Face folder. Raises ModelError where its model is not served, or is more."""
    found = read_settings(folder)
    folder, config = found.folder, found.config
    name = name or folder_name(folder)
    if found.layout is not None:
        alphabet = read_alphabet(folder, found.layout.family, name, found.layout.vocabulary)
        return DecoderCheckpoint(name, found.layout, alphabet, renamed(_weights(folder), str, folder), note=note)
    check_tokenizer(folder)
    return Checkpoint(
        name,
        found.shape,
        _for_each_layer(renamed(_weights(folder), _fair_esm_name, folder), found.shape),
        token_dropout=flag(config, "token_dropout", False, folder),
        layer_norm_eps=layer_norm_eps(config, folder),
        tied=flag(config, "tie_word_embeddings", True, folder),
        note=note,
    )


def read_from_hub_cache(name: str) -> Checkpoint | DecoderCheckpoint:
    """The model `name` (OWNER/MODEL) of the hub, from its cache or else downloaded. Raises ModelError."""
    if (found := in_hub_cache(name)) is not None:
        return read_folder(found)
    folder = hub_folder(name)
    reason = _download(name)
    if reason is None:
        return read_folder(snapshot(folder))
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
        found = HfApi().model_info(name, timeout=20, files_metadata=True)
        safe = any(each.rfilename.endswith(".safetensors") for each in found.siblings or [])
        wanted = [*_WANTED, *(() if safe else _IN_ITS_PLACE)]
        to = {"allow_patterns": wanted, "cache_dir": hub_cache(), "revision": found.sha}
        missing = snapshot_download(name, **to, dry_run=True)
        size = sum(each.file_size for each in missing if each.will_download)
        console.say(f"downloading {name} ({size_text(size)}) to {hub_folder(name)}")
        folder = Path(snapshot_download(name, allow_patterns=wanted, cache_dir=hub_cache()))
        _check_digests(folder, {each.rfilename: each.lfs.sha256 for each in found.siblings or [] if each.lfs})
    except Exception as error:  # it raises what its HTTP library raises
        return one_line(error)
    return None


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weight_files(folder):
        yield from load_tensors(path).items()


def _check_digests(folder: Path, expected: Mapping[str, str]) -> None:
    """Raise ValueError where a file is not the one that the hub says; it is taken out of the cache."""
    for name, sha256 in expected.items():
        path = folder / name
        if path.exists() and file_sha256(path) != sha256:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise ValueError(f"{name} differs from the hub's sha256; run again")


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
    (r"(layer_norm(_after)?)\.gamma$", r"\1.weight"),
    (r"(layer_norm(_after)?)\.beta$", r"\1.bias"),
)
"""Patterns of names in transformers, and fair-esm's. transformers 5.20 and later save norms as gamma and beta."""

_OF_ALL_LAYERS = ("rotary_embeddings.inv_freq", "layers.*.self_attn.rot_emb.inv_freq")
"""RoPE's frequencies, once, as transformers 5.20 and later have and save them."""


def _for_each_layer(weights: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The same with RoPE's frequencies in each layer; where there are some of both kinds, as it is."""
    name = next((name for name in _OF_ALL_LAYERS if name in weights), None)
    if name is None or any(other != name and other.endswith("inv_freq") for other in weights):
        return weights
    shared = weights.pop(name)
    return weights | {f"layers.{layer}.self_attn.rot_emb.inv_freq": shared for layer in range(shape.layers)}


def _fair_esm_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name
