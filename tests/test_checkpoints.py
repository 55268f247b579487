"""Another model than the one named is refused by name, through the real command; what is harmless is read."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from folders import to_hugging_face
from typer.testing import CliRunner, Result

from turboesm_cli.app import app
from turboesm_cli.codec.bundle import read_bundle
from turboesm_cli.errors import ModelError
from turboesm_cli.models import forward
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.fair_esm import ESM2
from turboesm_cli.models.loading import load_model
from turboesm_cli.models.shapes import OFFICIAL, Shape
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens

pytestmark = pytest.mark.slow

VOCABULARY = ESM2_ALPHABET.vocabulary
ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = str(ROOT / "data" / "calibration" / "calibration.fasta")
PEPTIDES = str(ROOT / "data" / "evaluation" / "peptide.fasta")
QUERY = "esm.encoder.layer.0.attention.self.query"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def calibrate(model: object, *more: str) -> Result:
    return run("calibrate", str(model), CALIBRATION, "--max-proteins", "4", "--recipe", "flat", *more)


def assert_refused(done: Result, *words: str, code: int = 4) -> None:
    assert done.exit_code == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr
    for word in words:
        assert word in last, last
    assert done.stdout == "" and not list(Path.cwd().glob("*.tqz*"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and no caches of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    for name in ("TURBOESM_MODEL", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """The tiny model as a Hugging Face folder with the files that the official ones have."""
    made = to_hugging_face(tiny_path, tmp_path / "hf")
    (made / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return made


@pytest.fixture(scope="module")
def bundle(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.tqz"
    done = calibrate(tiny_path, "-o", str(path))
    assert done.exit_code == 0, done.stderr
    return path


def configure(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    edit(weights)
    safetensors.torch.save_file(weights, path)


def add(folder: Path, *names: str) -> None:
    change(folder, lambda weights: weights.update({name: torch.ones(2, 2) for name in names}))


FIELDS = [
    ("is_decoder", True),
    ("add_cross_attention", True),
    ("is_encoder_decoder", True),
    ("hidden_act", "relu"),
    ("is_folding_model", True),
    ("esmfold_config", {"trunk": {}}),
    ("quantization_config", {"load_in_8bit": True}),
    ("pruned_heads", {"0": [1]}),
    ("vocab_size", 64),
    ("vocab_list", [*VOCABULARY[:4], *sorted(VOCABULARY[4:])]),
    ("mask_token_id", 31),
    ("pad_token_id", 0),
    ("intermediate_size", 64),
    ("rope_theta", 500_000.0),
    ("rope_scaling", {"type": "linear", "factor": 4.0}),
    ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
    ("partial_rotary_factor", 0.5),
    ("auto_map", {"AutoModel": "modeling.Other"}),
    ("architectures", ["EsmForCausalLM"]),
    ("sliding_window", 128),
    ("token_dropout", "false"),
    ("tie_word_embeddings", "no"),
    ("layer_norm_eps", 0),
    ("layer_norm_eps", float("nan")),
]


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=[f"{name}={value!r:.12}" for name, value in FIELDS])
def test_a_field_that_makes_another_model_is_refused_by_name(folder: Path, name: str, value: object) -> None:
    configure(folder, **{name: value})
    assert_refused(calibrate(folder), name, "config.json")


WEIGHTS = {
    "unmerged LoRA": (f"{QUERY}.lora_A.default.weight", "adapter", "merge"),
    "wrapped by peft": (f"base_model.model.{QUERY}.base_layer.weight", "adapter", "merge"),
    "prefix tuning": ("prompt_encoder.default.embedding.weight", "prompt_encoder"),
    "quantized": (f"{QUERY}.SCB", "quantized"),
    "norm before": ("esm.embeddings.layer_norm.weight", "ESM-1b"),
    "cross-attention": ("esm.encoder.layer.0.crossattention.self.query.weight", "decoder"),
    "bias of keys": ("esm.encoder.layer.0.self_attn.bias_k", "bias_k"),
    "one layer more": ("esm.encoder.layer.2.output.dense.weight", "layers.2.fc2.weight"),
    "unknown head": ("my_head.weight", "my_head"),
    "LoRA in the head": ("lm_head.dense.lora_A.weight", "adapter"),
}


@pytest.mark.parametrize("names", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_a_weight_that_esm2_does_not_have_is_refused_by_name(folder: Path, names: tuple[str, ...]) -> None:
    add(folder, names[0])
    assert_refused(calibrate(folder), *names[1:])


FILES = {
    "adapter_config.json": ("{}", "merge"),
    "adapter_model.safetensors": ("", "merge"),
    "pytorch_lora_weights.bin": ("", "merge"),
    "quantize_config.json": ("{}", "quantized"),
    "ema.safetensors": ("", "weights that turboesm does not know"),
    "added_tokens.json": ('{"<sep>": 33}', "token 33"),
    "special_tokens_map.json": ('{"mask_token": {"content": "<null_1>"}}', "token 32"),
    "tokenizer_config.json": ('{"added_tokens_decoder": {"5": {"content": "G"}}}', "token 5"),
    "tokenizer.json": ('{"model": {"vocab": {"L": 5}}}', "token 5"),
    "vocab.txt": (
        "\n".join(
            [
                *VOCABULARY[:4],
                *sorted(VOCABULARY[4:24]),
                *VOCABULARY[24:],
            ]
        ),
        "token 4",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_makes_another_model_is_refused_by_name(folder: Path, name: str) -> None:
    text, reason = FILES[name]
    (folder / name).write_text(text)
    assert_refused(calibrate(folder), name, reason)


@pytest.mark.parametrize("tokens", [VOCABULARY[:-1], (*VOCABULARY, "<sep>")], ids=["short", "long"])
def test_a_vocabulary_of_another_size_is_refused(folder: Path, tokens: tuple[str, ...]) -> None:
    (folder / "vocab.txt").write_text("\n".join(tokens))
    assert_refused(calibrate(folder), "vocab.txt", "vocabulary")


def test_an_adapter_alone_is_told_from_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    assert_refused(calibrate(folder), "adapter, not a model", "merge")


def set_dtype(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.update({f"{QUERY}.weight": weights[f"{QUERY}.weight"].to(dtype)})


def turn_one_layer(weights: dict[str, torch.Tensor]) -> None:
    weights["esm.encoder.layer.1.attention.self.rotary_embeddings.inv_freq"] *= 2


def untie(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.decoder.weight"] = weights["esm.embeddings.word_embeddings.weight"] + 1


EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "fp8": (set_dtype(torch.float8_e4m3fn), "stored as float8_e4m3fn: a quantized checkpoint"),
    "int8": (set_dtype(torch.int8), "stored as int8: a quantized checkpoint"),
    "RoPE unlike in one layer": (turn_one_layer, "layers.1.self_attn.rot_emb.inv_freq differs"),
    "half a head": (lambda weights: weights.pop("lm_head.layer_norm.weight"), "lm_head.layer_norm.weight is miss"),
    "output unlike embedding": (untie, "tie_word_embeddings"),
    "two of one name": (
        lambda weights: weights.update({"embed_tokens.weight": torch.zeros(33, 32)}),
        "two different weights for embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_weights_that_are_not_esm2s_are_refused(
    folder: Path, edit: tuple[Callable[[dict[str, torch.Tensor]], object], str]
) -> None:
    change(folder, edit[0])
    assert_refused(calibrate(folder), edit[1])


HARMLESS_FIELDS: dict[str, Any] = {
    "_name_or_path": "facebook/esm2_t6_8M_UR50D", "architectures": ["EsmForSequenceClassification"],
    "attention_probs_dropout_prob": 0.1, "classifier_dropout": None, "esmfold_config": None, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "id2label": {"0": "no", "1": "yes"}, "initializer_range": 0.02,
    "intermediate_size": 128, "is_folding_model": False, "label2id": {"no": 0, "yes": 1}, "mask_token_id": 32,
    "max_position_embeddings": 1026, "pad_token_id": 1, "problem_type": "single_label_classification",
    "torch_dtype": "float32", "transformers_version": "4.29.2", "use_cache": True, "vocab_list": None,
    "vocab_size": 33, "is_decoder": False, "quantization_config": None,
}  # fmt: skip
HARMLESS_WEIGHTS = (
    "esm.embeddings.position_ids",
    "esm.embeddings.position_embeddings.weight",
    "esm.pooler.dense.weight",
    "classifier.dense.weight",
    "classifier.out_proj.bias",
)
HARMLESS_FILES = {
    "special_tokens_map.json": '{"cls_token": "<cls>", "mask_token": {"content": "<mask>"}}',
    "tokenizer_config.json": '{"tokenizer_class": "EsmTokenizer", "added_tokens_decoder": {"0": '
    '{"content": "<cls>"}, "32": {"content": "<mask>"}}}',
    "generation_config.json": "{}",
    "pytorch_model.bin": "an older copy, which transformers does not read either",
    "training_args.bin": "",
    "tf_model.h5": "",
    "README.md": "",
}


def test_what_does_not_change_the_model_is_read(folder: Path, bundle: Path) -> None:
    configure(folder, **HARMLESS_FIELDS)
    add(folder, *HARMLESS_WEIGHTS)
    for name, text in HARMLESS_FILES.items():
        (folder / name).write_text(text)
    done = run("decode", str(bundle), PEPTIDES, "--max-proteins", "1", "--model", str(folder))
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_weights_of_a_compiled_or_parallel_module_are_the_models(folder: Path, bundle: Path, prefix: str) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({prefix + name: weight for name, weight in weights.items()}, path)
    done = run("decode", str(bundle), PEPTIDES, "--max-proteins", "1", "--model", str(folder))
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("field", [{"layer_norm_eps": 1e-2}, {"token_dropout": False}], ids=["eps", "dropout"])
def test_settings_that_are_honoured_are_part_of_the_fingerprint(
    folder: Path, bundle: Path, field: dict[str, object]
) -> None:
    configure(folder, **field)
    assert_refused(run("decode", str(bundle), PEPTIDES, "--model", str(folder)), "calibrated for tiny", code=5)
    assert calibrate(folder, "-o", "own.tqz").exit_code == 0
    done = run("decode", "own.tqz", PEPTIDES, "--max-proteins", "1", "--model", str(folder))
    assert done.exit_code == 0, done.stderr


def test_another_epsilon_is_computed_with(folder: Path, tiny: EsmModel) -> None:
    configure(folder, layer_norm_eps=1e-2)
    model = load_model(str(folder), "cpu")
    tokens = to_tokens([Protein("a", "", "MKTAYIAKQR")], tiny)
    expected = ESM2(2, 32, 2)
    expected.load_state_dict(tiny.net.state_dict())
    for module in expected.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-2
    with torch.no_grad():
        hidden = forward.encode(model, tokens)
        reference = expected.eval()(tokens, repr_layers=[2])
        assert torch.allclose(hidden, reference["representations"][2], atol=1e-5)
        assert torch.allclose(model.logits(hidden), reference["logits"], atol=1e-4)
        assert not torch.allclose(hidden, forward.encode(tiny, tokens), atol=1e-3)


def test_an_output_matrix_that_is_meant_to_differ_is_read(folder: Path, bundle: Path) -> None:
    change(folder, untie)
    configure(folder, tie_word_embeddings=False)
    net = load_model(str(folder), "cpu").net
    assert torch.equal(net.lm_head.weight, net.embed_tokens.weight + 1)
    done = run("decode", str(bundle), PEPTIDES, "--max-proteins", "1", "--model", str(folder))
    assert done.exit_code == 0, done.stderr


def test_an_output_matrix_that_is_missing_is_told(folder: Path) -> None:
    configure(folder, tie_word_embeddings=False)
    assert_refused(calibrate(folder), "lm_head.decoder.weight is missing")


def test_shards_are_read_and_must_agree(folder: Path, bundle: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {key: names[number % 2] for number, key in enumerate(weights)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shards = [{key: weights[key] for key in weights if index["weight_map"][key] == name} for name in names]
    for name, shard in zip(names, shards, strict=True):
        safetensors.torch.save_file(shard, folder / name)
    done = run("decode", str(bundle), PEPTIDES, "--max-proteins", "1", "--model", str(folder))
    assert done.exit_code == 0, done.stderr
    other = {key: value + 1 for key, value in list(shards[0].items())[:1]}
    safetensors.torch.save_file(shards[1] | other, folder / names[1])
    assert_refused(calibrate(folder), "two different weights")


def fair_esm_file(tiny_path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        found: dict[str, Any] = torch.load(tiny_path, weights_only=True)
    return found


SETTINGS = [("lora_rank", 8), ("use_adapter", True), ("is_decoder", True), ("layer_norm_eps", 1e-2),
            ("emb_layer_norm_before", True), ("activation_fn", "relu"), ("token_dropout", "no")]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_a_setting_of_a_fair_esm_file_that_makes_another_model_is_refused(
    tiny_path: Path, name: str, value: object
) -> None:
    found = fair_esm_file(tiny_path)
    setattr(found["cfg"]["model"], name, value)
    torch.save(found, "other.pt")
    assert_refused(calibrate("other.pt"), name)


@pytest.mark.parametrize("name", ["lora", "ema_model"])
def test_weights_beside_those_of_the_model_are_refused(tiny_path: Path, name: str) -> None:
    torch.save(fair_esm_file(tiny_path) | {name: {"a": torch.ones(2, 2)}}, "other.pt")
    assert_refused(calibrate("other.pt"), name)


def test_an_unmerged_adapter_in_a_fair_esm_file_is_refused(tiny_path: Path) -> None:
    found = fair_esm_file(tiny_path)
    found["model"]["encoder.sentence_encoder.layers.0.self_attn.q_proj.lora_A"] = torch.ones(2, 2)
    torch.save(found, "other.pt")
    assert_refused(calibrate("other.pt"), "lora_A", "merge")


def old_model() -> dict[str, Any]:
    weights = {"encoder.sentence_encoder.embed_positions.weight": torch.zeros(4, 4)}
    return {"args": argparse.Namespace(arch="roberta_large"), "model": weights}


OTHER_FILES: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "state_dict.pt": (
        lambda: {"encoder.layer.0.attention.self.query.weight": torch.ones(2)},
        ("bare state dict", "save_pretrained"),
    ),
    "fair_state_dict.pt": (lambda: {"layers.0.self_attn.q_proj.weight": torch.ones(2)}, ("bare state dict",)),
    "esm1b.pt": (old_model, ("ESM-1b", "ESM-2 only")),
    "esmc.pth": (lambda: {"transformer.blocks.0.attn.q_ln.weight": torch.ones(2)}, ("ESM C", "ESM-2 only")),
    "lightning.ckpt": (lambda: {"state_dict": {}, "pytorch-lightning_version": "2.1"}, ("Lightning", "save")),
    "contact.pt": (lambda: {"model": {"contact_head.regression.weight": torch.ones(2)}}, ("contact head",)),
    "module.pt": (lambda: torch.nn.Linear(2, 2), ("torch.nn.modules.linear.Linear", "save_pretrained")),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_kind_is_told(name: str) -> None:
    made, words = OTHER_FILES[name]
    torch.save(made(), name)
    assert_refused(calibrate(name), name, *words)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
TEXTS = {
    "page.pt": ("<html>blocked</html>\n", "a web page"),
    "lfs.pt": (LFS, "git lfs pull"),
    "answer.pt": ('{"error": "not found"}', "JSON"),
    "model.safetensors": ("", "name its folder"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_checkpoint_is_told(name: str) -> None:
    text, reason = TEXTS[name]
    Path(name).write_text(text)
    assert_refused(calibrate(name), name, reason)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_in_a_folder_is_told(folder: Path, name: str) -> None:
    (folder / name).write_text(LFS)
    assert_refused(calibrate(folder), name, "git lfs pull")


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_hides_an_official_name_is_refused(what: str) -> None:
    Path("t6_8M").mkdir() if what == "folder" else Path("t6_8M").touch()
    assert_refused(calibrate("t6_8M"), "official model", what, "./t6_8M")


def test_a_path_that_looks_like_an_official_name_is_read(tiny_path: Path) -> None:
    to_hugging_face(tiny_path, Path("t6_8M"))
    assert calibrate("./t6_8M").stdout.strip() == "t6_8M-flat.tqz"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html></html>"], ids=["empty", "cut", "page"])
def test_a_broken_file_in_torchs_cache_is_to_be_deleted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "torch" / "hub" / "checkpoints" / "esm2_t6_8M_UR50D.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert_refused(calibrate("t6_8M"), f"delete {path}, then run again")


def test_a_file_for_torch_home_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "afile").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "afile"))
    done = calibrate("t6_8M")
    assert_refused(done, "set TORCH_HOME")
    assert "put it at" not in done.stderr


@pytest.mark.parametrize("proxy", ["http://proxy:port", "http://[::1"])
def test_a_malformed_proxy_is_told(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    assert_refused(calibrate("t6_8M"), "check https_proxy")


def test_names_that_are_no_paths() -> None:
    with pytest.raises(
        ModelError, match="there is no such home folder"
    ):  # as $TURBOESM_MODEL, which no shell reads
        load_model("~nosuchuser/model.pt", "cpu")
    assert_refused(calibrate(""), "name is empty")
    assert_refused(calibrate("x" * 5000), "cannot be read")


def test_a_model_of_the_hub_that_is_not_in_the_cache_says_how_to_get_it() -> None:
    name = "facebook/esm2_t6_8M_UR50D"
    assert_refused(calibrate(name), f"hf download {name}", "or name esm2_t6_8M_UR50D")


def test_a_download_from_the_hub_is_told_and_compared_with_its_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, said = tmp_path / "model.safetensors", "0" * 64
    weights.write_bytes(b"x")
    file = SimpleNamespace(rfilename=weights.name, lfs=SimpleNamespace(sha256=said))
    asked = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=[file], sha="1"))
    parts = [SimpleNamespace(file_size=2_600_000_000, will_download=True)]
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: asked)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, dry_run=False, **__: parts if dry_run else str(tmp_path)
    )
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelError, match=r"model\.safetensors differs from the hub's sha256"):
        load_model("owner/model", "cpu")
    assert "downloading owner/model (2.6 GB) to " in capsys.readouterr().err and not weights.exists()


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path) -> Path:
    """The folder in the hub's cache, at a commit."""
    repository = tmp_path / "hf_home" / "hub" / "models--facebook--esm2_tiny"
    commit = repository / "snapshots" / ("0" * 40)
    commit.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    folder.rename(commit)
    return commit


@pytest.mark.parametrize("way", ["name", "snapshot", "repository", "link"])
def test_a_model_in_the_hubs_cache_has_the_repositorys_name(snapshot: Path, way: str) -> None:
    Path("link").symlink_to(snapshot)
    ways = {
        "name": "facebook/esm2_tiny",
        "snapshot": str(snapshot),
        "repository": str(snapshot.parents[1]),
        "link": "link",
    }
    done = calibrate(ways[way])
    assert done.stdout.strip() == "esm2_tiny-flat.tqz", done.stderr
    assert read_bundle(Path("esm2_tiny-flat.tqz")).model_name == "esm2_tiny"


def test_an_official_name_of_the_hub_is_of_the_official_size(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = snapshot.parents[1]
    repository.rename(repository.with_name("models--facebook--esm2_t6_8M_UR50D"))
    assert_refused(calibrate("facebook/esm2_t6_8M_UR50D"), "is not esm2_t6_8M_UR50D: it holds 2 layers of 32")
    monkeypatch.setitem(OFFICIAL, "esm2_t6_8M_UR50D", Shape(2, 32, 2))
    assert calibrate("facebook/esm2_t6_8M_UR50D").stdout.strip() == "esm2_t6_8M_UR50D-flat.tqz"


def test_two_snapshots_without_main_are_refused(snapshot: Path) -> None:
    (snapshot.parents[1] / "refs" / "main").unlink()
    snapshot.with_name("1" * 40).mkdir()
    assert_refused(calibrate("facebook/esm2_tiny"), "2 snapshots")


def test_a_name_that_no_bundle_may_hold_is_refused(folder: Path) -> None:
    folder.rename("a\nmodel")
    assert_refused(calibrate("a\nmodel"), "printable")


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_other_devices_are_refused(device: str, bundle: Path) -> None:
    assert_refused(run("decode", str(bundle), PEPTIDES, "--device", device), f"--device {device}", code=6)


@pytest.mark.parametrize("head_dim", [2, 4, 6])
def test_heads_that_are_too_narrow_are_refused_before_the_work(
    head_dim: int, save_tiny_model: Callable[..., Path]
) -> None:
    save_tiny_model(Path("narrow.pt"), width=4 * head_dim, heads=4)
    assert_refused(calibrate("narrow.pt"), f"head_dim of {head_dim}", "8 to 256")


def test_a_model_of_one_layer_works_with_every_command(save_tiny_model: Callable[..., Path]) -> None:
    save_tiny_model(Path("one.pt"), layers=1)
    model = ("--model", "one.pt", "--max-proteins", "2")
    for command in (
        ("calibrate", "one.pt", CALIBRATION, "--max-proteins", "8", "-o", "one.tqz"),
        ("decode", "one.tqz", PEPTIDES, *model),
        ("quantize", "one.tqz", PEPTIDES, "-o", "one.tqkv", *model),
        ("report", "one.tqz"),
        ("decode", "one.tqz", "one.tqkv", "--model", "one.pt"),
    ):
        done = run(*command)
        assert done.exit_code == 0, (command, done.stderr)


def test_another_package_named_esm_is_told(tmp_path: Path, bundle: Path) -> None:
    package = tmp_path / "other" / "esm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "3.2.1"\n')
    command = [sys.executable, "-m", "turboesm_cli.app", "decode", str(bundle), PEPTIDES]
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 4, done.stderr
    assert str(package) in done.stderr and "pip uninstall esm" in done.stderr and "Traceback" not in done.stderr
