"""Sampling from autoregressive models: distributions, seeds, ends, shared prompts, likelihoods, the commands."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from turboesm_kernels.token_layer import attend_tokens
from typer.testing import CliRunner

from turboesm_cli.app import app
from turboesm_cli.codec.bundle import Bundle, write_bundle
from turboesm_cli.codec.calibration import calibrate
from turboesm_cli.codec.recipes import parse_recipe
from turboesm_cli.commands.reading import Reading
from turboesm_cli.engine import batch as engine
from turboesm_cli.engine.batch import Batch
from turboesm_cli.engine.jobs import new_cache, run, samples_of
from turboesm_cli.engine.prompts import Prompt
from turboesm_cli.engine.tasks import Generated
from turboesm_cli.errors import BundleError, InputError
from turboesm_cli.models import forward, random_shapes
from turboesm_cli.models.alphabet import AMINO_ACIDS
from turboesm_cli.models.decoder import Decoder
from turboesm_cli.models.decoder_alphabets import Plain, decoder_alphabet
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.loading import load_model
from turboesm_cli.models.sampling import Sampling, gumbel, sample_tokens, seed_of
from turboesm_cli.models.shapes import Shape
from turboesm_cli.outputs.work import NOTHING_KEPT
from turboesm_cli.sequences.fasta import Protein, read_fasta
from turboesm_cli.sequences.tags import parse_tags, with_tags
from turboesm_cli.statistics.batching import told

ROOT = Path(__file__).resolve().parents[1]
GLOBULAR = ROOT / "data" / "evaluation" / "globular.fasta"
PEPTIDES = ROOT / "data" / "evaluation" / "peptide.fasta"
TINY = (Shape(2, 64, 4, context=256), 30, 128, {"family": "gpt2", "activation": "gelu_new"})


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_shapes.SHAPES, "tiny", TINY)


@pytest.fixture(scope="module")
def proteins() -> list[Protein]:
    return [protein for protein in read_fasta(GLOBULAR) if protein.residues < 150][:20]


@pytest.fixture(scope="module")
def model() -> Decoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_shapes.SHAPES, "tiny", TINY)
        found = load_model("random:tiny", "cpu")
    assert isinstance(found, Decoder)
    return found


@pytest.fixture(scope="module")
def bundle(model: Decoder, proteins: list[Protein]) -> Bundle:
    return calibrate(model, proteins, parse_recipe("auto"))


def drawn(logits: torch.Tensor, sampling: Sampling, there: torch.Tensor | None = None) -> torch.Tensor:
    """Shares [V] of 40,000 samples of logits [V]."""
    count = 40_000
    noise = gumbel(torch.arange(count) * 7 + 3, torch.arange(count) % 11, len(logits))
    rows = None if there is None else there.expand(count, -1)
    tokens = sample_tokens(logits.expand(count, -1), noise, sampling, rows)
    return torch.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.5), Sampling(1.0, 0.8), Sampling(1.3, 0.7, 4), Sampling(1.0, 1.0, 3, 1.4)]
)
def test_samples_are_distributed_as_transformers_warps_logits(sampling: Sampling) -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.tensor([2.0, 1.5, 1.0, 0.2, -0.3, -1.0, -torch.inf])
    there = torch.tensor([True, False, False, False, True, False, False])
    ids = torch.tensor([[0, 4]])
    warped = logits[None]
    steps = [transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    steps += [transformers.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [transformers.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    for step in steps:
        warped = step(ids, warped)
    assert torch.allclose(drawn(logits, sampling, there), warped.softmax(-1)[0], atol=0.012)


def test_temperature_0_takes_the_likeliest() -> None:
    assert drawn(torch.tensor([0.1, 0.3, 0.2]), Sampling(0)).tolist() == [0, 1, 0]


def test_noise_follows_from_seed_and_step_alone() -> None:
    seeds, steps = torch.tensor([5, 9, 5]), torch.tensor([2, 2, 3])
    noise = gumbel(seeds, steps, 33)
    assert torch.equal(noise[1:2], gumbel(seeds[1:2], steps[1:2], 33))
    assert not torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert noise.isfinite().all()


def test_streams_of_samples_are_never_shared() -> None:
    seeds = {seed_of(seed, number, sample) for seed in range(4) for number in range(4) for sample in range(1, 9)}
    assert len(seeds) == 4 * 4 * 8
    assert seed_of(3, 2, 0) == 5


def sampled(
    model: Decoder, bundle: Bundle, prompts: list[Prompt], samples: int, slots: int, kv: str = "packed"
) -> list[tuple[list[int], float]]:
    sampling = Sampling(1.0, 0.95)
    batch = Batch(
        model,
        lambda count, capacity: new_cache(model, bundle.spec, kv, count, capacity),
        lambda count: Generated.of(model, count, 60, sampling, 11),
        slots,
        128,
        bundle.spec.recipe.sinks if kv == "packed" else 0,
    )
    todo = samples_of(lambda: prompts, 60, samples, causal=True)
    return [
        (held["ids"].tolist(), float(held["log_p"]))
        for _, _, held in run(batch, todo, lambda _, x: x, NOTHING_KEPT)
    ]


@pytest.mark.parametrize("kv", ["packed", "fp32"])
def test_a_sample_is_the_same_whatever_the_batch(
    model: Decoder, bundle: Bundle, proteins: list[Protein], kv: str
) -> None:
    prompts = [
        Prompt(protein, count, model.alphabet) for protein, count in zip(proteins[:3], (1, 5, 30), strict=True)
    ]
    alone = sampled(model, bundle, prompts, 4, 1, kv)
    together = sampled(model, bundle, prompts, 4, 5, kv)
    same = sum(a[0] == b[0] for a, b in zip(alone, together, strict=True))
    assert same >= 11, "in a batch of another size float32 products may round otherwise"
    assert len({tuple(ids) for ids, _ in alone}) == 12


def test_an_end_frees_the_slot_and_is_the_last_token(
    model: Decoder, bundle: Bundle, proteins: list[Protein]
) -> None:
    prompts = [Prompt(protein, 4, model.alphabet) for protein in proteins[:4]]
    found = sampled(model, bundle, prompts, 6, 4)
    lengths = Counter(len(ids) for ids, _ in found)
    assert len(lengths) > 5
    for ids, _ in found:
        assert model.alphabet.end not in ids[:-1]
        assert set(ids) <= set(model.alphabet.sampled)
        assert ids[-1] == model.alphabet.end or len(ids) == 60


@pytest.mark.parametrize("kv", ["packed", "int8"])
@pytest.mark.parametrize("at_once", [0, 10**6], ids=["apart", "together"])
def test_a_shared_prompt_is_encoded_once(
    model: Decoder, bundle: Bundle, proteins: list[Protein], monkeypatch: pytest.MonkeyPatch, at_once: int, kv: str
) -> None:
    """On a CPU by itself; as on a GPU with others, into slots that others get."""
    encoded = []
    prefill = engine.Stepper.prefill

    def spy(self: engine.Stepper, start: int, prompts: list[torch.Tensor]) -> torch.Tensor:
        encoded.append(len(prompts))
        return prefill(self, start, prompts)

    prompts = [
        Prompt(protein, count, model.alphabet) for protein, count in zip(proteins[:4], (20, 7, 1, 30), strict=True)
    ]
    alone = sampled(model, bundle, prompts, 3, 1, kv)
    monkeypatch.setattr(engine.Stepper, "prefill", spy)
    monkeypatch.setattr(engine, "prefill_tokens", lambda device: at_once)
    found = sampled(model, bundle, prompts, 3, 8, kv)
    assert encoded == ([1, 1, 1] if at_once == 0 else [2, 1])  # one has nothing to encode; the last comes later
    assert sum(a[0] == b[0] for a, b in zip(alone, found, strict=True)) >= 11  # padding rounds otherwise


def test_log_likelihoods_are_the_models(model: Decoder, bundle: Bundle, proteins: list[Protein]) -> None:
    prompt = Prompt(proteins[0], 12, model.alphabet)
    ids, log_p = sampled(model, bundle, [prompt], 1, 1, "fp32")[0]
    tokens = torch.cat((prompt.tokens[:12], torch.tensor(ids)))[None]
    with torch.no_grad():
        logits = model.logits(forward.encode(model, tokens))[0, 11:-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()
    assert log_p == pytest.approx(float(expected), abs=1e-3)


@pytest.fixture
def tqz(bundle: Bundle, tmp_path: Path) -> Path:
    write_bundle(tmp_path / "tiny.tqz", bundle)
    return tmp_path / "tiny.tqz"


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_headers_say_how_samples_came_about(tqz: Path, tmp_path: Path) -> None:
    own = ("--model", "random:tiny", "--max-proteins", 2, "--prompt", 10, "--generate", 20, "--num-samples", 3)
    command("decode", tqz, PEPTIDES, *own, "-o", tmp_path / "a.fasta")
    found = list(read_fasta(tmp_path / "a.fasta"))
    assert [protein.accession[-2:] for protein in found] == ["_1", "_2", "_3"] * 2
    for protein in found:
        said = dict(word.split("=") for word in protein.description.split())
        assert (
            said["prompt"] == "10"
            and said["seed"] == "0"
            and said["temperature"] == "1"
            and said["kv"] == "packed"
        )
        assert float(said["log_likelihood"]) < 0 and said["ended"] in ("yes", "no")
        assert protein.residues == 10 + int(said["sampled"])
    assert command("decode", tqz, PEPTIDES, *own) == (tmp_path / "a.fasta").read_text()
    shown = command("decode", tqz, PEPTIDES, *own, "--top-p", 0.5, "--top-k", 3).split("\n", 1)[0]
    assert "top_p=0.5 top_k=3" in shown and "repetition_penalty" not in shown + found[0].description


def test_scores_from_an_exact_cache_are_the_models(tqz: Path, model: Decoder, proteins: list[Protein]) -> None:
    shown = command("score", tqz, PEPTIDES, "--model", "random:tiny", "--max-proteins", 2, "--kv", "fp32")
    rows = [line.split("\t") for line in shown.splitlines()[1:]]
    first = next(iter(read_fasta(PEPTIDES)))
    tokens = model.alphabet.batch([first])
    with torch.no_grad():
        log_p = model.logits(forward.encode(model, tokens))[0, :-1].log_softmax(-1)
    total = log_p.gather(1, tokens[0, 1:, None]).sum()
    assert rows[0][0] == first.accession and rows[0][2] == str(first.residues + 1)
    assert float(rows[0][3]) == pytest.approx(float(total), abs=1e-2)


def test_what_an_encoder_or_a_short_context_cannot_do_is_refused(tqz: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["decode", str(tqz), str(PEPTIDES), "--model", "random:tiny", "--max-proteins", "1", "--generate", "900"],
    )
    assert result.exit_code != 0 and "takes 256" in result.output


def test_a_cache_longer_than_the_positions_decodes_as_one_of_the_right_size(
    model: Decoder, bundle: Bundle, proteins: list[Protein]
) -> None:
    tokens = model.alphabet.batch(proteins[:1])[:, :40]
    found = []
    for capacity in (64, 300):  # the model has 256 positions
        cache = new_cache(model, bundle.spec, "packed", 2, capacity)
        with torch.no_grad():
            forward.prefill(model, tokens[:, :20].expand(2, -1), cache)
            found.append(forward.replay(model, tokens[:, 20:].expand(2, -1), cache))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    ids, tables = torch.zeros(1, 300, dtype=torch.int64), model.first_layer_tables()
    q = torch.randn(1, 4, 1, 16)
    rope = forward.rope_at(model, 0, 300)
    whole, short = (
        attend_tokens(q, ids[:, :count], tables, torch.ones(1), rope, torch.tensor([20])) for count in (300, 256)
    )
    assert torch.equal(whole, short)


def test_generating_takes_memory_for_the_prompt_and_not_for_the_rest(tqz: Path) -> None:
    plan = command("decode", tqz, PEPTIDES, "--prompt", 0, "--generate", 9, "--plan", "--json")
    assert {item["context"] for item in json.loads(plan)} == {10}


IGLM = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *AMINO_ACIDS, "[HUMAN]", "[MOUSE]", "[HEAVY]", "[LIGHT]",
)  # fmt: skip


def antibody(description: str) -> Protein:
    return Protein("a1", description, "QVQLV", "x.fasta", 3, 7)


def test_tags_are_said_once_and_known() -> None:
    alphabet = decoder_alphabet("gpt2", "IgLM", IGLM, {}, "")
    assert with_tags(antibody("chain=HEAVY"), {"chain": "LIGHT", "species": "human"}).description == (
        "chain=HEAVY species=human"
    )
    with pytest.raises(InputError, match=r"x\.fasta: record 3 \(a1\), line 7: chain is HEAVY and LIGHT"):
        alphabet.front(antibody("chain=HEAVY species=HUMAN chain=LIGHT"))
    for text in ("specie=HUMAN", "HUMAN", "chain=", "chain=HEAVY chain=LIGHT"):
        with pytest.raises(InputError, match="--tags"):
            parse_tags(text)
    with pytest.raises(InputError, match=r"IgLM is told chain and species"):
        Reading(tags="EC=1.1.1.1", alphabet=alphabet)


def test_what_proteins_are_told_is_part_of_what_a_codec_follows_from() -> None:
    alphabet = decoder_alphabet("gpt2", "IgLM", IGLM, {}, "")
    human, mouse = (antibody(f"chain=HEAVY species={name}") for name in ("HUMAN", "MOUSE"))
    assert told([human], alphabet) != told([mouse], alphabet) != ""
    assert told([human], ESM2_ALPHABET) == ""


def test_a_tag_that_a_model_is_not_told_is_refused(tqz: Path) -> None:
    wanted = ["score", str(tqz), str(PEPTIDES), "--model", "random:tiny", "--tags", "species=HUMAN"]
    result = CliRunner().invoke(app, wanted)
    assert result.exit_code == 3 and "is told nothing beside the sequence" in result.output


def test_a_bundle_is_for_the_tokens_that_it_was_calibrated_with(model: Decoder, bundle: Bundle) -> None:
    bundle.check_model(model, "b.tqz")
    own = model.alphabet
    swapped = Plain(own.family, own.vocabulary, own.end, own.padding, own.start)
    with pytest.raises(BundleError, match="other tokens"):
        bundle.check_model(replace(model, alphabet=swapped), "b.tqz")


@pytest.mark.parametrize("option", [("--num-samples", 2), ("--top-k", 3), ("--repetition-penalty", 1.2)])
def test_options_of_sampling_go_with_generate(tqz: Path, option: tuple[str, float]) -> None:
    result = CliRunner().invoke(app, ["decode", str(tqz), str(PEPTIDES), *map(str, option)])
    assert result.exit_code == 2 and "--generate" in result.output
