"""What the settings beside a Hugging Face ESM's weights may say: config.json and the tokenizer's files.

turboesm runs fair-esm's ESM2. A setting that would make transformers compute anything else is refused, and so is
one that is not known: a model is read as what it is, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turboesm_kernels.layout import ROPE_BASE

from turboesm_cli.errors import ModelError
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.unreadable import one_line, sign_of

_TOKENS = ESM2_ALPHABET
UNKNOWN = _TOKENS.vocabulary.index("<unk>")

LARGEST = 1 << 20
"""Bytes of a JSON file: real ones have some thousand."""

FREE = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "attention_probs_dropout_prob", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "classifier_dropout", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing",
    "hidden_dropout_prob", "hidden_size", "id2label", "initializer_range", "label2id", "layer_norm_eps",
    "length_penalty", "max_length", "max_position_embeddings", "min_length", "model_type", "name_or_path",
    "no_repeat_ngram_size", "num_attention_heads", "num_beam_groups", "num_beams", "num_hidden_layers",
    "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_word_embeddings", "token_dropout", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip
"""Fields that change nothing in evaluation (dropout, labels, sampling, bookkeeping), and those that are read."""

ROPE = ({"rope_type": "default"}, {"type": "default"}, {"rope_type": "default", "rope_theta": ROPE_BASE})

FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "bos_token_id": (_TOKENS.start,),
    "cls_token_id": (_TOKENS.start,),
    "emb_layer_norm_before": (False,),
    "eos_token_id": (_TOKENS.end,),
    "hidden_act": ("gelu",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "is_folding_model": (False,),
    "mask_token_id": (_TOKENS.mask,),
    "pad_token_id": (_TOKENS.padding,),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("rotary",),
    "pruned_heads": ({},),
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
    "rope_theta": (ROPE_BASE,),
    "tie_encoder_decoder": (False,),
    "unk_token_id": (UNKNOWN,),
    "vocab_list": (list(_TOKENS.vocabulary),),
    "vocab_size": (len(_TOKENS.vocabulary),),
}
"""Fields that change what is computed, and the values under which that is ESM-2; null counts as not given."""

ARCHITECTURES = {"EsmModel", "EsmForMaskedLM", "EsmForSequenceClassification", "EsmForTokenClassification"}


def check_config(config: Any, path: Path) -> None:
    """Raise ModelError, naming the field, where a config.json is of any other model than ESM-2."""
    if not isinstance(config, dict) or config.get("model_type") != "esm":
        found = _short(config.get("model_type")) if isinstance(config, dict) else "missing"
        raise ModelError(
            f"{path}: model_type is {found}; turboesm reads 'esm' (ESM-2), gpt2, gptj, llama, mistral and progen"
        )
    if config.get("position_embedding_type") != "rotary" or config.get("emb_layer_norm_before"):
        raise ModelError(f"{path} is an ESM model without rotary positions; turboesm reads ESM-2 models only")
    for name, value in config.items():
        if value is not None:
            _check_field(name, value, config, path)


def layer_norm_eps(config: dict[str, Any], folder: Path) -> float:
    """The epsilon of layer norms; transformers' default where there is none. Raises ModelError."""
    eps = config.get("layer_norm_eps", 1e-12)
    if type(eps) is not float or not 0 < eps < 1:
        raise ModelError(f"{folder / 'config.json'}: layer_norm_eps is {_short(eps)}; ESM-2's is 1e-05")
    return eps


def flag(config: dict[str, Any], name: str, default: bool, folder: Path) -> bool:
    """A field that is true or false. Raises ModelError where it is anything else."""
    value = default if config.get(name) is None else config[name]
    if type(value) is not bool:
        raise ModelError(f"{folder / 'config.json'}: {name} is {_short(value)}; it must be true or false")
    return value


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError where a tokenizer's file beside the weights gives a token another number than ESM-2."""
    _check_vocabulary(folder / "vocab.txt")
    for name, claims in _CLAIMS.items():
        path = folder / name
        if path.exists():
            for number, token in _claimed(path, claims):
                if not (0 <= number < len(_TOKENS.vocabulary) and _TOKENS.vocabulary[number] == token):
                    raise _other_vocabulary(path, number, token)


def _check_field(name: str, value: Any, config: dict[str, Any], path: Path) -> None:
    if name in FREE:
        return
    allowed = FIXED.get(name, ())
    if name == "intermediate_size":
        allowed = (4 * config["hidden_size"] if type(config.get("hidden_size")) is int else value,)
    elif name == "architectures":
        allowed = (value,) if isinstance(value, list) and set(map(str, value)) <= ARCHITECTURES else ()
    elif name not in FIXED:
        raise ModelError(
            f"{path}: turboesm does not know the field {_short(name)} ({_short(value)}); if the model computes "
            "the same without it, take it out of a copy of the folder"
        )
    if value not in allowed:
        usual = " or ".join(_short(item) for item in allowed or sorted(ARCHITECTURES))
        raise ModelError(f"{path}: {name} is {_short(value)}, not {usual}; turboesm reads ESM-2 models only")


def _check_vocabulary(path: Path) -> None:
    if not path.exists():
        return
    tokens = [line.strip() for line in read_text(path).rstrip().splitlines()]
    for number in range(max(len(tokens), len(_TOKENS.vocabulary))):
        found, expected = (row[number] if number < len(row) else None for row in (tokens, _TOKENS.vocabulary))
        if found != expected:
            raise _other_vocabulary(path, number, found)


def _other_vocabulary(path: Path, number: int, token: object) -> ModelError:
    usual = _short(_TOKENS.vocabulary[number]) if 0 <= number < len(_TOKENS.vocabulary) else "missing"
    return ModelError(
        f"{path}: token {number} is {_short(token)}, ESM-2's is {usual}; turboesm reads models of ESM-2's "
        "vocabulary only"
    )


def _special(data: Any) -> Iterator[tuple[int, Any]]:
    names = {
        "cls_token": _TOKENS.start,
        "pad_token": _TOKENS.padding,
        "eos_token": _TOKENS.end,
        "unk_token": UNKNOWN,
        "mask_token": _TOKENS.mask,
    }
    for name, number in names.items():
        if data.get(name) is not None:
            yield number, data[name]["content"] if isinstance(data[name], dict) else data[name]


def _settings(data: Any) -> Iterator[tuple[int, Any]]:
    yield from _special(data)
    for number, token in (data.get("added_tokens_decoder") or {}).items():
        yield int(number), token["content"]


def _added(data: Any) -> Iterator[tuple[int, Any]]:
    return ((int(number), token) for token, number in data.items())


def _fast(data: Any) -> Iterator[tuple[int, Any]]:
    yield from _added(data["model"]["vocab"])
    yield from ((int(token["id"]), token["content"]) for token in data.get("added_tokens") or [])


_CLAIMS = {
    "special_tokens_map.json": _special,
    "tokenizer_config.json": _settings,
    "added_tokens.json": _added,
    "tokenizer.json": _fast,
}
"""Files of a tokenizer, and how each says which number a token has."""


def _claimed(path: Path, claims: Any) -> list[tuple[int, Any]]:
    try:
        return list(claims(read_json(path)))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} is no tokenizer's file ({one_line(error)}); download it again") from error


def read_json(path: Path) -> Any:
    """What a small JSON file beside a model's weights holds. Raises ModelError."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        what = sign_of(path) or f"not JSON ({one_line(error)}); download it again"
        raise ModelError(f"{path} cannot be read: it is {what}") from error


def read_text(path: Path, largest: int = LARGEST) -> str:
    """A small text file beside a model's weights, of up to `largest` bytes. Raises ModelError."""
    try:
        if path.stat().st_size > largest:
            raise ModelError(
                f"{path} is over {largest >> 20} MiB: no such file of a protein model; download it again"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read ({one_line(error)}); check the file") from error


def _short(value: object) -> str:
    """As JSON writes it, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
