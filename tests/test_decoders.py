"""Autoregressive models: transformers' numbers, no drift, exact tables of the first layer, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_folders import CASES, CONTEXT, ROWS, change_config, change_weights, save_tiny
from torch import Tensor
from turboesm_kernels import dispatch
from turboesm_kernels.token_layer import attend_tokens

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import PackedCache, PackedCodec
from turboesm_cli.codec.bundle import Bundle, read_bundle
from turboesm_cli.codec.calibration import calibrate
from turboesm_cli.codec.fit import CodecSpec, fit
from turboesm_cli.codec.moments import layer_moments
from turboesm_cli.codec.recipes import parse_recipe
from turboesm_cli.errors import BundleError, InputError, ModelError
from turboesm_cli.models import decoder, decoder_config, forward
from turboesm_cli.models.decoder import Decoder
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.folders import family_and_shape
from turboesm_cli.models.loading import load_model
from turboesm_cli.models.shapes import MOST_SHARING, Shape, check_shape
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.accumulators import PositionSums, Statistics
from turboesm_cli.statistics.batching import hold_back, to_tokens
from turboesm_cli.statistics.collect import collect

transformers = pytest.importorskip("transformers")

PROTEINS = [
    Protein("a", "", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"),
    Protein("b", "", "GIGKFLHSAKKFGKAFVGEIMNSW"),
    Protein("c", "", "MACDEFGHIKLPW"),
]
FAMILIES = ("gpt2", "gptj half turned", "llama 2:1", "llama own head_dim", "mistral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Each case's folder and transformers' model of it, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def folder(case: str) -> tuple[Path, Any]:
        if case not in made:
            path = tmp_path_factory.mktemp(case.replace(" ", "-").replace(":", "-")) / "model"
            made[case] = path, save_tiny(path, case)
        return made[case]

    return folder


@pytest.fixture(scope="module")
def models(folders: Callable[[str], tuple[Path, Any]]) -> Callable[[str], Decoder]:
    def model(case: str) -> Decoder:
        loaded = load_model(str(folders(case)[0]), "cpu")
        assert isinstance(loaded, Decoder)
        return loaded

    return model


@pytest.mark.parametrize("case", CASES)
def test_a_folder_says_its_shape_without_its_weights(
    folders: Callable[[str], tuple[Path, Any]], models: Callable[[str], Decoder], case: str
) -> None:
    model = models(case)
    assert family_and_shape(folders(case)[0]) == (model.family, model.shape)


def test_names_of_activations_are_those_that_are_computed() -> None:
    assert tuple(decoder.ACTIVATIONS) == decoder_config.ACTIVATIONS


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a vector, of vectors [..., E]."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def assert_parity(model: Decoder, net: Any, proteins: list[Protein]) -> None:
    """Logits and final hidden states of transformers, of each protein alone and in a padded batch."""
    tokens = to_tokens(proteins, model)
    with torch.no_grad():
        together = forward.encode(model, tokens)
        for row, length in enumerate(model.alphabet.lengths(tokens).tolist()):
            own = tokens[row : row + 1, :length]
            expected = net.base_model(own).last_hidden_state[0]
            for found in (together[row, :length], forward.encode(model, own)[0]):
                assert distance(found, expected) < 1e-5
                assert torch.allclose(model.logits(found), net(own).logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_tiny_models_give_what_transformers_gives(
    case: str, folders: Callable[[str], tuple[Path, Any]], models: Callable[[str], Decoder]
) -> None:
    model, net = models(case), folders(case)[1]
    assert_parity(model, net, PROTEINS)
    assert model.shape.own_parameters == sum(weight.numel() for weight in net.parameters())
    assert model.shape.context == (64 if case == "mistral short window" else CONTEXT)
    assert model.causal and model.has_lm_head and not model.is_random


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ar_llama_18M_gqa", "ar_gptj_25M_d80"])
def test_trained_models_give_what_transformers_gives(name: str, checkpoint_path: Callable[[str], Path]) -> None:
    path = checkpoint_path(name)
    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = load_model(str(path), "cpu")
    assert isinstance(model, Decoder)
    assert_parity(model, net, PROTEINS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder"), [("iglm", "IgLM"), ("iglm-s", "IgLM-S")])
def test_iglm_gives_what_transformers_gives(name: str, folder: str) -> None:
    try:
        model = load_model(name, "cpu")
    except ModelError as error:
        pytest.skip(str(error))
    from importlib.metadata import distribution

    path = distribution("iglm").locate_file(f"iglm/trained_models/{folder}")
    net = transformers.GPT2LMHeadModel.from_pretrained(str(path), dtype=torch.float32).eval()
    assert isinstance(model, Decoder) and model.name == folder and "non-commercial" in model.note
    proteins = [
        Protein("h", "chain=heavy species=human", "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVS"),
        Protein("l", "chain=light species=mouse", "DIVMTQSPASLAVSLGQRATISCRASQS"),
    ]
    assert_parity(model, net, proteins)


def decoded(model: Decoder, tokens: Tensor, prompts: list[int]) -> list[Tensor]:
    """Each row's hidden states: its prompt prefilled, the rest of it token by token, from a float32 cache."""
    lengths = model.alphabet.lengths(tokens).tolist()
    cache = DenseCache(model, len(tokens), tokens.shape[1] + max(prompts), FORMATS["fp32"])
    longest = max(prompts)
    filled = tokens[:, :longest].clone()
    for row, prompt in enumerate(prompts):
        filled[row, prompt:] = model.alphabet.padding
    with torch.no_grad():
        parts = [
            [hidden[:prompt]]
            for hidden, prompt in zip(forward.prefill(model, filled, cache), prompts, strict=True)
        ]
        for taken in range(max(length - prompt for length, prompt in zip(lengths, prompts, strict=True))):
            at = [min(prompt + taken, length - 1) for length, prompt in zip(lengths, prompts, strict=True)]
            hidden = forward.step(model, tokens[range(len(tokens)), at], cache)
            for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
                if prompt + taken < length:
                    parts[row].append(hidden[row : row + 1])
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompts", [[1, 1, 1], [2, 9, 5], [35, 7, 14]], ids=str)
def test_nothing_drifts(case: str, prompts: list[int], models: Callable[[str], Decoder]) -> None:
    model = models(case)
    tokens = to_tokens(PROTEINS, model)
    with torch.no_grad():
        expected = forward.encode(model, tokens)
        passed = forward.teacher_forced(model, tokens, prompts, None)
    for row, found in enumerate(decoded(model, tokens, prompts)):
        assert distance(found, expected[row, : len(found)]) < 1e-5
        assert distance(passed[row, : len(found)], expected[row, : len(found)]) < 1e-5


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("start", [1, 6])
def test_replay_goes_on_from_a_prefill(case: str, start: int, models: Callable[[str], Decoder]) -> None:
    model = models(case)
    tokens = to_tokens(PROTEINS[:1], model)
    cache = DenseCache(model, 1, tokens.shape[1], FORMATS["fp32"])
    with torch.no_grad():
        forward.prefill(model, tokens[:, :start], cache)
        found = forward.replay(model, tokens[:, start:], cache)
        assert distance(found, forward.encode(model, tokens)[:, start:]) < 1e-5


def first_layer(model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k after RoPE and v of layer 0."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k, v))
        return q

    with torch.no_grad():
        forward.encode(model, tokens, observe)
    return seen[0]


@pytest.mark.parametrize("case", CASES)
def test_the_first_layer_follows_from_tokens(case: str, models: Callable[[str], Decoder]) -> None:
    model = models(case)
    tokens = model.alphabet.random(3, 40)
    _, k, v = first_layer(model, tokens)
    found_k, found_v = model.first_layer_tables().keys_values(
        tokens, torch.ones(3), forward.rope_at(model, 0, tokens.shape[1])
    )
    assert found_k.shape == k.shape == (3, model.shape.key_value_heads, 40, model.shape.head_dim)
    assert torch.allclose(found_k, k, rtol=1e-5, atol=1e-5) and torch.allclose(found_v, v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=str)
@pytest.mark.parametrize("lengths", [None, [40, 1, 17]], ids=str)
def test_attention_over_tokens_is_plain_attention(
    case: str, dtype: torch.dtype, lengths: list[int] | None, models: Callable[[str], Decoder]
) -> None:
    model = models(case)
    tokens = model.alphabet.random(3, 40)
    _, k, v = first_layer(model, tokens)
    q = torch.randn(3, k.shape[1], 2, k.shape[3], generator=torch.Generator().manual_seed(0))
    counts = torch.tensor(lengths or [40] * 3)
    scores = (q @ k.mT).masked_fill(torch.arange(40) >= counts[:, None, None, None], -torch.inf)
    found = attend_tokens(
        q, tokens.to(dtype), model.first_layer_tables(), torch.ones(3), forward.rope_at(model, 0, 48),
        None if lengths is None else counts,
    )  # fmt: skip
    assert torch.allclose(found, scores.softmax(-1) @ v, rtol=1e-5, atol=1e-5)


SIZES_REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("gpt2", {"n_embd": 50}, "width 50 does not split into 4 heads"),
    ("gpt2", {"n_layer": 10**6}, "no protein language model's"),
    ("gpt2", {"n_head": 0}, "0 heads"),
    ("gpt2", {"n_positions": "many"}, "whole numbers"),
    ("gpt2", {"vocab_size": 31.5}, "vocab_size is 31.5"),
    ("gpt2", {"vocab_size": 8}, "has token .* not of one model"),
    ("gpt2", {"n_layer": ...}, "names no 'n_layer'"),
    ("llama 2:1", {"num_key_value_heads": 3}, "4 query heads do not share 3 key/value heads"),
    ("llama 2:1", {"head_dim": 15}, "heads of even size"),
    ("llama 2:1", {"head_dim": 24}, r"q_proj\.weight is \[64, 64\], not \[96, 64\]"),
    ("llama 2:1", {"num_attention_heads": ...}, "names no 'num_attention_heads'"),
    ("llama 2:1", {"intermediate_size": None}, "intermediate_size"),
    ("gptj half turned", {"rotary_dim": 7}, "rotary_dim is 7"),
    ("gptj half turned", {"rotary_dim": 18}, "rotary_dim is 18"),
    ("gptj half turned", {"rotary_dim": 0}, "rotary_dim is 0"),
]
FIELDS_REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("llama 2:1", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ("llama 2:1", {"rope_scaling": "linear"}, "rope_scaling"),
    (
        "llama 2:1",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}},
        "rope_parameters",
    ),
    ("llama 2:1", {"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "rope_parameters"),
    ("llama 2:1", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters"),
    ("llama 2:1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama 2:1", {"rope_theta": "big", "rope_parameters": None}, "rope_theta"),
    ("llama 2:1", {"router_jitter_noise": 0.1}, "does not know the field 'router_jitter_noise'"),
    ("llama 2:1", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama 2:1", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama 2:1", {"attention_bias": "yes"}, "attention_bias"),
    ("llama 2:1", {"hidden_act": "gelu_10"}, "activation 'gelu_10'"),
    ("llama 2:1", {"rms_norm_eps": 0.0}, "epsilon"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    ("mistral", {"sliding_window": "long"}, "sliding_window"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("gptj half turned", {"rotary": False}, "rotary"),
    ("gpt2", {"model_type": "gpt_neox"}, "model_type is .*gpt_neox"),
    ("gpt2", {"num_attention_heads": 2}, "num_attention_heads is 2 and n_head is 4"),
    ("gpt2", {"hidden_size": 64}, "hidden_size is 64"),
    ("gptj half turned", {"num_hidden_layers": 1}, "num_hidden_layers is 1"),
    ("gptj half turned", {"max_position_embeddings": 64}, "max_position_embeddings is 64"),
    ("gpt2", {"architectures": 5}, "architectures is 5"),
    ("llama 2:1", {"hidden_act": ["silu"]}, "activation"),
    ("llama 2:1", {"max_position_embeddings": None}, "max_position_embeddings is None"),
    ("llama 2:1", {"rope_theta": 5e5}, "rope_theta is 500000.0, and in rope_parameters 10000.0"),
]


@pytest.fixture
def copied(folders: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> Callable[[str], Path]:
    return lambda case: Path(shutil.copytree(folders(case)[0], tmp_path / "copy"))


def refusal(folder: Path) -> str:
    """What loading a folder is refused with: one line that names the folder."""
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), "cpu")
    message = str(caught.value)
    assert "\n" not in message and folder.name in message and len(message) < 700
    return message


@pytest.mark.parametrize(("case", "change", "reason"), [*SIZES_REFUSED, *FIELDS_REFUSED])
def test_settings_that_are_not_computed_are_refused_by_name(
    case: str, change: dict[str, object], reason: str, copied: Callable[[str], Path]
) -> None:
    change_config(folder := copied(case), **change)
    message = refusal(folder)
    assert re.search(reason, message), message


def test_what_a_config_leaves_out_is_as_in_transformers(copied: Callable[[str], Path]) -> None:
    change_config(folder := copied("mistral"), sliding_window=..., max_position_embeddings=8192)
    assert load_model(str(folder), "cpu").shape.context == 4096


def test_gptj_has_2048_positions_where_none_are_said(copied: Callable[[str], Path]) -> None:
    change_config(folder := copied("gptj half turned"), n_positions=...)
    assert load_model(str(folder), "cpu").shape.context == 2048


WEIGHTS_REFUSED: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("llama 2:1", {"model.layers.1.mlp.up_proj.weight": None}, r"layers\.1\.mlp\.up_proj\.weight is missing"),
    ("llama biases", {"model.layers.0.self_attn.o_proj.bias": None}, r"o_proj\.bias is missing"),
    ("llama 2:1", {"lm_head.weight": None}, r"lm_head\.weight is missing"),
    ("gpt2", {"transformer.wpe.weight": None}, r"wpe\.weight is missing"),
    ("gpt2", {"transformer.wpe.weight": torch.ones(8, 48)}, r"wpe\.weight is \[8, 48\], not \[256, 48\]"),
    ("llama 2:1", {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, r"q_proj\.bias.*does not have"),
    ("llama 2:1", {"model.layers.2.mlp.up_proj.weight": torch.ones(80, 64)}, r"layers\.2.*does not have"),
    ("gpt2", {"score.weight": torch.ones(2, 48)}, r"score\.weight.*does not have"),
    ("gpt2", {"lm_head.weight": torch.ones(ROWS, 48)}, r"lm_head\.weight is not the embedding"),
    ("llama mlp_bias tied", {"lm_head.weight": torch.ones(ROWS, 64)}, r"lm_head\.weight is not the embedding"),
    ("gptj tied", {"lm_head.weight": torch.ones(ROWS, 64)}, r"lm_head\.weight is not the embedding"),
    ("gpt2", {"transformer.h.0.mlp.c_fc.weight": torch.ones(48, 192, dtype=torch.int8)}, "c_fc.*stored as int8"),
    ("gpt2", {"transformer.ln_f.weight": torch.full((48,), torch.nan)}, r"ln_f\.weight holds what is no number"),
    (
        "llama 2:1",
        {"lm_head.weight": torch.full((ROWS, 64), torch.inf)},
        r"lm_head\.weight holds what is no number",
    ),
    ("llama 2:1", {"norm.weight": torch.ones(64)}, r"with and without 'model\.'"),
]


@pytest.mark.parametrize(
    ("case", "change", "reason"), WEIGHTS_REFUSED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_weights_that_are_not_the_models_are_refused_by_name(
    case: str, change: dict[str, Tensor | None], reason: str, copied: Callable[[str], Path]
) -> None:
    change_weights(folder := copied(case), change)
    message = refusal(folder)
    assert re.search(reason, message), message


def test_code_beside_a_model_is_not_run(copied: Callable[[str], Path], models: Callable[[str], Decoder]) -> None:
    folder = copied("llama 2:1")
    (folder / "modeling_own.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    change_config(folder, auto_map={"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"})
    assert load_model(str(folder), "cpu").fingerprint == models("llama 2:1").fingerprint


def test_masks_and_angles_that_older_versions_saved_are_not_read(
    copied: Callable[[str], Path], models: Callable[[str], Decoder]
) -> None:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    buffers = {
        "gpt2": {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)},
        "gptj half turned": {"transformer.h.0.attn.bias": mask},
        "llama 2:1": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    }
    for case, added in buffers.items():
        change_weights(folder := copied(case), added)
        assert load_model(str(folder), "cpu").fingerprint == models(case).fingerprint
        shutil.rmtree(folder)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_fingerprint_is_of_weights_settings_and_tokens(
    case: str, copied: Callable[[str], Path], models: Callable[[str], Decoder]
) -> None:
    seen = {models(case).fingerprint}
    name = "layer_norm_epsilon" if case.startswith("gpt") else "rms_norm_eps"
    change_config(folder := copied(case), **{name: 2e-5})
    seen.add(load_model(str(folder), "cpu").fingerprint)
    if not case.startswith("gpt"):
        change_config(folder, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
        seen.add(load_model(str(folder), "cpu").fingerprint)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"A": 3', '"A": 4').replace('"C": 4', '"C": 3'))
    seen.add(load_model(str(folder), "cpu").fingerprint)
    assert len(seen) == (3 if case.startswith("gpt") else 4)


def test_a_protein_beyond_the_context_is_refused(models: Callable[[str], Decoder]) -> None:
    model = models("mistral short window")
    assert to_tokens([Protein("a", "", "M" * 62)], model).shape[1] == 64
    with pytest.raises(InputError, match=r"record 2 \(b\): 65 tokens.*takes 64"):
        to_tokens([Protein("a", "", "M"), Protein("b", "", "M" * 63, "x.fasta", 2)], model)


def test_a_head_is_shared_by_as_many_as_the_kernels_serve() -> None:
    assert MOST_SHARING == dispatch.MAX_QUERIES
    check_shape(Shape(2, 64, 16, 8, 1), Path("m"))
    with pytest.raises(ModelError, match="32 query heads share keys and values; turboesm serves up to 16"):
        check_shape(Shape(2, 64, 32, 8, 1), Path("m"))


@pytest.fixture(scope="module")
def bundles(models: Callable[[str], Decoder], calibration_proteins: list[Protein]) -> Callable[[str, str], Bundle]:
    made: dict[tuple[str, str], Bundle] = {}

    def bundle(case: str, recipe: str) -> Bundle:
        if (case, recipe) not in made:
            made[case, recipe] = calibrate(models(case), calibration_proteins[:12], parse_recipe(recipe))
        return made[case, recipe]

    return bundle


@pytest.mark.parametrize("case", FAMILIES)
def test_a_bundle_keeps_family_sizes_and_tokens(
    case: str, bundles: Callable[[str, str], Bundle], models: Callable[[str], Decoder], tmp_path: Path
) -> None:
    model, bundle = models(case), bundles(case, "flat")
    bundle.save(tmp_path / "b.tqz")
    back = read_bundle(tmp_path / "b.tqz")
    assert (back.family, back.shape, back.fingerprint) == (model.family, model.shape, model.fingerprint)
    assert back.shape.own_key_value_heads == (2 if case.startswith(("llama", "mistral")) else None)
    assert back.shape.own_head_dim == (24 if "own" in case else model.shape.own_head_dim)
    assert back.shape.context == CONTEXT and back.spec.heads == model.shape.key_value_heads
    assert back.alphabet.described() == model.alphabet.described() and back.spec.kinds == ROWS
    assert back.alphabet.tokenize(PROTEINS[0]) == model.alphabet.tokenize(PROTEINS[0])
    back.check_model(model, "b.tqz")


def test_a_bundle_of_another_family_is_refused_by_name(
    bundles: Callable[[str, str], Bundle], models: Callable[[str], Decoder], tiny: EsmModel
) -> None:
    bundle = bundles("gpt2", "flat")
    with pytest.raises(BundleError, match=r"family 'gpt2'.*is of 'llama'"):
        bundle.check_model(models("llama 2:1"), "b.tqz")
    with pytest.raises(BundleError, match=r"family 'gpt2'.*is of 'esm2'"):
        bundle.check_model(tiny, "b.tqz")
    with pytest.raises(BundleError, match="calibrated for"):
        bundle.check_model(models("gpt2 n_inner"), "b.tqz")


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("recipe", ["flat", "auto"])
def test_a_packed_cache_decodes_as_its_codec_says(
    case: str, recipe: str, bundles: Callable[[str, str], Bundle], models: Callable[[str], Decoder]
) -> None:
    model, spec = models(case), bundles(case, recipe).spec
    tokens = to_tokens(PROTEINS[:1], model)
    cache = PackedCache(model, spec, 1, tokens.shape[1], backend="torch")
    with torch.no_grad():
        forward.prefill(model, tokens[:, :9], cache)
        found = forward.replay(model, tokens[:, 9:], cache)
        passed = forward.teacher_forced(model, tokens, [9], PackedCodec(spec, model.device))[:, 9:]
        exact = forward.encode(model, tokens)[:, 9:]
    similar = torch.nn.functional.cosine_similarity
    assert similar(found, passed, dim=-1).mean() > 0.999  # in float32 a code may tip over a threshold
    assert 0.5 < similar(found, exact, dim=-1).mean() < 1 - 1e-6


def _with_positions(spec: CodecSpec) -> list[int]:
    """The layers whose keys are centred at each position."""
    return [at for at, layer in enumerate(spec.layers) if layer is not None and layer.k.centre_at is not None]


@pytest.mark.parametrize("recipe", ["flat", "waterfill"])
def test_keys_are_centred_at_each_position_where_those_are_learned(
    recipe: str, models: Callable[[str], Decoder], calibration_proteins: list[Protein]
) -> None:
    """They come back nearer to what they were, of proteins that took no part."""
    model, proteins = models("gpt2"), calibration_proteins[:24]
    statistics = collect(model, proteins)
    plain = replace(parse_recipe(recipe), positions=False)
    found, without = (fit(model, statistics, each) for each in (parse_recipe(recipe), plain))
    assert 0 in _with_positions(found) and not _with_positions(without)
    assert found.size.shared_bytes > without.size.shared_bytes
    tokens = to_tokens(calibration_proteins[30:34], model)[:, : min(len(p.sequence) for p in proteins)]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    observe = forward.own_attention(model, tokens)

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[layer] = k, v
        return observe(layer, q, k, v)

    with torch.no_grad():
        forward.encode(model, tokens, keep)
    rope = forward.rope_at(model, 0, tokens.shape[1])
    errors = [
        float((PackedCodec(spec, model.device).roundtrip(0, *seen[0], rope)[0] - seen[0][0]).square().mean())
        for spec in (found, without)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_keys_that_are_turned_have_one_centre(bundles: Callable[[str, str], Bundle]) -> None:
    assert not _with_positions(bundles("llama 2:1", "flat").spec)


def test_sums_by_position_add_up(models: Callable[[str], Decoder], calibration_proteins: list[Protein]) -> None:
    model, proteins = models("gpt2"), calibration_proteins[:12]
    fitted, _ = hold_back(proteins)
    sums = collect(model, proteins).positions
    assert sums.key.shape == (2, CONTEXT, 4, 12)
    lengths = torch.tensor([model.alphabet.length(protein) for protein in fitted])
    assert torch.equal(sums.count, (torch.arange(CONTEXT) < lengths[:, None]).sum(0))
    twice = sums + sums
    assert torch.equal(twice.count, 2 * sums.count) and torch.equal(twice.key, 2 * sums.key)
    whole = torch.stack([layer.key.sum(0) for layer in collect(model, proteins).layers])
    assert torch.allclose(sums.key.double().sum(1), whole, rtol=1e-4, atol=1e-2)


def test_a_bundle_keeps_the_centres_of_positions(bundles: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    bundle = bundles("gpt2", "flat")
    bundle.save(tmp_path / "b.tqz")
    back = read_bundle(tmp_path / "b.tqz").spec
    assert _with_positions(back) == _with_positions(bundle.spec) != []
    good = torch.zeros(4, CONTEXT, 12).half()
    for wrong in (good[:, 1:], good.float(), good + torch.inf):
        layer = bundle.spec.layers[0]
        assert layer is not None
        layers = (replace(layer, k=replace(layer.k, centre_at=wrong)), *bundle.spec.layers[1:])
        broken = replace(bundle, spec=replace(bundle.spec, layers=layers))
        broken.save(tmp_path / "broken.tqz", overwrite=True)
        with pytest.raises(BundleError, match="centre_at"):
            read_bundle(tmp_path / "broken.tqz")


@pytest.mark.parametrize("case", ["gpt2", "llama 8:1"])
def test_looking_up_decodes_as_the_plain_reference_does(
    case: str, bundles: Callable[[str, str], Bundle], models: Callable[[str], Decoder]
) -> None:
    """Grouped queries and centres at each position, in sequences of several lengths."""
    model, spec = models(case), bundles(case, "auto-coded").spec
    assert bool(_with_positions(spec)) == (case == "gpt2")
    tokens = to_tokens(PROTEINS, model)
    found = []
    with torch.no_grad():
        for backend in (None, "torch"):
            cache = PackedCache(model, spec, len(tokens), tokens.shape[1] + 8, backend=backend)
            forward.prefill(model, tokens, cache)
            found.append(torch.stack([forward.step(model, tokens[:, at], cache) for at in range(1, 8)]))
    assert torch.nn.functional.cosine_similarity(*found, dim=-1).min() > 0.999


def _with_keys(statistics: Statistics, keys: Tensor, positions: Tensor, held: int) -> Statistics:
    """Statistics of keys float32 [N, H, d] at `positions` in layer 0, the last `held` of them held back."""
    fitted, at = keys[:-held], positions[:-held]
    count = torch.bincount(at, minlength=CONTEXT)
    key = torch.zeros(2, CONTEXT, *keys.shape[1:]).index_add_(1, at, fitted.expand(2, -1, -1, -1))
    sums = []
    for layer in statistics.layers:
        parts = [fitted[at == 0].double(), fitted[at > 0].double()]
        square = torch.stack([torch.einsum("nhd,nhe->hde", x, x) for x in parts])
        ones = torch.cat((torch.ones(6), torch.zeros(6))).double()  # RoPE's phases where nothing is turned
        total = torch.stack([x.sum(0) for x in parts])
        number = torch.tensor([float(len(x)) for x in parts]).double()
        phases = number[:, None, None] * ones[:, None] * ones
        sums.append(
            replace(
                layer, count=number, key=total, key_key=square, key_phase=total[..., None] * ones,
                phase_phase=phases,
            )
        )  # fmt: skip
    sample, back = (
        replace(old, positions=where, hashes=where, keys=(x, x), values=(x, x), gradients=())
        for old, x, where in (
            (statistics.sample, fitted, at), (statistics.held, keys[-held:], positions[-held:])
        )
    )  # fmt: skip
    return replace(statistics, layers=tuple(sums), sample=sample, held=back, positions=PositionSums(count, key))


@pytest.mark.parametrize("sinks", [0, 1])
def test_moments_are_of_keys_less_their_positions_means(
    sinks: int, models: Callable[[str], Decoder], calibration_proteins: list[Protein]
) -> None:
    """The covariance is that of the centred keys themselves; means that are noise are not taken."""
    model, generator = models("gpt2"), torch.Generator().manual_seed(0)
    usual = collect(model, calibration_proteins[:12])
    positions = torch.arange(30).repeat(34)
    keys = torch.randn(len(positions), 4, 12, generator=generator)
    own = 3 * torch.randn(CONTEXT, 4, 12, generator=generator)
    own[0] += 6
    recipe = replace(parse_recipe("flat"), sinks=sinks)
    found = layer_moments(model, _with_keys(usual, keys + own[positions], positions, 120), 0, recipe)["k"]
    assert found.mean_at is not None
    body = (keys + own[positions])[:-120][positions[:-120] >= sinks].transpose(0, 1).double()
    at = positions[:-120][positions[:-120] >= sinks]
    left = body - found.mean[:, None] - found.mean_at[:, at].double()
    assert torch.allclose(found.covariance, left.mT @ left / left.shape[1], rtol=1e-2, atol=1e-2)
    assert torch.linalg.eigvalsh(found.covariance).min() > 0
    few = slice(-120 - 60, None)  # two tokens at each position, without a mean of their own
    for statistics in (_with_keys(usual, keys[few], positions[few], 120), _with_keys(usual, keys, positions, 120)):
        assert layer_moments(model, statistics, 0, recipe)["k"].mean_at is None


def test_centres_of_positions_are_for_models_that_have_them(
    bundles: Callable[[str, str], Bundle], models: Callable[[str], Decoder], tmp_path: Path
) -> None:
    llama, bundle = models("llama 2:1"), bundles("llama 2:1", "flat")
    layer = bundle.spec.layers[0]
    assert layer is not None
    centred = replace(layer, k=replace(layer.k, centre_at=torch.zeros(2, CONTEXT, 16).half()))
    wrong = replace(bundle, spec=replace(bundle.spec, layers=(centred, *bundle.spec.layers[1:])))
    with pytest.raises(BundleError, match="learned positions"):
        wrong.check_model(llama, "b.tqz")
    endless = replace(wrong, shape=replace(wrong.shape, context=None))
    endless.save(tmp_path / "b.tqz")
    with pytest.raises(BundleError, match="no number"):
        read_bundle(tmp_path / "b.tqz")


@pytest.mark.parametrize("case", ["gpt2", "gpt2 untied relu", "gptj tied", "gptj half turned"])
def test_a_wider_head_gives_the_same_logits(
    case: str, models: Callable[[str], Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(case)
    assert model.with_wide_head() is model  # 32 rows are a multiple of 8 already
    monkeypatch.setattr(decoder, "HEAD_ROWS", 12)
    wide = model.with_wide_head()
    hidden = torch.randn(3, model.shape.width, generator=torch.Generator().manual_seed(0))
    assert wide.wide_head is not None and len(wide.wide_head.weight) == 36
    assert wide.logits(hidden).shape == (3, ROWS) and torch.allclose(wide.logits(hidden), model.logits(hidden))
    assert (wide.head.weight is wide.embedding) == (model.head.weight is model.embedding)
    assert wide.head.weight.data_ptr() == wide.wide_head.weight.data_ptr()
    back = wide.to(torch.device("cpu"))
    assert back.wide_head is None and torch.equal(back.embedding, model.embedding)
    assert (back.head.weight is back.embedding) == (model.head.weight is model.embedding)
