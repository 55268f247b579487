"""`bench throughput --peers`: transformers' models of our weights, their caches, and the command."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from forked import run_forked

from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.errors import ModelError
from turboesm_cli.evaluation import crossover, throughput, timing, transformers_peers
from turboesm_cli.evaluation.throughput import Load, Throughput
from turboesm_cli.evaluation.transformers_peers import DYNAMIC, PEERS, STATIC, Decoding, PeerKind, rebuilt
from turboesm_cli.models import decoder_weights, export, forward, random_decoders, random_shapes
from turboesm_cli.models.alphabet import AMINO_ACIDS
from turboesm_cli.models.decoder import Decoder
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.loading import load_model
from turboesm_cli.models.sampling import Sampling
from turboesm_cli.models.shapes import Shape

TOKENS = ("<bos>", "<eos>", *AMINO_ACIDS, "X", "B", "Z", "U")
LONGEST = 1100
_GPT2 = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_inner": 40, "n_positions": LONGEST}
_LLAMA = {
    "hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 8, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "max_position_embeddings": LONGEST,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "n_embd": 64, "rotary_dim": 8},
    "llama": {**_LLAMA, "head_dim": 16, "rope_theta": 5000.0},
    "mistral": {**_LLAMA, "sliding_window": None},
}
every_family = pytest.mark.parametrize("family", CASES)


def saved(folder: Path, family: str) -> Any:
    """transformers' random model in a folder, weights large enough that attention is far from uniform."""
    library = pytest.importorskip("transformers")
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    config = library.AutoConfig.for_model(family, vocab_size=len(TOKENS), **ends, **CASES[family])
    net = library.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        is_norm = weight.ndim == 1 and name.endswith("weight")
        weight.copy_(1 + 0.2 * noise if is_norm else 0.3 * noise)
    net.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return net


def opened(folder: Path) -> Decoder:
    model = load_model(str(folder), "cpu")
    assert isinstance(model, Decoder)
    return model


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Without transformers."""
    small = (Shape(2, 48, 4, context=64), 40, 96, {"family": "gpt2", "activation": "gelu_new"})
    monkeypatch.setitem(random_shapes.SHAPES, "small", small)
    return decoder_weights.build(random_decoders.random_decoder("small"))


@every_family
def test_the_same_model_is_rebuilt(tmp_path: Path, family: str) -> None:
    net = saved(tmp_path, family)
    model = opened(tmp_path)
    peer = rebuilt(model)
    theirs = dict(net.named_parameters())
    for name, weight in peer.net.named_parameters():
        torch.testing.assert_close(weight, theirs.pop(name), atol=1e-6, rtol=1e-6)
    assert not theirs
    tokens = model.alphabet.random(2, 30)
    torch.testing.assert_close(peer.net(tokens).logits, net(tokens).logits, atol=1e-4, rtol=0)
    assert type(peer.net) is type(net) and peer.beside == 0


@every_family
@pytest.mark.parametrize("form", [DYNAMIC, STATIC])
@pytest.mark.parametrize("part", [None, 7])
def test_the_last_token_is_decoded_again_and_again(
    tmp_path: Path, family: str, form: str, part: int | None
) -> None:
    net = saved(tmp_path, family)
    model = opened(tmp_path)
    tokens = model.alphabet.random(3, 20)
    expected = net(tokens).logits[:, -1]
    with torch.no_grad():
        decoding = Decoding(rebuilt(model).net, form, tokens, part)
        for _ in range(2):
            decoding.prefill()
            for _ in range(3):
                likeliest, logits = decoding.step()
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
                assert likeliest.tolist() == expected.argmax(-1).tolist()
                assert decoding.nbytes == 3 * PeerKind.of_model(form, model).nbytes(20)
                decoding.rewind()


@pytest.mark.slow
@every_family
def test_a_step_is_one_graph(tmp_path: Path, family: str) -> None:
    """What torch.compile takes in; `aot_eager` leaves out compiling."""
    net = saved(tmp_path, family)
    model = opened(tmp_path)
    tokens = model.alphabet.random(2, 20)
    with torch.no_grad():
        decoding = Decoding(rebuilt(model).net, STATIC, tokens)
        decoding.prefill()
        step = torch.compile(decoding.step, fullgraph=True, dynamic=False, backend="aot_eager")
        for _ in range(3):
            torch.testing.assert_close(step()[1], net(tokens).logits[:, -1], atol=1e-4, rtol=0)
            decoding.rewind()
    torch.compiler.reset()


def test_a_prefill_without_memory_is_parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "llama")
    model = opened(tmp_path)
    once, widths, said = Decoding.prefill, [], list[str]()

    def prefill(decoding: Decoding) -> None:
        widths.append(decoding.part)
        if decoding.part > 5:
            raise torch.OutOfMemoryError("injected")
        once(decoding)

    monkeypatch.setattr(Decoding, "prefill", prefill)
    monkeypatch.setattr(transformers_peers, "PREFILL_TOKENS", 10)
    peer, kind = rebuilt(model), PeerKind.of_model(STATIC, model)
    found = transformers_peers.measure_peer(model, peer, kind, Load(2, 24), said.append, 2, 1)
    assert widths[:3] == [23, 5, 5] and "5 tokens" in said[0]
    assert found.held == 2 * kind.nbytes(24)
    monkeypatch.setattr(transformers_peers, "PREFILL_TOKENS", 100)
    skipped = list[str]()
    made = transformers_peers.sweep_peers(model, [Load(2, 24)], 2**30, skipped.append, said.append)
    assert list(made) == [] and [text.rpartition(": ")[2] for text in skipped[:2]] == ["out of memory"] * 2


def test_loads_that_are_not_measured_are_named(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    model, skipped = opened(tmp_path), list[str]()
    loads = [Load(1, 1), Load(64, 16)]
    assert list(transformers_peers.sweep_peers(model, loads, 10, skipped.append, skipped.append)) == []
    assert [text.split(",")[0] for text in skipped] == list(PEERS) * 2
    assert "one token" in skipped[0] and "does not fit" in skipped[3] and "GPU" in skipped[5]


def test_models_without_a_peer(gpt2: Decoder, tiny: EsmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="of the family esm2"):
        transformers_peers.check_peers(tiny)
    with pytest.raises(ModelError, match="of the family progen"):
        transformers_peers.check_peers(replace(gpt2, family="progen"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'turboesm\[hf\]'"):
        transformers_peers.check_peers(gpt2)
    old = ModuleType("transformers")
    old.__version__ = "4.57.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(ModelError, match=r"from 5\.17 on, here is 4\.57\.1"):
        transformers_peers.check_peers(gpt2)


def test_another_model_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "gptj")
    model = opened(tmp_path)
    given = export.exported(model)
    name = "transformer.h.1.attn.k_proj.weight"
    wrong = replace(given, weights=given.weights | {name: given.weights[name].flip(0)})
    monkeypatch.setattr(transformers_peers, "exported", lambda model: wrong)
    with pytest.raises(ModelError, match="away from ours"):
        rebuilt(model)


def test_rows(gpt2: Decoder, specs: dict[str, CodecSpec]) -> None:
    kind = PeerKind.of_model(DYNAMIC, gpt2.to(gpt2.device, torch.bfloat16))
    took = timing.Timing(100, 90, 110, 5)
    ours = throughput.Kind.of("fp16", specs["auto"])
    found = [Throughput(each, Load(8, 64), took, took, 10, 20, 30) for each in (ours, kind)]
    rows = [row for row in crossover.rows(gpt2, found, []) if row.recipe == "hf-dynamic"]
    assert {(row.bits_k, row.bits_v, row.protocol, row.family) for row in rows} == {
        (16, 16, "throughput", "batch 8")
    }
    figures = {row.metric: row.value for row in rows}
    assert figures["tokens_per_second_over_fp16"] == 1 and figures["peak_bytes"] == 20
    assert kind.nbytes(64) == 64 * 2 * 2 * 48 * 2


def test_our_step_takes_the_likeliest_of_all_tokens(
    gpt2: Decoder, specs: dict[str, CodecSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, real = [], throughput.sample_tokens

    def sample_tokens(logits: torch.Tensor, chances: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        assert logits.shape == (2, 40) and logits.dtype == torch.float32 and sampling.temperature == 0
        chosen.append(real(logits, chances, sampling))
        return chosen[-1]

    monkeypatch.setattr(throughput, "sample_tokens", sample_tokens)
    throughput.measure(gpt2, throughput.Kind.of("fp32", specs["auto"]), Load(2, 24), 1, 1)
    with torch.no_grad():
        logits = gpt2.logits(forward.encode(gpt2, gpt2.alphabet.random(2, 24)))[:, -1]
    assert chosen[-1].tolist() == logits.argmax(-1).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_family
def test_on_a_gpu(tmp_path: Path, family: str) -> None:
    """The graph of what torch.compile made is checked against the step as Python runs it (`measure_peer`)."""
    saved(tmp_path, family)
    model = load_model(str(tmp_path), "cuda", torch.bfloat16)
    skipped = list[str]()
    made = list(transformers_peers.sweep_peers(model, [Load(3, 64)], 2**30, skipped.append, skipped.append))
    assert skipped == [] and [item.kind.name for item in made] == list(PEERS)
    for item in made:
        assert item.step.median > 0 < item.first_token.median
        assert 0 < item.held <= item.prefill_peak <= item.peak < 2**30


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_command(tmp_path: Path, family: str) -> None:
    saved(tmp_path / "model", family)
    command = ["bench", "throughput", "--model", "model", "--peers"]
    command += ["--context", "24", "--device", "cpu", "--kinds", "fp16,packed", "--batch", "1,2", "-o", "t.csv"]
    env = os.environ | {"COLUMNS": "220", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run_forked(*command, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    speeds = [row for row in rows if row["metric"] == "tokens_per_second"]
    assert {(row["family"], row["recipe"], row["bits_k"]) for row in speeds if "hf" in row["recipe"]} == {
        (f"batch {batch}", form, "32.0") for batch in (1, 2) for form in (DYNAMIC, STATIC)
    }
    assert {row["recipe"] for row in speeds} == {"fp16", "auto", DYNAMIC, STATIC}
    assert done.stderr.count("left out: hf-compiled") == 2 and "hf-static" in done.stdout
    longer = run_forked(*command, "--force", "--context", "1101", cwd=tmp_path, env=env)
    assert longer.returncode == 3 and "1,100 tokens" in longer.stderr
