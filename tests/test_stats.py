"""Statistics: mergeable, deterministic, bounded, and equal to a plain calculation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from turboesm_kernels.reference import Rope

from turboesm_cli.console import Tick
from turboesm_cli.errors import InputError
from turboesm_cli.models import forward
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.accumulators import LayerSums, Statistics, sample_size
from turboesm_cli.statistics.batching import batches, hold_back, in_prompt, prompt_lengths, to_tokens, visible_keys
from turboesm_cli.statistics.collect import collect
from turboesm_cli.statistics.sensitivity import measure


class Recorder:
    """A codec that changes nothing and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def roundtrip(
        self, _layer: int, k: torch.Tensor, v: torch.Tensor, _rope: Rope
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append((k, v))
        return k, v


class Noise:
    """A codec that adds noise to one side of one layer."""

    def __init__(self, layer: int, side: str, size: float, seed: int) -> None:
        self.layer, self.side, self.size = layer, side, size
        self.generator = torch.Generator().manual_seed(seed)

    def roundtrip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, _rope: Rope
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer != self.layer:
            return k, v
        noise = torch.randn(k.shape, generator=self.generator) * self.size
        noise[:, :, :1] = 0
        return (k + noise, v) if self.side == "k" else (k, v + noise)


def assert_same(one: Statistics, other: Statistics, rtol: float = 1e-4) -> None:
    assert (one.proteins, one.tokens) == (other.proteins, other.tokens)
    for a, b in zip(one.layers, other.layers, strict=True):
        for f in fields(LayerSums):
            x, y = getattr(a, f.name), getattr(b, f.name)
            assert torch.allclose(x, y, rtol=rtol, atol=rtol * float(y.abs().max())), f.name
    size = float(other.sensitivity.gram.abs().max())
    assert torch.allclose(one.sensitivity.gram, other.sensitivity.gram, rtol=rtol, atol=rtol * size)
    assert one.sensitivity.tokens == other.sensitivity.tokens
    for a, b in ((one.sample, other.sample), (one.held, other.held)):
        assert torch.equal(a.hashes, b.hashes) and torch.equal(a.positions, b.positions)
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a.keys, b.keys, strict=True))


@pytest.fixture(scope="module")
def proteins(calibration_proteins: list[Protein]) -> list[Protein]:
    """Enough for several to be held back, so that shards hold some too."""
    fitted, held = hold_back(calibration_proteins)
    return fitted[:12] + held[:4]


@pytest.fixture(scope="module")
def whole(tiny: EsmModel, proteins: list[Protein]) -> Statistics:
    return collect(tiny, proteins)


def test_shards_add_up_to_the_whole(tiny: EsmModel, proteins: list[Protein], whole: Statistics) -> None:
    shards = collect(tiny, proteins[::2]) + collect(tiny, proteins[1::2])
    assert_same(shards, whole)
    assert_same(collect(tiny, proteins[1::2]) + collect(tiny, proteins[::2]), whole)


@pytest.mark.parametrize("tokens_per_batch", [300, 10_000])
def test_neither_order_nor_batches_matter(
    tiny: EsmModel, proteins: list[Protein], whole: Statistics, tokens_per_batch: int
) -> None:
    assert_same(collect(tiny, proteins[::-1], tokens_per_batch), whole)


def test_runs_repeat_to_the_bit(tiny: EsmModel, proteins: list[Protein], whole: Statistics) -> None:
    again = collect(tiny, proteins)
    assert torch.equal(again.layers[1].key_key, whole.layers[1].key_key)
    assert torch.equal(again.sensitivity.gram, whole.sensitivity.gram)


def test_samples_do_not_grow_without_bound(tiny: EsmModel, whole: Statistics) -> None:
    size = sample_size(tiny.shape.head_dim)
    merged = whole
    for _ in range(8):
        merged = merged + merged
    assert len(merged.sample.hashes) == size
    assert len(merged.held.hashes) <= size // 4


def test_sums_are_those_of_decoding(tiny: EsmModel, calibration_proteins: list[Protein]) -> None:
    protein = next(p for p in calibration_proteins if prompt_lengths([p], 999, tiny) == [0])
    tokens = to_tokens([protein], tiny)
    recorder = Recorder()
    with torch.no_grad():
        forward.teacher_forced(tiny, tokens, [0], recorder)
    found = collect(tiny, [protein])
    for (k, v), sums in zip(recorder.seen, found.layers, strict=True):
        k, v = k[0].double(), v[0].double()
        both = sums.over([0, 1])
        assert torch.allclose(both.key_key[0], k.mT @ k, rtol=1e-4, atol=1e-3)
        assert torch.allclose(both.value_value[0], v.mT @ v, rtol=1e-4, atol=1e-3)
        assert torch.allclose(sums.value[0], v[:, 0], atol=1e-4)  # group 0 is `<cls>` alone
        assert torch.allclose(both.value[0], v.sum(1), atol=1e-3)
    assert found.layers[0].count.tolist() == [1, protein.residues + 1]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("side", ["k", "v"])
def test_sensitivity_predicts_the_effect_of_noise(
    tiny: EsmModel, calibration_proteins: list[Protein], layer: int, side: str
) -> None:
    empty = [p for p in calibration_proteins if p.residues < 120 and prompt_lengths([p], 999, tiny) == [0]][:3]
    metric = measure(tiny, empty)[0].metric(layer, "k" if side == "k" else "v")
    size = 0.01
    predicted = size**2 * float(metric.diagonal(dim1=-2, dim2=-1).sum())
    tokens = to_tokens(empty, tiny)
    errors = []
    with torch.no_grad():
        exact = forward.teacher_forced(tiny, tokens, [0] * 3, None).double()
        real = tiny.alphabet.real(tokens)
        for seed in range(6):
            noisy = forward.teacher_forced(tiny, tokens, [0] * 3, Noise(layer, side, size, seed)).double()
            errors.append(1 - torch.cosine_similarity(exact, noisy, dim=-1)[real].mean())
    assert predicted == pytest.approx(float(torch.stack(errors).mean()), rel=0.35)


def test_visible_keys_are_causal_but_for_the_prompt() -> None:
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    seen = visible_keys([0, 2], tokens)[:, 0].int().tolist()
    assert seen[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen[1] == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert in_prompt([0, 2], tokens).tolist() == [[False] * 4, [True, True, False, False]]


def test_few_proteins_are_held_back_and_at_least_one(calibration_proteins: list[Protein]) -> None:
    fitted, held = hold_back(calibration_proteins)
    assert len(fitted) + len(held) == len(calibration_proteins)
    assert 0.02 < len(held) / len(calibration_proteins) < 0.12
    assert not {p.sequence for p in fitted} & {p.sequence for p in held}
    fitted, held = hold_back(calibration_proteins[:3])
    assert len(held) >= 1 and len(fitted) + len(held) == 3
    one = calibration_proteins[:1]
    assert hold_back(one) == (one, one)


def test_batches_hold_each_protein_once(tiny: EsmModel, calibration_proteins: list[Protein]) -> None:
    found = [p for batch in batches(calibration_proteins, 1000, tiny.alphabet) for p in batch]
    assert sorted(p.accession for p in found) == sorted(p.accession for p in calibration_proteins)


def test_no_proteins_are_an_error(tiny: EsmModel) -> None:
    with pytest.raises(InputError, match="no proteins"):
        collect(tiny, [])


@pytest.mark.parametrize("number", [1, 20])
def test_each_phase_counts_all_its_proteins(
    number: int, tiny: EsmModel, calibration_proteins: list[Protein]
) -> None:
    promised, counted, costs = dict[str, int](), Counter[str](), list[float]()

    @contextmanager
    def phase(label: str, total: int, cost: float | None = None) -> Iterator[Tick]:
        def tick(done: int = 1, again: bool = False, cost: float | None = None) -> None:
            counted[label] += done
            costs.append(-(cost or 0.0))

        promised[label] = total
        costs.append(cost or 0.0)
        yield tick

    collect(tiny, calibration_proteins[:number], phase=phase)
    assert list(promised) == ["statistics", "sensitivities"]
    assert counted == promised and sum(promised.values()) == max(2, number)
    assert sum(costs) == pytest.approx(0)
