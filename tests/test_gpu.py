"""The same numbers on a CUDA device as on the CPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numbered import in_order

from turboesm_cli.cache.packed import PackedCache, PackedCodec
from turboesm_cli.codec.calibration import calibrate
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.engine.batch import Batch, Job, Stepper
from turboesm_cli.engine.jobs import new_cache
from turboesm_cli.engine.memory_plan import sequence_bytes
from turboesm_cli.engine.tasks import Forced, Sampled
from turboesm_cli.evaluation.throughput import Kind, Load, measure
from turboesm_cli.models import forward
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.loading import load_model
from turboesm_cli.models.sampling import Sampling, residue_logits
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens
from turboesm_cli.statistics.collect import collect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def on_gpu(tiny_path: Path) -> EsmModel:
    torch.backends.cuda.matmul.allow_tf32 = False
    return load_model(str(tiny_path), "cuda")


def test_hidden_states(tiny: EsmModel, on_gpu: EsmModel, peptides: list[Protein]) -> None:
    with torch.no_grad():
        expected = forward.encode(tiny, to_tokens(peptides[:3], tiny))
        found = forward.encode(on_gpu, to_tokens(peptides[:3], on_gpu)).cpu()
    assert torch.allclose(found, expected, atol=1e-4)


def test_statistics(tiny: EsmModel, on_gpu: EsmModel, calibration_proteins: list[Protein]) -> None:
    expected, found = (collect(model, calibration_proteins[:8]) for model in (tiny, on_gpu))
    assert torch.equal(expected.sample.hashes, found.sample.hashes)
    for a, b in zip(expected.layers, found.layers, strict=True):
        assert torch.allclose(a.key_key, b.key_key, rtol=1e-3, atol=1e-1)


def test_packed_decode(on_gpu: EsmModel, calibration_proteins: list[Protein]) -> None:
    spec = calibrate(on_gpu, calibration_proteins[:12], RECIPES["flat"]).spec
    tokens = to_tokens(calibration_proteins[:1], on_gpu)[:, :40]
    with torch.no_grad():
        cache = PackedCache(on_gpu, spec, 1, 40)
        forward.prefill(on_gpu, tokens[:, :20], cache)
        stepped = forward.replay(on_gpu, tokens[:, 20:], cache)
        passed = forward.teacher_forced(on_gpu, tokens, [20], PackedCodec(spec, on_gpu.device))[:, 20:]
    assert torch.nn.functional.cosine_similarity(stepped, passed, dim=-1).min() > 0.999


KINDS = ["fp32", "fp16", "bf16", "int8", "fp8", "packed"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[..., Path]) -> EsmModel:
    """Heads of 64, as the fast kernels want them."""
    path = save_tiny_model(tmp_path_factory.mktemp("wide") / "wide.pt", layers=3, width=128)
    torch.backends.cuda.matmul.allow_tf32 = False
    return load_model(str(path), "cuda")


@pytest.fixture(scope="module")
def wide_spec(wide: EsmModel, calibration_proteins: list[Protein]) -> CodecSpec:
    return calibrate(wide, calibration_proteins[:12], RECIPES["auto"]).spec


@pytest.fixture(scope="module")
def jobs(calibration_proteins: list[Protein]) -> list[Job]:
    """Proteins of many lengths, prompts from `<cls>` alone to most of the protein."""
    made = []
    for index, protein in enumerate(calibration_proteins[:14]):
        tokens = ESM2_ALPHABET.batch([protein])[0, : 12 + 11 * index]
        prompt = 1 + 9 * index % (len(tokens) - 3)
        made.append(Job(tokens[:prompt], len(tokens) - prompt, tokens[prompt:]))
    return made


def batch_of(model: EsmModel, spec: CodecSpec, kind: str, jobs: list[Job], slots: int) -> Batch[Forced]:
    longest = max(len(job.prompt) + job.steps for job in jobs)
    sinks = spec.recipe.sinks if kind == "packed" else 0
    return Batch(
        model, lambda n, room: new_cache(model, spec, kind, n, room),
        lambda n: Forced.of(model, n, longest), slots, longest, sinks,
    )  # fmt: skip


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """A code that tips over a threshold moves its token a little; a wrong position or mask moves it far."""
    for a, b in zip(found, expected, strict=True):
        assert torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).min() > 0.995


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 5])
def test_graphs_step_as_eager_steps_do(
    wide: EsmModel, wide_spec: CodecSpec, jobs: list[Job], kind: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = in_order(batch_of(wide, wide_spec, kind, jobs, slots).run(enumerate(jobs)))
    monkeypatch.setattr("turboesm_cli.engine.batch.Graph", lambda step, cache, sinks: step)
    eager = in_order(batch_of(wide, wide_spec, kind, jobs, slots).run(enumerate(jobs)))
    for a, b in zip(captured, eager, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_getting_ready_leaves_nothing_behind(
    wide: EsmModel, wide_spec: CodecSpec, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that are not compiled yet leave their results as the memory was: no numbers, here."""

    def poisoned(*shape: Any, **named: Any) -> torch.Tensor:
        made = real(*shape, **named)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(1)

    cache = new_cache(wide, wide_spec, kind, 3, 140)
    stepper, real = Stepper(wide, cache), torch.empty
    monkeypatch.setattr(torch, "empty", poisoned)
    with torch.no_grad():
        stepper.make_ready()
    assert cache.length == 0 and not cache.lengths.any()
    for name, tensor in cache.leading(140).items():
        assert name == "unmasked" or not tensor.float().any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_each_gives_alone(
    wide: EsmModel, wide_spec: CodecSpec, jobs: list[Job], kind: str
) -> None:
    together = in_order(batch_of(wide, wide_spec, kind, jobs, 5).run(enumerate(jobs)))
    alone = [in_order(batch_of(wide, wide_spec, kind, [job], 1).run([(0, job)]))[0] for job in jobs]
    assert_close(together, alone)


def test_a_batch_gives_what_one_causal_pass_gives(wide: EsmModel, wide_spec: CodecSpec, jobs: list[Job]) -> None:
    found = in_order(batch_of(wide, wide_spec, "packed", jobs, 5).run(enumerate(jobs)))
    codec = PackedCodec(wide_spec, wide.device)
    for job, hidden in zip(jobs, found, strict=True):
        assert job.rest is not None
        tokens = torch.cat((job.prompt, job.rest))[None].to(wide.device)
        with torch.no_grad():
            passed = forward.teacher_forced(wide, tokens, [len(job.prompt)], codec)[0, len(job.prompt) :]
        assert_close([hidden], [passed])


@pytest.mark.parametrize("slots", [1, 5])
def test_predictions_of_a_graph_are_those_of_a_stream_of_masks(
    wide: EsmModel, wide_spec: CodecSpec, jobs: list[Job], slots: int
) -> None:
    longest = max(len(job.prompt) + job.steps for job in jobs)
    batch = Batch(
        wide, lambda n, room: new_cache(wide, wide_spec, "packed", n, room),
        lambda n: Forced.of(wide, n, longest, predict=True), slots, longest, wide_spec.recipe.sinks,
    )  # fmt: skip
    codec = PackedCodec(wide_spec, wide.device)
    for number, found in batch.run(enumerate(jobs)):
        job = jobs[number]
        assert job.rest is not None
        start = len(job.prompt)
        tokens = torch.cat((job.prompt, job.rest))[None].to(wide.device)
        with torch.no_grad():
            hidden, masks = forward.teacher_forced_with_masks(wide, tokens, [start], codec)
            logits = residue_logits(wide, masks[0, start:])
        assert_close([found["hidden"], found["logits"]], [hidden[0, start:], logits])


@pytest.mark.parametrize("kind", ["fp16", "packed"])
def test_sampling_repeats(wide: EsmModel, wide_spec: CodecSpec, jobs: list[Job], kind: str) -> None:
    longest = max(len(job.prompt) for job in jobs) + 20
    runs = []
    for _ in range(2):
        batch = Batch(
            wide, lambda n, room: new_cache(wide, wide_spec, kind, n, room),
            lambda n: Sampled.of(wide, n, 20, Sampling(), 3), 5, longest, wide_spec.recipe.sinks,
        )  # fmt: skip
        runs.append(
            [ids.tolist() for ids in in_order(batch.run(enumerate(Job(job.prompt, 20) for job in jobs)), "ids")]
        )
    assert runs[0] == runs[1]
    assert len({tuple(ids) for ids in runs[0]}) == len(jobs)


def test_running_out_of_memory_halves_the_batch(wide: EsmModel, wide_spec: CodecSpec, jobs: list[Job]) -> None:
    """A limit that the whole batch's cache does not fit in, and half of it does."""
    longest = max(len(job.prompt) + job.steps for job in jobs)
    slots, room = 64, 4096
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(wide.device).total_memory
    full = slots * sequence_bytes(wide_spec.size, "fp32", room)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.7 * full + 2**28) / total)
    shrunk: list[int] = []
    try:
        batch = Batch(
            wide, lambda n, capacity: new_cache(wide, wide_spec, "fp32", n, capacity),
            lambda n: Forced.of(wide, n, longest), slots, room, on_shrink=shrunk.append,
        )  # fmt: skip
        found = [len(hidden) for hidden in in_order(batch.run(enumerate(jobs)))]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found == [job.steps for job in jobs]
    assert shrunk


def test_sequences_of_new_lengths_make_no_plans_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("random:esm2_t6_8M", "cuda", torch.bfloat16)
    attention, allowed = F.scaled_dot_product_attention, []

    def seen(*args: Any, **named: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    tokens = to_tokens(_random_proteins()[:2], model)
    for batch in (
        tokens,
        tokens.masked_fill(torch.arange(tokens.shape[1], device="cuda") > 40, ESM2_ALPHABET.padding),
    ):
        forward.encode(model, batch)
    assert allowed == [False] * 2 * model.shape.layers


@pytest.mark.parametrize("kind", ["fp16", "fp8", "packed"])
def test_throughput_in_bfloat16(kind: str) -> None:
    model = load_model("random:esm2_t6_8M", "cuda", torch.bfloat16)
    spec = calibrate(load_model("random:esm2_t6_8M", "cuda"), _random_proteins(), RECIPES["flat"]).spec
    found = measure(model, Kind.of(kind, spec), Load(3, 64), repeats=3)
    assert found.step.median > 0 < found.first_token.median
    assert found.held <= found.prefill_peak <= found.peak


def _random_proteins() -> list[Protein]:
    letters = "ACDEFGHIKLMNPQRSTVWY"
    picks = torch.randint(20, (6, 80), generator=torch.Generator().manual_seed(0)).tolist()
    return [Protein(f"p{i}", "", "".join(letters[at] for at in pick)) for i, pick in enumerate(picks)]
