"""What config.json of an autoregressive model says, in one form for all families.

A setting that would make transformers compute anything else than `decoder` does is refused, and so is one that is
not known: a model is read as what it is, or not at all. Imports no torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turboesm_cli.errors import ModelError
from turboesm_cli.models.esm_config import FREE, flag
from turboesm_cli.models.shapes import Shape, check_shape

FAMILIES = ("gpt2", "gptj", "llama", "mistral", "progen")
"""Values of model_type that are read."""

UNUSED = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|attention\.bias|attention\.masked_bias|embed_positions)"
    r"|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
"""Buffers of causal masks and of RoPE's angles, which older versions of transformers saved."""

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
"""Names of those that `decoder` computes."""

_BOOKKEEPING = {
    "_attn_implementation", "_attn_implementation_internal", "_from_model_config", "_name_or_path",
    "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id", "condition_on_chain", "condition_on_species",
    "embd_pdrop", "eos_token_id", "gradient_checkpointing", "initializer_range", "layer_norm_epsilon", "n_ctx",
    "pad_token_id", "pretraining_tp", "resid_pdrop", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "unk_token_id",
}  # fmt: skip
_GPT_SIZES = {"n_embd", "n_head", "n_inner", "n_layer", "n_positions", "vocab_size", "activation_function"}
_LLAMA_SIZES = {
    "hidden_act", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "vocab_size", "attention_bias", "mlp_bias", "sliding_window",
}  # fmt: skip
_READ = {
    "gpt2": _GPT_SIZES,
    "gptj": _GPT_SIZES | {"rotary_dim", "rotary", "scale_attn_weights"},
    "progen": _GPT_SIZES | {"rotary_dim", "scale_attn_weights", "embed_dim"},
    "llama": _LLAMA_SIZES,
    "mistral": _LLAMA_SIZES,
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "reorder_and_upcast_attn": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "rotary": (True,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (),
}
"""Fields that change what is computed, and the values that `decoder` computes; null counts as not given."""


@dataclass(frozen=True)
class Layout:
    """An autoregressive model's settings.

    vocabulary   rows of the embedding
    inner        channels of the feed-forward part, gate not counted
    turned       channels of a head that RoPE turns; 0 where positions are learned
    theta        base of RoPE's frequencies
    interleaved  whether RoPE turns neighbouring channels together, not those half a head apart
    """

    family: str
    shape: Shape
    vocabulary: int
    inner: int
    activation: str
    epsilon: float
    turned: int
    theta: float
    interleaved: bool
    tied: bool
    attention_bias: bool = True
    mlp_bias: bool = True

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part has a gate, and norms are RMS norms."""
        return self.family in ("llama", "mistral")


def read_layout(config: dict[str, Any], path: Path) -> Layout:
    """The settings in a config.json. Raises ModelError, naming the field, for a model that is not served."""
    family = config["model_type"]
    for name, value in config.items():
        if value is not None:
            _check_field(family, name, value, path)
    try:
        return _llama(config, path) if family in ("llama", "mistral") else _gpt(config, path)
    except KeyError as error:
        raise ModelError(f"{path} names no {error}: not a Hugging Face {family} folder") from error


def _check_field(family: str, name: str, value: Any, path: Path) -> None:
    if name in _FIXED:
        if value not in _FIXED[name]:
            raise ModelError(f"{path}: {name} is {json.dumps(value)[:60]}, which turboesm does not compute")
    elif name not in _READ[family] | FREE | _BOOKKEEPING and name != "architectures":
        raise ModelError(
            f"{path}: turboesm does not know the field {name!r} ({json.dumps(value)[:60]}); if the model computes "
            "the same without it, take it out of a copy of the folder"
        )
    heads = ("ForCausalLM", "LMHeadModel")
    if name == "architectures" and not (isinstance(value, list) and all(str(x).endswith(heads) for x in value)):
        raise ModelError(f"{path}: architectures is {json.dumps(value)[:60]}, no language model with its head")


_ALIASES = {
    "embed_dim": "n_embd",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Names by which transformers sets GPT's sizes, too."""


def _gpt(config: dict[str, Any], path: Path) -> Layout:
    family = config["model_type"]
    for alias, name in _ALIASES.items():
        if config.get(alias) is not None and config[alias] != config.get(name, config[alias]):
            raise ModelError(
                f"{path}: {alias} is {config[alias]!r:.60} and {name} is {config[name]!r:.60}; which?"
            )
    width = config.get("n_embd") or config.get("embed_dim")
    shape = Shape(
        config["n_layer"], width if width is not None else config["n_embd"], config["n_head"],
        context=config.get("n_positions", 1024 if family == "gpt2" else 2048),
    )  # fmt: skip
    check_shape(shape, path)
    turned = 0 if family == "gpt2" else _turned(shape, config, path)
    inner = config.get("n_inner")
    return Layout(
        family, shape, _size(config, "vocab_size", path), 4 * shape.width if inner is None else inner,
        _activation(config.get("activation_function", "gelu_new"), path),
        _epsilon(config.get("layer_norm_epsilon", 1e-5), path), turned, 10000.0,
        interleaved=family != "gpt2", tied=flag(config, "tie_word_embeddings", family == "gpt2", path.parent),
    )  # fmt: skip


def _turned(shape: Shape, config: dict[str, Any], path: Path) -> int:
    """GPT-J's RoPE turns channels 2 i and 2 i + 1 of the first `rotary_dim`, others not at all."""
    turned = config.get("rotary_dim", 64 if config["model_type"] == "gptj" else None)
    if type(turned) is not int or not 0 < turned <= shape.head_dim or turned % 2:
        raise ModelError(
            f"{path}: rotary_dim is {turned!r:.60}, no even number up to the head_dim {shape.head_dim}"
        )
    return turned


def _llama(config: dict[str, Any], path: Path) -> Layout:
    family, heads = config["model_type"], config["num_attention_heads"]
    context = _size(config, "max_position_embeddings", path)
    window = config.get("sliding_window", 4096 if family == "mistral" else None)
    if window is not None and (type(window) is not int or window < 1):
        raise ModelError(f"{path}: sliding_window is {window!r:.60}, no number of tokens")
    shape = Shape(
        config["num_hidden_layers"], config["hidden_size"], heads, config.get("head_dim"),
        None if config.get("num_key_value_heads") in (None, heads) else config["num_key_value_heads"],
        context=context if window is None else min(window, context),  # up to there the window holds all
    )  # fmt: skip
    check_shape(shape, path)
    folder = path.parent
    return Layout(
        family, shape, _size(config, "vocab_size", path), _size(config, "intermediate_size", path),
        _activation(config.get("hidden_act", "silu"), path), _epsilon(config.get("rms_norm_eps", 1e-6), path),
        shape.head_dim, _theta(config, path), interleaved=False,
        tied=flag(config, "tie_word_embeddings", False, folder),
        attention_bias=flag(config, "attention_bias", False, folder),
        mlp_bias=flag(config, "mlp_bias", False, folder),
    )  # fmt: skip


def _theta(config: dict[str, Any], path: Path) -> float:
    """The base of RoPE's frequencies. Raises ModelError where they are scaled."""
    theta = config.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        found = config.get(name)
        if found is None:
            continue
        kind = found.get("rope_type", found.get("type", "default")) if isinstance(found, dict) else found
        if kind != "default" or not set(found) <= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
            raise ModelError(f"{path}: {name} is {json.dumps(found)[:60]}; turboesm computes RoPE unscaled")
        if found.get("partial_rotary_factor", 1) != 1:
            raise ModelError(
                f"{path}: {name} turns a part of each head, which turboesm does not compute for Llama"
            )
        own = found.get("rope_theta", theta)
        if theta is not None and own != theta:
            raise ModelError(f"{path}: rope_theta is {theta!r:.60}, and in {name} {own!r:.60}; which?")
        theta = own
    theta = 10000.0 if theta is None else theta
    if type(theta) not in (int, float) or not 1 < theta < 1e12:
        raise ModelError(f"{path}: rope_theta is {theta!r:.60}")
    return float(theta)


def _size(config: dict[str, Any], name: str, path: Path) -> int:
    value = config[name]
    if type(value) is not int or not 0 < value <= 1 << 20:
        raise ModelError(f"{path}: {name} is {value!r:.60}")
    return value


def _activation(name: Any, path: Path) -> str:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelError(f"{path}: activation {name!r:.60}; turboesm computes {', '.join(ACTIVATIONS)}")
    return str(name)


def _epsilon(value: Any, path: Path) -> float:
    if type(value) is not float or not 0 < value < 1:
        raise ModelError(f"{path}: a norm's epsilon is {value!r:.60}")
    return value
