"""One door for all models, and the same numbers as fair-esm behind it."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from folders import to_hugging_face

from turboesm_cli.errors import DeviceError, ModelError
from turboesm_cli.models import forward
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.loading import load_model, pick_device
from turboesm_cli.models.shapes import OFFICIAL, Shape, check_shape, official_name
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens

TOLERANCE = 1e-5


def fair_esm_hidden(model: EsmModel, tokens: torch.Tensor) -> torch.Tensor:
    last = model.shape.layers
    with torch.no_grad():
        return model.net(tokens, repr_layers=[last])["representations"][last]


def assert_parity(model: EsmModel, proteins: list[Protein], masked: bool) -> None:
    tokens = to_tokens(proteins, model)
    if masked:
        tokens[0, 3:7] = ESM2_ALPHABET.mask
        tokens[-1, 5] = ESM2_ALPHABET.mask
    real = tokens.ne(ESM2_ALPHABET.padding)
    with torch.no_grad():
        found = forward.encode(model, tokens)
    assert (found - fair_esm_hidden(model, tokens))[real].abs().max() <= TOLERANCE


@torch.no_grad()
def test_embeddings_follow_weights_that_change(tiny: EsmModel) -> None:
    """What is kept of them is of these weights: scaled in place, exchanged, in another dtype."""
    model = replace(tiny, net=copy.deepcopy(tiny.net))
    tokens, unmasked = torch.arange(len(ESM2_ALPHABET))[None], torch.tensor([[[0.9]]])
    first = model.embed(tokens, None, unmasked)
    weight = model.net.embed_tokens.weight
    weight.mul_(2)
    assert torch.equal(model.embed(tokens, None, unmasked), 2 * first)
    weight.data = weight.data * 2
    assert torch.equal(model.embed(tokens, None, unmasked), 4 * first)
    for factor in range(5, 25):  # twice between looks: the last may lie where the first did
        weight.data = weight.data * torch.nan
        weight.data = tiny.net.embed_tokens.weight.data * factor
        assert torch.allclose(model.embed(tokens, None, unmasked), factor * first)
    assert model.to(model.device, torch.float64).embed(tokens, None, unmasked).dtype == torch.float64
    assert torch.equal(tiny.embed(tokens, None, unmasked), first)


@pytest.mark.parametrize("token", [-1, len(ESM2_ALPHABET)])
def test_what_is_no_token_is_refused(token: int, tiny: EsmModel) -> None:
    with pytest.raises(IndexError), torch.no_grad():
        tiny.embed(torch.tensor([[5, token]]), None, torch.ones(1, 1, 1))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("count", [1, 5], ids=["alone", "padded-batch"])
def test_hidden_states_equal_fair_esm_on_the_embedded_model(
    embedded: EsmModel, calibration_proteins: list[Protein], count: int, masked: bool
) -> None:
    assert_parity(embedded, calibration_proteins[:count], masked)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["esm2_t6_8M_refit", "esm2_t8_25M_hd64.pt"])
def test_hidden_states_equal_fair_esm_on_other_checkpoints(
    name: str, calibration_proteins: list[Protein], checkpoint_path: Callable[[str], Path]
) -> None:
    model = load_model(str(checkpoint_path(name)), "cpu")
    assert_parity(model, calibration_proteins[:4], masked=False)
    assert_parity(model, calibration_proteins[:4], masked=True)
    with torch.no_grad():
        tokens = to_tokens(calibration_proteins[:1], model)
        logits = model.logits(forward.encode(model, tokens))
        assert torch.allclose(logits, model.net(tokens)["logits"], atol=1e-4)


def test_padding_does_not_change_a_protein(embedded: EsmModel, calibration_proteins: list[Protein]) -> None:
    with torch.no_grad():
        alone = forward.encode(embedded, to_tokens(calibration_proteins[:1], embedded))[0]
        batch = forward.encode(embedded, to_tokens(calibration_proteins[:5], embedded))[0]
    assert torch.allclose(alone, batch[: len(alone)], atol=TOLERANCE)


def hook(layer: torch.nn.Module, heads: int, seen: list[list[torch.Tensor]]) -> None:
    """Have fair-esm's attention leave its q, k (after RoPE) and v, each [B, H, T, d], in `seen`."""
    values = []
    layer.self_attn.v_proj.register_forward_hook(
        lambda _m, _i, out: values.append(out.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3))
    )
    layer.self_attn.rot_emb.register_forward_hook(
        lambda _m, _i, out: seen.append([*(x.unflatten(0, (-1, heads)) for x in out), values.pop()])
    )


def test_the_engines_queries_keys_and_values_are_those_of_fair_esms_hooks(
    tiny_path: Path, peptides: list[Protein]
) -> None:
    model = load_model(str(tiny_path), "cpu")
    tokens = to_tokens(peptides[:3], model)
    hooked: list[list[torch.Tensor]] = []
    own = []
    exact = forward.own_attention(model, tokens)

    def observe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own.append([q, k, v])
        return exact(layer, q, k, v)

    for layer in model.net.layers:
        hook(layer, model.shape.heads, hooked)
    with torch.no_grad():
        model.net(tokens)
        forward.encode(model, tokens, observe)
    assert len(hooked) == len(own) == model.shape.layers
    for found, expected in zip(hooked, own, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_both_formats_load_the_same_model(tiny_path: Path, tiny: EsmModel, tmp_path: Path) -> None:
    other = load_model(str(to_hugging_face(tiny_path, tmp_path / "hf")), "cpu")
    assert other.fingerprint == tiny.fingerprint
    assert other.has_lm_head
    tokens = to_tokens([Protein("a", "", "MKTAYIAKQR")], tiny)
    assert torch.equal(other.net(tokens)["logits"], tiny.net(tokens)["logits"])


@pytest.mark.parametrize("kind", ["EsmForMaskedLM", "EsmModel", "EsmForSequenceClassification"])
def test_what_transformers_saves_is_the_same_model(
    tiny: EsmModel, tiny_path: Path, tmp_path: Path, kind: str
) -> None:
    """Its later versions save norms as gamma and beta, and RoPE's frequencies once, under "layer.*"."""
    transformers = pytest.importorskip("transformers")
    folder = to_hugging_face(tiny_path, tmp_path / "hf")
    settings = {"vocab_size": 33, "intermediate_size": 128, "mask_token_id": 32, "pad_token_id": 1}
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    getattr(transformers, kind).from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = load_model(str(tmp_path / "saved"), "cpu")
    assert saved.fingerprint == tiny.fingerprint
    assert saved.has_lm_head == (kind == "EsmForMaskedLM")
    tokens = tiny.alphabet.random(2, 9)
    torch.testing.assert_close(forward.encode(saved, tokens), forward.encode(tiny, tokens), rtol=0, atol=0)
    if saved.has_lm_head:
        hidden = torch.randn(1, 3, 32)
        torch.testing.assert_close(saved.logits(hidden), tiny.logits(hidden), rtol=0, atol=0)


def test_frequencies_of_both_kinds_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    folder = to_hugging_face(tiny_path, tmp_path / "hf")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert any(name.endswith("layer.1.attention.self.rotary_embeddings.inv_freq") for name in weights)
    weights["esm.rotary_embeddings.inv_freq"] = torch.ones(8)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"it has 'rotary_embeddings[.]inv_freq'"):
        load_model(str(folder), "cpu")
    alone = {name: x for name, x in weights.items() if ".layer." not in name or not name.endswith("inv_freq")}
    safetensors.torch.save_file(alone, folder / "model.safetensors")
    assert torch.equal(load_model(str(folder), "cpu").inverse_frequencies, torch.ones(8))


def test_a_trunk_works_and_says_that_it_has_no_head(tiny_path: Path, tiny: EsmModel, tmp_path: Path) -> None:
    trunk = load_model(str(to_hugging_face(tiny_path, tmp_path / "hf", trunk_only=True)), "cpu")
    assert not trunk.has_lm_head and trunk.fingerprint == tiny.fingerprint
    tokens = to_tokens([Protein("a", "", "MKTAYIAKQR")], tiny)
    assert torch.equal(fair_esm_hidden(trunk, tokens), fair_esm_hidden(tiny, tokens))
    with pytest.raises(ModelError, match="trunk without a language-model head"):
        trunk.logits(fair_esm_hidden(trunk, tokens))


def test_the_fingerprint_tells_models_apart(
    tmp_path: Path, tiny: EsmModel, save_tiny_model: Callable[..., Path]
) -> None:
    other = load_model(str(save_tiny_model(tmp_path / "other.pt", seed=1)), "cpu")
    assert other.fingerprint != tiny.fingerprint


def test_rounded_rope_frequencies_come_from_the_checkpoint(embedded: EsmModel) -> None:
    ideal = 10000 ** (-torch.arange(0, 16, 2) / 16)
    assert torch.equal(embedded.inverse_frequencies, ideal.half().float())


@pytest.mark.parametrize("name", ["esm2_t33_650M", "t33_650M", "esm2_t33_650M_UR50D", "t33_650M_UR50D"])
def test_official_names(name: str) -> None:
    assert official_name(name) == "esm2_t33_650M_UR50D"
    assert official_name("esm1b_t33_650M_UR50S") is None
    assert {shape.head_dim for shape in OFFICIAL.values()} == {16, 24, 32, 64, 128}


def test_an_official_model_loads_from_the_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_tiny_model: Callable[..., Path]
) -> None:
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    save_tiny_model(folder / "esm2_t6_8M_UR50D.pt", layers=6, width=320, heads=20)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_model("t6_8M", "cpu").name == "esm2_t6_8M_UR50D"


def test_another_models_file_under_an_official_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_tiny_model: Callable[..., Path]
) -> None:
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    save_tiny_model(folder / "esm2_t12_35M_UR50D.pt", layers=6, width=320, heads=20)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="is not esm2_t12_35M_UR50D: it holds 6 layers of 320 channels"):
        load_model("t12_35M", "cpu")


def test_an_official_model_that_cannot_be_had_says_what_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("turboesm_cli.models.checkpoints.WEIGHTS_URL", "http://127.0.0.1:9/{name}.pt")
    with pytest.raises(ModelError, match=r"fetch http://.*/esm2_t33_650M_UR50D.pt \(about 2.6 GB\)") as refused:
        load_model("esm2_t33_650M", "cpu")
    for place in (tmp_path / "hub" / "checkpoints" / "esm2_t33_650M_UR50D.pt", "name its path", tmp_path / "hf"):
        assert str(place) in str(refused.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was run')",))


def bad_checkpoints(folder: Path, save_tiny_model: Callable[..., Path]) -> dict[str, Path]:
    names = ("pickle", "empty", "text", "no-cfg", "cut", "list", "nan")
    files = {name: folder / f"{name}.pt" for name in names}
    files["pickle"].write_bytes(pickle.dumps(Bomb()))
    files["empty"].write_bytes(b"")
    files["text"].write_text("not a checkpoint")
    torch.save({"model": {}}, files["no-cfg"])
    whole = save_tiny_model(folder / "whole.pt").read_bytes()
    with torch.serialization.safe_globals([argparse.Namespace]):
        good = torch.load(folder / "whole.pt", weights_only=True)
    torch.save({**good, "model": list(good["model"].values())}, files["list"])
    torch.save({**good, "model": {key: value * torch.nan for key, value in good["model"].items()}}, files["nan"])
    files["cut"].write_bytes(whole[: len(whole) // 2])
    return files


@pytest.mark.parametrize("kind", ["pickle", "empty", "text", "no-cfg", "cut", "list", "nan"])
def test_bad_checkpoints_are_one_line_errors(
    kind: str, tmp_path: Path, save_tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(str(bad_checkpoints(tmp_path, save_tiny_model)[kind]), "cpu")
    assert "\n" not in str(caught.value) and kind in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"position_embedding_type": "absolute"}, "rotary"),
        ({"num_hidden_layers": 10**9}, "no protein language model's"),
        ({"num_hidden_layers": "2"}, "whole numbers"),
        ({"hidden_size": 33}, "does not split"),
        ({"hidden_size": 64}, "no ESM-2 checkpoint"),
        ({"num_attention_heads": None}, "whole numbers"),
    ],
)
def test_bad_configs_are_one_line_errors(
    change: dict[str, object], reason: str, tiny_path: Path, tmp_path: Path
) -> None:
    folder = to_hugging_face(tiny_path, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=reason):
        load_model(str(folder), "cpu")


BAD_INDICES = {
    "empty": "",
    "list": "[]",
    "number": '{"weight_map": 3}',
    "no names": '{"weight_map": {}}',
    "deep": "[" * 100_000,
    "a number for a name": '{"weight_map": {"a": 3}}',
    "a list for a name": '{"weight_map": {"a": ["model.safetensors"]}}',
    "names of two kinds": '{"weight_map": {"a": 3, "b": "x.safetensors"}}',
    "another folder": '{"weight_map": {"a": "../hf/moved.safetensors"}}',
    "a whole path": '{"weight_map": {"a": "/etc/passwd.bin"}}',
    "NUL": '{"weight_map": {"a": "moved\\u0000.safetensors"}}',
    "a pipe": '{"weight_map": {"a": "pipe"}}',
    "no such file": '{"weight_map": {"a": "none.safetensors"}}',
    "itself": '{"weight_map": {"a": "model.safetensors.index.json"}}',
}


@pytest.mark.parametrize("text", BAD_INDICES.values(), ids=BAD_INDICES.keys())
def test_a_bad_index_of_weight_files_is_a_one_line_error(text: str, tiny_path: Path, tmp_path: Path) -> None:
    folder = to_hugging_face(tiny_path, tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "moved.safetensors")
    os.mkfifo(folder / "pipe")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json|none\.safetensors") as caught:
        load_model(str(folder), "cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_an_index_names_files_beside_it(tiny_path: Path, tmp_path: Path, tiny: EsmModel) -> None:
    folder = to_hugging_face(tiny_path, tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    assert load_model(str(folder), "cpu").fingerprint == tiny.fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_weight_that_is_no_number_is_named(value: float, tiny_path: Path, tmp_path: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(tiny_path, weights_only=True)
    name = "encoder.sentence_encoder.layers.1.self_attn.k_proj.weight"
    found["model"][name][3, 5] = value
    torch.save(found, tmp_path / "one.pt")
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj\.weight holds what is no number"):
        load_model(str(tmp_path / "one.pt"), "cpu")


def test_unknown_names_and_devices() -> None:
    with pytest.raises(ModelError, match="nor one of esm2_t6_8M"):
        load_model("esm3", "cpu")
    with pytest.raises(DeviceError, match="cannot be used"):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="cuda"):
            pick_device("cuda")


@pytest.mark.parametrize("name", ["embedded", "random:t6_8M"])
def test_models_are_found_by_the_name_that_bundles_give_them(name: str) -> None:
    model = load_model(name, "cpu")
    assert load_model(model.name, "cpu").fingerprint == model.fingerprint


def test_random_weights_are_flagged() -> None:
    model = load_model("random:t6_8M", "cpu")
    assert model.is_random and "never for accuracy" in model.note
    hidden = fair_esm_hidden(model, to_tokens([Protein("a", "", "MKTAYIAKQR")], model))
    assert hidden.isfinite().all() and hidden.std() > 0.1


def test_heads_of_keys_and_values_may_be_others(tmp_path: Path) -> None:
    usual, grouped = Shape(2, 64, 4), Shape(2, 64, 8, own_head_dim=16, own_key_value_heads=2)
    assert (usual.head_dim, usual.key_value_heads) == (16, 4) and "own_head_dim" not in usual.as_dict()
    assert (grouped.head_dim, grouped.key_value_heads) == (16, 2) and Shape(**grouped.as_dict()) == grouped
    check_shape(usual, tmp_path)
    check_shape(grouped, tmp_path)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (Shape(2, 64, 8, own_key_value_heads=3), "8 query heads do not share 3 key/value heads"),
        (Shape(2, 64, 8, own_key_value_heads=16), "8 query heads do not share 16 key/value heads"),
        (Shape(2, 64, 8, own_key_value_heads=0), "a size below 1"),
        (Shape(2, 64, 8, own_key_value_heads=True), "whole numbers"),
        (Shape(2, 64, 8, own_head_dim=15), "heads of even size"),
        (Shape(2, 64, 8, own_head_dim=-8), "a size below 1"),
        (Shape(2, 64, 8, own_head_dim=512), "serves 8 to 256"),
        (Shape(2, 64, 8, context=0), "a size below 1"),
        (Shape(2, 64, 8, own_parameters=2**41), "over a million million weights"),
        (Shape(2, 64, None), "whole numbers"),  # type: ignore[arg-type]
        (Shape(None, 64, 8), "whole numbers"),  # type: ignore[arg-type]
    ],
)
def test_sizes_that_no_model_has_are_refused(shape: Shape, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        check_shape(shape, tmp_path)
