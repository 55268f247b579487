"""Many proteins at once give what each gives alone; what does not fit starts again in a smaller batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from numbered import in_order
from torch import Tensor

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import PackedCache, PackedCodec
from turboesm_cli.codec.bundle import Bundle
from turboesm_cli.codec.calibration import calibrate
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.recipes import RECIPES, parse_recipe
from turboesm_cli.commands.decode import Decoding
from turboesm_cli.engine import batch as batches
from turboesm_cli.engine.batch import CPU_SLOTS, Batch, Job, Stepper, cpu_slots
from turboesm_cli.engine.jobs import job_of, rest_of, run
from turboesm_cli.engine.prompts import Prompt
from turboesm_cli.engine.tasks import Forced, Sampled
from turboesm_cli.engine.workload import of_proteins
from turboesm_cli.evaluation.comparison import compare
from turboesm_cli.evaluation.protein_results import to_tensors
from turboesm_cli.models import forward
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.sampling import Sampling, draw, residue_indices, residue_logits, sample
from turboesm_cli.outputs.work import NOTHING_KEPT, Work, saved_work
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens

SLOTS = 3
CAPACITY = 64
PROMPTS = [4, 1, 9, 2, 12, 3, 30, 5]
ROUNDING = 2e-6
"""Angles and scales are float32, whose last bit depends on how many are computed at once."""
KINDS = [*FORMATS, "packed flat", "packed auto", "packed paper"]
NewCache = Callable[[int, int], batches.AnyCache]


def cache_maker(model: EsmModel, specs: dict[str, CodecSpec], kind: str) -> NewCache:
    def new(slots: int, capacity: int) -> batches.AnyCache:
        if kind.startswith("packed"):
            return PackedCache(model, specs[kind.split()[1]], slots, capacity, backend="torch")
        return DenseCache(model, slots, capacity, FORMATS[kind])

    return new


@pytest.fixture(scope="module")
def jobs(calibration_proteins: list[Protein]) -> list[Job]:
    """Prompts of many lengths, one of `<cls>` alone after one with masks; they end at different times."""
    made = []
    for number, (protein, prompt) in enumerate(zip(calibration_proteins, PROMPTS, strict=False)):
        tokens = ESM2_ALPHABET.batch([protein])[0, : prompt + 3 + len(made) * 5 % 14]
        if prompt in (4, 9):
            tokens[2] = ESM2_ALPHABET.mask
        made.append(Job(tokens[:prompt], len(tokens) - prompt, tokens[prompt:], number=number))
    return made


def alone(model: EsmModel, job: Job, cache: batches.AnyCache) -> Tensor:
    assert job.rest is not None
    with torch.no_grad():
        forward.prefill(model, job.prompt[None], cache)
        return forward.replay(model, job.rest[None], cache)[0]


def sampled_alone(model: EsmModel, job: Job, cache: batches.AnyCache, chances: Tensor) -> Tensor:
    """The definition: decode a mask, sample, forget the mask, decode the residue."""
    residues = []
    with torch.no_grad():
        forward.prefill(model, job.prompt[None], cache)
        for chance in chances:
            logits = residue_logits(model, forward.step(model, torch.tensor([ESM2_ALPHABET.mask]), cache))
            cache.rewind()
            residues.append(sample(ESM2_ALPHABET, logits, chance[None], Sampling(1.0, 0.9)))
            forward.step(model, residues[-1], cache)
    return torch.cat(residues)


def sinks_of(specs: dict[str, CodecSpec], kind: str) -> int:
    return specs[kind.split()[1]].recipe.sinks if kind.startswith("packed") else 0


@pytest.mark.parametrize("kind", KINDS)
def test_given_tokens_in_a_batch_as_alone(
    precise: EsmModel, precise_specs: dict[str, CodecSpec], jobs: list[Job], kind: str
) -> None:
    new = cache_maker(precise, precise_specs, kind)
    batch = Batch(
        precise, new, lambda slots: Forced.of(precise, slots, 32), SLOTS, CAPACITY, sinks_of(precise_specs, kind)
    )
    found = in_order(batch.run(enumerate(jobs)))
    assert len(found) == len(jobs) > SLOTS
    for job, hidden in zip(jobs, found, strict=True):
        assert torch.allclose(hidden, alone(precise, job, new(1, CAPACITY)), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["fp32", "int8", "packed flat", "packed auto"])
def test_sampled_tokens_in_a_batch_as_alone(
    precise: EsmModel, precise_specs: dict[str, CodecSpec], jobs: list[Job], kind: str
) -> None:
    new = cache_maker(precise, precise_specs, kind)
    batch = Batch(
        precise,
        new,
        lambda slots: Sampled.of(precise, slots, 16, Sampling(1.0, 0.9), 5),
        SLOTS,
        CAPACITY,
        sinks_of(precise_specs, kind),
    )
    found = in_order(batch.run(enumerate(jobs)), "ids")
    for number, (job, ids) in enumerate(zip(jobs, found, strict=True)):
        expected = sampled_alone(precise, job, new(1, CAPACITY), draw(5 + number, job.steps))
        assert torch.equal(ids, expected)
    assert len({tuple(ids.tolist()) for ids in found}) == len(jobs)


@pytest.mark.parametrize("kind", ["fp32", "packed flat", "packed auto"])
def test_predictions_in_a_batch_are_those_of_a_stream_of_masks(
    precise: EsmModel, precise_specs: dict[str, CodecSpec], jobs: list[Job], kind: str
) -> None:
    new = cache_maker(precise, precise_specs, kind)
    batch = Batch(
        precise,
        new,
        lambda slots: Forced.of(precise, slots, 32, predict=True),
        SLOTS,
        CAPACITY,
        sinks_of(precise_specs, kind),
    )
    found = [result for _, result in sorted(batch.run(enumerate(jobs)), key=lambda item: item[0])]
    codec = PackedCodec(precise_specs[kind.split()[1]], torch.device("cpu")) if kind != "fp32" else None
    for job, result in zip(jobs, found, strict=True):
        assert job.rest is not None
        start = len(job.prompt)
        with torch.no_grad():
            hidden, masks = forward.teacher_forced_with_masks(
                precise, torch.cat((job.prompt, job.rest))[None], [start], codec
            )
            logits = residue_logits(precise, masks[0, start:])
        assert torch.allclose(result["hidden"], hidden[0, start:], rtol=0, atol=ROUNDING)
        assert torch.allclose(result["logits"], logits, rtol=0, atol=1e-5)


def test_a_batch_on_the_cpus_own_kernels(tiny: EsmModel, specs: dict[str, CodecSpec], jobs: list[Job]) -> None:
    """In float32 a code may tip over a threshold, so hidden states agree by their angle."""
    batch = Batch(
        tiny, lambda slots, room: PackedCache(tiny, specs["flat"], slots, room),
        lambda slots: Forced.of(tiny, slots, 32), SLOTS, CAPACITY, specs["flat"].recipe.sinks,
    )  # fmt: skip
    for job, hidden in zip(jobs, in_order(batch.run(enumerate(jobs))), strict=True):
        expected = alone(tiny, job, PackedCache(tiny, specs["flat"], 1, CAPACITY))
        assert torch.nn.functional.cosine_similarity(hidden, expected, dim=-1).min() > 0.999


def test_jobs_are_taken_when_there_is_a_slot(tiny: EsmModel, jobs: list[Job]) -> None:
    taken = 0

    def source() -> Iterator[Job]:
        nonlocal taken
        for taken, job in enumerate(jobs, 1):  # noqa: B007
            yield job

    new = cache_maker(tiny, {}, "fp32")
    results = Batch(tiny, new, lambda slots: Forced.of(tiny, slots, 32), 2, CAPACITY).run(enumerate(source()))
    next(results)
    assert taken <= 3  # two in slots, one that waits
    assert len(list(results)) == len(jobs) - 1


def test_prompts_of_like_length_are_encoded_together(
    precise: EsmModel, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the slots that are free: at most so many tokens at once, and little padding."""
    seen: list[list[int]] = []
    real = Stepper.prefill

    def prefill(self: Stepper, start: int, prompts: Sequence[Tensor]) -> Tensor:
        seen.append([len(prompt) for prompt in prompts])
        return real(self, start, prompts)

    monkeypatch.setattr(Stepper, "prefill", prefill)
    monkeypatch.setattr(batches, "prefill_tokens", lambda device: 24)
    new = cache_maker(precise, {}, "fp32")
    batch = Batch(precise, new, lambda slots: Forced.of(precise, slots, 32), 7, CAPACITY)
    for job, hidden in zip(jobs, in_order(batch.run(enumerate(jobs))), strict=True):
        assert torch.allclose(hidden, alone(precise, job, new(1, CAPACITY)), rtol=0, atol=ROUNDING)
    assert seen == [[1, 2, 3, 4], [9, 12], [30], [5]]  # the eighth when a slot is free


class Failing(Forced):
    """Runs out of memory at the steps that are listed, all batches counted together."""

    at_steps: list[int]
    steps = 0

    def step(self, stepper: Stepper) -> None:
        Failing.steps += 1
        if Failing.steps in Failing.at_steps:
            raise torch.OutOfMemoryError("injected")
        super().step(stepper)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    monkeypatch.setattr(Failing, "steps", 0)
    return Failing


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    precise: EsmModel, jobs: list[Job], failing: type[Failing]
) -> None:
    failing.at_steps = [7, 20]
    new = cache_maker(precise, {}, "fp32")
    shrunk: list[int] = []
    steps: list[int] = []
    batch = Batch(
        precise, new, lambda slots: failing.of(precise, slots, 32), 4, CAPACITY,
        on_step=steps.append, on_shrink=shrunk.append,
    )  # fmt: skip
    found = in_order(batch.run(enumerate(jobs)))
    assert shrunk == [2, 1]
    assert sum(steps) == sum(job.steps for job in jobs) and min(steps) < 0
    for job, hidden in zip(jobs, found, strict=True):
        assert torch.allclose(hidden, alone(precise, job, new(1, CAPACITY)), rtol=0, atol=ROUNDING)


def test_out_of_memory_in_a_prefill(precise: EsmModel, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = forward.prefill

    def prefill(
        model: EsmModel, tokens: Tensor, cache: forward.Cache, joint: forward.JointProjection | None
    ) -> Tensor:
        nonlocal calls
        calls += 1
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("injected")
        return real(model, tokens, cache, joint)

    monkeypatch.setattr(forward, "prefill", prefill)
    monkeypatch.setattr(batches, "prefill_tokens", lambda device: 1000)
    shrunk: list[int] = []
    batch = Batch(
        precise, cache_maker(precise, {}, "fp32"), lambda slots: Forced.of(precise, slots, 32), 4, CAPACITY,
        on_shrink=shrunk.append,
    )  # fmt: skip
    assert [len(hidden) for hidden in in_order(batch.run(enumerate(jobs)))] == [job.steps for job in jobs]
    assert shrunk == [2] and calls > 2


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_out_of_memory_where_a_job_enters(
    precise: EsmModel, jobs: list[Job], monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    entered = 0
    real = Forced.enter

    def enter(self: Forced, slot: int, number: int, job: Job) -> None:
        nonlocal entered
        entered += 1
        if entered == fails_at:
            raise torch.OutOfMemoryError("injected")
        real(self, slot, number, job)

    monkeypatch.setattr(Forced, "enter", enter)
    new = cache_maker(precise, {}, "fp32")
    batch = Batch(precise, new, lambda slots: Forced.of(precise, slots, 32), 6, CAPACITY)
    for job, hidden in zip(jobs, in_order(batch.run(enumerate(jobs))), strict=True):
        assert torch.allclose(hidden, alone(precise, job, new(1, CAPACITY)), rtol=0, atol=ROUNDING)


def test_a_batch_of_one_that_does_not_fit_is_an_error(
    tiny: EsmModel, jobs: list[Job], failing: type[Failing]
) -> None:
    failing.at_steps = [1]
    batch = Batch(tiny, cache_maker(tiny, {}, "fp32"), lambda slots: failing.of(tiny, slots, 32), 1, CAPACITY)
    with pytest.raises(torch.OutOfMemoryError):
        list(batch.run(enumerate(jobs)))


@pytest.fixture(scope="module")
def bundle(tiny: EsmModel, calibration_proteins: list[Protein]) -> Bundle:
    return calibrate(tiny, calibration_proteins[:12], RECIPES["flat"])


def test_the_command_says_that_it_halved_the_batch(
    tiny: EsmModel,
    bundle: Bundle,
    peptides: list[Protein],
    failing: type[Failing],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing.at_steps = [3]
    work = of_proteins(lambda: peptides[:9], lambda protein: 5, bundle)
    command = Decoding(bundle, tiny, work, NOTHING_KEPT, "packed", 4, work.longest)
    batch = command.batch(lambda slots: failing.of(tiny, slots, work.longest), lambda done=1: None)
    done = run(batch, rest_of(work.prompts), lambda prompt, found: found, NOTHING_KEPT)
    accessions = [prompt.protein.accession for prompt, _, _ in done]
    assert accessions == [protein.accession for protein in peptides[:9]]
    assert "out of memory: the batch is halved to 2" in capsys.readouterr().err


def test_results_of_a_batch_are_compared_in_the_order_of_the_input(
    tiny: EsmModel, peptides: list[Protein]
) -> None:
    prompts = [Prompt(protein, 1 + index % 5, tiny.alphabet) for index, protein in enumerate(peptides[:8])]
    longest = max(protein.residues for protein in peptides[:8]) + 2
    batch = Batch(tiny, cache_maker(tiny, {}, "fp32"), lambda slots: Forced.of(tiny, slots, longest), 3, longest)
    found = list(
        run(
            batch,
            rest_of(lambda: prompts),
            lambda prompt, found: to_tensors(compare(tiny, prompt, found)),
            NOTHING_KEPT,
        )
    )
    assert [prompt for prompt, _, _ in found] == prompts
    assert all(held["0.cosines"].min() > 1 - 1e-6 for _, _, held in found)


def test_what_is_saved_is_not_decoded_again_and_takes_its_place_in_the_order(
    tiny: EsmModel, peptides: list[Protein], tmp_path: Path
) -> None:
    prompts = [Prompt(protein, 1, tiny.alphabet) for protein in peptides[:7]]
    longest = max(protein.residues for protein in peptides[:7]) + 2
    entered: list[int] = []

    class Counting(Forced):
        def enter(self, slot: int, number: int, job: Job) -> None:
            entered.append(number)
            super().enter(slot, number, job)

    def all_of(work: Work) -> Iterator[tuple[Prompt, Job, dict[str, Tensor]]]:
        batch = Batch(
            tiny, cache_maker(tiny, {}, "fp32"), lambda slots: Counting.of(tiny, slots, longest), 2, longest
        )
        return run(batch, rest_of(lambda: prompts), lambda prompt, found: found, work)

    expected = [held["hidden"] for _, _, held in all_of(NOTHING_KEPT)]
    with pytest.raises(KeyboardInterrupt), saved_work(tmp_path / "out", {}) as work:
        for _ in zip(range(3), all_of(work), strict=False):
            pass
        raise KeyboardInterrupt
    entered.clear()
    with saved_work(tmp_path / "out", {}) as work:
        saved = {number for number in range(7) if str(number) in work}
        found = list(all_of(work))
    assert len(saved) >= 3 and set(entered) == set(range(7)) - saved
    assert [prompt for prompt, _, _ in found] == prompts
    for (_, _, held), hidden in zip(found, expected, strict=True):
        assert torch.allclose(held["hidden"], hidden, atol=1e-5)


def test_a_prefill_holds_one_layers_keys_and_values(
    tiny: EsmModel, specs: dict[str, CodecSpec], peptides: list[Protein], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    real = PackedCache.append

    def append(self: PackedCache, layer: int, k: Tensor, v: Tensor, tokens: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in seen))
        seen.extend(weakref.ref(tensor) for tensor in (k, v))
        real(self, layer, k, v, tokens)

    monkeypatch.setattr(PackedCache, "append", append)
    cache = PackedCache(tiny, specs["flat"], 2, 40)
    with torch.no_grad():
        forward.prefill(tiny, to_tokens(peptides[:2], tiny)[:, :20], cache)
    assert alive == [0] * tiny.shape.layers
    assert all(reference() is None for reference in seen)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.zeros(1, 20)
    logits[0, 5], logits[0, 6], logits[0, 7] = 2.0, 1.0, -torch.inf
    chances = (torch.arange(20_000) + 0.5) / 20_000
    tokens = torch.tensor(ESM2_ALPHABET.residues)
    found = sample(ESM2_ALPHABET, logits.expand(20_000, -1), chances, Sampling())
    shares = torch.bincount(found, minlength=33)[tokens] / 20_000
    assert torch.allclose(shares, logits[0].softmax(0), atol=2e-4)
    assert shares.sum() == pytest.approx(1)
    nucleus = sample(ESM2_ALPHABET, logits.expand(20_000, -1), chances, Sampling(top_p=0.3))
    assert set(nucleus.tolist()) == {ESM2_ALPHABET.residues[5], ESM2_ALPHABET.residues[6]}
    for sampling in (Sampling(temperature=0.0), Sampling(top_p=0.0)):
        assert set(sample(ESM2_ALPHABET, logits.expand(20_000, -1), chances, sampling).tolist()) == {
            ESM2_ALPHABET.residues[5]
        }


def test_residues_are_the_20_amino_acids(tiny: EsmModel) -> None:
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = tiny.logits(hidden)
        found = residue_logits(tiny, hidden)
    order = [ESM2_ALPHABET.vocabulary.index(letter) for letter in "ACDEFGHIKLMNPQRSTVWY"]
    assert torch.equal(found, whole[:, order])
    tokens = torch.tensor(ESM2_ALPHABET.tokenize(Protein("", "", "AYXBUZO<mask>C")))
    assert residue_indices(ESM2_ALPHABET, tokens).tolist() == [-1, 0, 19, -1, -1, -1, -1, -1, -1, 1, -1]


@pytest.mark.parametrize("recipe", ["flat", "auto", "auto@4", "waterfill@4"])
def test_keys_and_values_packed_together_as_apart(
    tiny: EsmModel, calibration_proteins: list[Protein], recipe: str
) -> None:
    from turboesm_kernels import cpu_lookup
    from turboesm_kernels.prepared import PreparedSide

    spec = calibrate(tiny, calibration_proteins[:12], parse_recipe(recipe)).spec
    generator = torch.Generator().manual_seed(0)
    for layer in filter(None, spec.layers):
        k, v = torch.randn(2, 5, spec.heads, 1, spec.head_dim, generator=generator)
        prepared = PreparedSide.of(layer.k), PreparedSide.of(layer.v)
        uniform = [side.bits is not None for side in prepared]
        assert all(uniform) or recipe == "flat"  # 8-bit grids are recognised too, see the widths below
        pair = cpu_lookup.Pair.of(*prepared)
        assert (pair is not None) == all(uniform)
        if pair is None:
            continue
        rope = forward.rope_at(tiny, 3, 1)
        together = pair.compress(k, v, rope)
        apart = cpu_lookup.compress(k, prepared[0], rope), cpu_lookup.compress(v, prepared[1])
        for a, b in zip(together, apart, strict=True):
            assert a.codes.shape == b.codes.shape
            assert a.codes.ne(b.codes).double().mean() < 0.01
            assert a.scales is not None and b.scales is not None
            assert (a.scales.int() - b.scales.int()).abs().max() <= 1
    sides = [side for layer in spec.layers if layer for side in (layer.k, layer.v)]
    assert recipe != "auto@4" or 8 in {width for side in sides for p in side.profiles for width in p.widths}


@pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_cpus_batch_gives_each_protein_the_bits_that_it_has_in_any_other(
    embedded: EsmModel, peptides: list[Protein], threads: int
) -> None:
    """In other company, another slot and another order, and beside nobody."""
    spec = calibrate(embedded, peptides[:12], parse_recipe("auto")).spec
    slots = cpu_slots(embedded, spec, "packed", None)
    assert slots == CPU_SLOTS
    prompts = [Prompt(protein, 2 + at % 7, ESM2_ALPHABET) for at, protein in enumerate(peptides[20:31])]
    jobs = [replace(job, steps=min(job.steps, 9), rest=job.rest[:9]) for job in map(job_of, prompts)]

    def run(order: list[int]) -> dict[int, torch.Tensor]:
        batch = Batch(
            embedded, lambda slots, capacity: PackedCache(embedded, spec, slots, capacity),
            lambda slots: Forced.of(embedded, slots, 9), slots, 64, spec.recipe.sinks,
        )  # fmt: skip
        return {order[at]: found["hidden"] for at, found in batch.run(enumerate(jobs[each] for each in order))}

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = run(list(range(len(jobs))))
        others = [run(list(reversed(range(len(jobs))))), run([3, 9, 4]), *(run([each]) for each in (0, 5, 10))]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found, whole[each]) for other in others for each, found in other.items())


def test_a_cpus_batch_where_company_would_matter(
    tiny: EsmModel, precise: EsmModel, specs: dict[str, CodecSpec], precise_specs: dict[str, CodecSpec]
) -> None:
    assert cpu_slots(tiny, specs["auto"], "fp32", None) == 1
    assert cpu_slots(tiny, specs["flat"], "packed", None) == 1  # no compiled loops for its tables
    assert cpu_slots(precise, precise_specs["waterfill"], "packed", None) == 1


@pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")
def test_slots_of_a_cpu_are_eights(tiny: EsmModel, specs: dict[str, CodecSpec]) -> None:
    found = [cpu_slots(tiny, specs["waterfill"], "packed", wanted) for wanted in (None, 1, 2, 8, 9)]
    assert found == [8, 1, 8, 8, 16]
