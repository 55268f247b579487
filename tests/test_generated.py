"""Proteins sampled by each family, in float64: token for token as defined, in any batch, from any cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from decoder_folders import BOS, EOS, save_tiny
from torch import Tensor

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import PackedCache
from turboesm_cli.codec.calibration import calibrate
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.engine.batch import AnyCache, Batch, Job, Stepper
from turboesm_cli.engine.jobs import run, samples_of
from turboesm_cli.engine.prompts import Prompt
from turboesm_cli.engine.tasks import Generated
from turboesm_cli.models import forward
from turboesm_cli.models.decoder import Decoder
from turboesm_cli.models.loading import load_model
from turboesm_cli.models.sampling import Sampling, gumbel, sample_tokens, seed_of
from turboesm_cli.outputs.work import NOTHING_KEPT, Tensors
from turboesm_cli.sequences.fasta import Protein

pytest.importorskip("transformers")

CAPACITY, STEPS, COUNT = 64, 24, 4
CASES = ("gpt2", "gptj half turned", "llama 2:1")
PLAIN = Sampling()
SEQUENCES = ("MKTAYIAKQRQISFVKSHFSRQ", "GIGKFLHS", "", "MACDE")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    """Tiny models in float64, so that rounding does not tip a choice."""
    made: dict[str, Decoder] = {}

    def model(case: str) -> Decoder:
        if case not in made:
            path = tmp_path_factory.mktemp("generating") / "model"
            save_tiny(path, case)
            loaded = load_model(str(path), "cpu", torch.float64)
            assert isinstance(loaded, Decoder)
            made[case] = loaded
        return made[case]

    return model


@pytest.fixture(scope="module")
def spec(models: Callable[[str], Decoder], calibration_proteins: list[Protein]) -> CodecSpec:
    single = models("llama 2:1").to(torch.device("cpu"), torch.float32)
    return calibrate(single, calibration_proteins[:12], RECIPES["flat"]).spec


def prompts_of(model: Decoder, sequences: Sequence[str] = SEQUENCES) -> list[Prompt]:
    proteins = [Protein(f"p{index}", "", sequence) for index, sequence in enumerate(sequences)]
    return [Prompt(protein, model.alphabet.prompt_length(protein), model.alphabet) for protein in proteins]


def sampled(
    model: Decoder,
    slots: int,
    sampling: Sampling = PLAIN,
    sequences: Sequence[str] = SEQUENCES,
    count: int = COUNT,
    seed: int = 3,
    new: Callable[[int, int], AnyCache] | None = None,
    sinks: int = 0,
    on_step: Callable[[int], None] = lambda tokens: None,
) -> list[tuple[Prompt, Job, Tensors]]:
    prompts = prompts_of(model, sequences)
    batch = Batch(
        model, new or (lambda rows, room: DenseCache(model, rows, room, FORMATS["fp32"])),
        lambda rows: Generated.of(model, rows, STEPS, sampling, seed), slots, CAPACITY, sinks, on_step=on_step,
    )  # fmt: skip
    return list(run(batch, samples_of(lambda: prompts, STEPS, count, True), lambda _, found: found, NOTHING_KEPT))


def ids_of(found: list[tuple[Prompt, Job, Tensors]]) -> list[list[int]]:
    return [held["ids"].tolist() for _, _, held in found]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampling", [PLAIN, Sampling(1.2, 0.9, 12, 1.3)], ids=["plain", "all"])
def test_a_sample_is_its_own_whatever_the_batch(
    case: str, sampling: Sampling, models: Callable[[str], Decoder]
) -> None:
    model = models(case)
    alone = sampled(model, 1, sampling)
    found = sampled(model, 4, sampling)
    assert ids_of(found) == ids_of(alone)
    for (_, _, a), (_, _, b) in zip(found, alone, strict=True):
        assert float(a["log_p"]) == pytest.approx(float(b["log_p"]), abs=1e-4)
    assert [job.sample for _, job, _ in alone] == [*range(COUNT)] * len(SEQUENCES)
    longer = [tuple(ids) for ids in ids_of(alone) if len(ids) > 3]  # some end at once
    assert len(set(longer)) == len(longer) > len(alone) // 2
    assert ids_of(sampled(model, 4, sampling, seed=4)) != ids_of(alone)
    fewer = sampled(model, 2, sampling, count=2)
    assert ids_of(fewer) == [ids for (_, job, _), ids in zip(alone, ids_of(alone), strict=True) if job.sample < 2]


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_drawn_from_the_models_own_distribution(case: str, models: Callable[[str], Decoder]) -> None:
    """The definition: one full pass per token, and the noise of the job's seed."""
    model = models(case)
    never = [token for token in range(len(model.alphabet)) if token not in model.alphabet.sampled]
    for prompt, job, held in sampled(model, 3, count=2):
        tokens = prompt.tokens[: prompt.cached].tolist()
        seed = torch.tensor([seed_of(3, job.number, job.sample)])
        for at, expected in enumerate(held["ids"].tolist()):
            with torch.no_grad():
                logits = model.logits(forward.encode(model, torch.tensor([tokens]))[:, -1]).float()
            logits[:, never] = -torch.inf
            noise = gumbel(seed, torch.tensor([at]), len(model.alphabet))
            assert sample_tokens(logits, noise, PLAIN).item() == expected
            tokens.append(expected)


def test_the_end_ends_a_sample_and_frees_its_slot(models: Callable[[str], Decoder]) -> None:
    model = models("llama 2:1")
    taken: list[int] = []
    steps = 0
    real = Stepper.step

    def step(self: Stepper, tokens: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return real(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        found = ids_of(sampled(model, 1, count=8, on_step=taken.append))
    assert steps == sum(map(len, found)) < STEPS * len(found)  # one slot: no step is spent on a sample that ended
    assert sum(taken) == STEPS * len(found)  # what is not needed counts as done
    ended = [ids for ids in found if ids[-1] == EOS]
    assert len(ended) > 2 and any(len(ids) < STEPS for ids in ended)
    assert all(EOS not in ids[:-1] for ids in found)
    assert all(len(ids) == STEPS for ids in found if ids[-1] != EOS)


def test_what_is_no_residue_is_never_sampled(models: Callable[[str], Decoder]) -> None:
    model = models("gpt2")
    given = {token for ids in ids_of(sampled(model, 4, Sampling(temperature=5.0))) for token in ids}
    assert given <= set(model.alphabet.sampled) and BOS not in given and len(given) > 15


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("kind", ["fp32", "int8", "packed"])
def test_a_prompt_is_encoded_once(
    slots: int, kind: str, models: Callable[[str], Decoder], spec: CodecSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many samples it has, and whether they enter at once or one after another."""
    model = models("llama 2:1")
    encoded: list[int] = []
    real = forward.prefill

    def prefill(
        model: Decoder, tokens: Tensor, cache: forward.Cache, joint: forward.JointProjection | None = None
    ) -> Tensor:
        encoded.extend(model.alphabet.lengths(tokens).tolist())
        return real(model, tokens, cache, joint)

    def new(rows: int, room: int) -> AnyCache:
        if kind == "packed":
            return PackedCache(model, spec, rows, room, backend="torch")
        return DenseCache(model, rows, room, FORMATS[kind])

    monkeypatch.setattr(forward, "prefill", prefill)
    sinks = spec.recipe.sinks if kind == "packed" else 0
    together = sampled(model, slots, count=3, new=new, sinks=sinks)
    assert sorted(encoded) == sorted(len(sequence) for sequence in SEQUENCES if sequence)  # the last is fed
    if kind == "packed":
        alone = [sampled(model, 1, count=1, sequences=SEQUENCES, new=new, sinks=sinks)]
        firsts = [ids for (_, job, _), ids in zip(together, ids_of(together), strict=True) if job.sample == 0]
        assert firsts == ids_of(alone[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampling", [PLAIN, Sampling(0.5, 0.8, 6, 1.4)], ids=["plain", "all"])
def test_the_log_likelihood_is_that_of_a_full_pass(
    case: str, sampling: Sampling, models: Callable[[str], Decoder]
) -> None:
    """The model's own, whatever was done to its distribution to sample."""
    model = models(case)
    for prompt, _, held in sampled(model, 4, sampling, count=2):
        ids = held["ids"]
        tokens = torch.cat((prompt.tokens[: prompt.cached], ids))
        with torch.no_grad():
            logits = model.logits(forward.encode(model, tokens[None]))[0, prompt.cached - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[:, None]).sum()
        assert float(held["log_p"]) == pytest.approx(float(expected), rel=1e-5, abs=1e-4)


def test_a_penalty_is_for_what_is_there_already(models: Callable[[str], Decoder]) -> None:
    """A prompt's tokens, and those sampled: with a huge penalty hardly any comes twice."""
    model = models("gpt2")
    found = sampled(model, 3, Sampling(temperature=0.5, repetition_penalty=10.0), sequences=["MACD"], count=3)
    twice = sum(len(ids) - len(set(ids)) for ids in ids_of(found))
    usual = sum(len(ids) - len(set(ids)) for ids in ids_of(sampled(model, 3, Sampling(0.5), ["MACD"], 3)))
    assert twice < usual


def test_a_job_without_a_token_to_start_from_is_refused(models: Callable[[str], Decoder]) -> None:
    task = Generated.of(models("gpt2"), 1, 4, PLAIN, 0)
    with pytest.raises(ValueError, match="without a token to start from"):
        task.enter(0, 0, Job(torch.tensor([1]), 4))


def test_samples_are_read_back(models: Callable[[str], Decoder], tmp_path: Path) -> None:
    from turboesm_cli.sequences.fasta import read_fasta, write_fasta

    model = models("llama 2:1")
    found = sampled(model, 4, sequences=["MKTAYIAKQR"], count=3)
    made = [
        Protein(f"s{job.sample}", "", prompt.text + model.alphabet.detokenize(held["ids"].tolist()))
        for prompt, job, held in found
    ]
    write_fasta(tmp_path / "s.fasta", made)
    assert [item.sequence for item in read_fasta(tmp_path / "s.fasta")] == [item.sequence for item in made]
