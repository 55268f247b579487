"""Autoregressive models on a GPU: steps, graphs and samples against the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.codec.calibration import calibrate
from turboesm_cli.codec.recipes import parse_recipe
from turboesm_cli.engine.batch import Batch
from turboesm_cli.engine.jobs import new_cache, run, samples_of
from turboesm_cli.engine.prompts import Prompt
from turboesm_cli.engine.tasks import Generated
from turboesm_cli.models import forward, random_shapes
from turboesm_cli.models.decoder import Decoder
from turboesm_cli.models.loading import load_model
from turboesm_cli.models.sampling import Sampling
from turboesm_cli.models.shapes import Shape
from turboesm_cli.outputs.work import NOTHING_KEPT
from turboesm_cli.sequences.fasta import Protein, read_fasta

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPT2 = {"family": "gpt2", "activation": "gelu_new"}
LLAMA = {"family": "llama", "activation": "silu"}
PROGEN = {"family": "progen", "activation": "gelu_new"}
MODELS = {
    "gpt2": (Shape(3, 256, 4, context=256), 40, 512, GPT2),
    "gpt2-wide": (Shape(2, 128, 2, context=256), 300, 256, GPT2),
    "llama": (Shape(3, 256, 8, 64, 2, context=256), 40, 512, LLAMA),
    "progen": (Shape(3, 256, 8, context=256), 40, 512, PROGEN),
}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def proteins() -> list[Protein]:
    return [p for p in read_fasta(ROOT / "data/evaluation/globular.fasta") if p.residues < 200][:24]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    monkeypatch.setitem(random_shapes.SHAPES, "tiny", MODELS[request.param])
    found = load_model("random:tiny", "cpu")
    assert isinstance(found, Decoder)
    return found


@pytest.mark.parametrize("kind", ["packed", "bf16", "fp32"])
@pytest.mark.parametrize("recipe", ["auto", "flat"])
def test_steps_are_those_of_the_cpu(model: Decoder, proteins: list[Protein], kind: str, recipe: str) -> None:
    spec = calibrate(model, proteins, parse_recipe(recipe)).spec
    tokens = model.alphabet.batch(proteins[:3])[:, :60]
    found = []
    for name in ("cpu", "cuda"):
        own = model.to(torch.device(name))
        cache = new_cache(own, spec, kind, 3, 80)
        with torch.no_grad():
            forward.prefill(own, tokens[:, :40].to(own.device), cache)
            found.append(forward.replay(own, tokens[:, 40:].to(own.device), cache).cpu())
    error = (found[0] - found[1]).norm() / found[0].norm()
    assert error < (2e-5 if kind == "fp32" else 1e-2), error


def test_samples_are_the_same_at_every_run_and_in_every_batch(model: Decoder, proteins: list[Protein]) -> None:
    spec = calibrate(model, proteins, parse_recipe("auto")).spec
    gpu = model.to(torch.device("cuda"))
    counts = (1, 5, 9, 13, 20)  # encoded together, some filled up with what is no token
    prompts = [Prompt(protein, n, gpu.alphabet) for protein, n in zip(proteins[:5], counts, strict=True)]

    def sampled(count: int) -> list[list[int]]:
        batch = Batch(
            gpu,
            lambda slots, capacity: new_cache(gpu, spec, "packed", slots, capacity),
            lambda slots: Generated.of(gpu, slots, 40, Sampling(top_k=15), 7),
            16, 64, spec.recipe.sinks,
        )  # fmt: skip
        todo = samples_of(lambda: prompts, 40, count, causal=True)
        return [held["ids"].tolist() for _, _, held in run(batch, todo, lambda _, held: held, NOTHING_KEPT)]

    first = sampled(6)
    assert sampled(6) == first
    assert [ids for number, ids in enumerate(first) if number % 6 == 0] == sampled(1)
    assert len({tuple(ids) for ids in first}) > 20


def test_throughput_of_a_decoder(model: Decoder, proteins: list[Protein]) -> None:
    from turboesm_cli.evaluation.throughput import Kind, Load, measure

    spec = calibrate(model, proteins, parse_recipe("auto")).spec
    gpu = model.to(torch.device("cuda"), torch.bfloat16)
    for form in ("bf16", "packed"):
        found = measure(gpu, Kind.of(form, spec), Load(4, 64), repeats=3, prefills=1)
        assert found.tokens_per_second > 0 and found.held > 0
    assert FORMATS["bf16"].bits == 16
