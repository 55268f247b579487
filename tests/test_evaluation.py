"""The bench's protocols against the same figures computed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from turboesm_cli.cache.packed import PackedCache, PackedCodec
from turboesm_cli.codec.bundle import Bundle
from turboesm_cli.codec.calibration import bundle_of
from turboesm_cli.codec.fit import without_residual
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.console import Tick
from turboesm_cli.errors import InputError
from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.accuracy import Entry, accuracy, first_layer, memory, refuse_seen, times
from turboesm_cli.evaluation.teacher_forced import DRIFT, compare_decoding, first_layer_cosines
from turboesm_cli.models import forward
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens
from turboesm_cli.statistics.collect import collect


@pytest.fixture(scope="module")
def entries(tiny: EsmModel, calibration_proteins: list[Protein]) -> list[Entry]:
    statistics = collect(tiny, calibration_proteins[:12])
    named = {"paper": RECIPES["paper"], "flat": RECIPES["flat"]}
    return [
        Entry(name, bundle_of(tiny, calibration_proteins[:12], statistics, recipe))
        for name, recipe in named.items()
    ]


def test_decode_protocol_is_decoding_from_an_empty_cache(
    tiny: EsmModel, entries: list[Entry], peptides: list[Protein]
) -> None:
    spec = entries[1].spec
    results = {
        r.protein.accession: r
        for n, r in compare_decoding(tiny, peptides[:3], {"flat": PackedCodec(spec, torch.device("cpu"))})
        if n == "flat"
    }
    for protein in peptides[:3]:
        tokens = to_tokens([protein], tiny)
        with torch.no_grad():
            packed = forward.replay(tiny, tokens, PackedCache(tiny, spec, 1, tokens.shape[1]))
            exact = forward.teacher_forced(tiny, tokens, [0], None)
        expected = metrics.cosines(exact, packed)[0]
        assert torch.allclose(results[protein.accession].cosines, expected, atol=1e-5)
        predictions = results[protein.accession].predictions
        assert predictions is not None and len(predictions.kl) == amino_acids(protein)


def amino_acids(protein: Protein) -> int:
    """Residues that are one of the 20."""
    return sum(protein.sequence.count(letter) for letter in "ACDEFGHIKLMNPQRSTVWY")


def test_predictions_are_of_residues_that_were_not_seen(
    tiny: EsmModel, entries: list[Entry], peptides: list[Protein]
) -> None:
    """By the definition: a mask over the cache of what came before, softmax over 20 amino acids."""
    protein = replace(peptides[0], sequence="MKXV" + peptides[0].sequence[:9])
    (result,) = [r for n, r in compare_decoding(tiny, [protein], {}) if n == DRIFT]
    assert result.predictions is None  # ESM-2 on the whole protein has seen every residue
    codec = PackedCodec(entries[1].spec, torch.device("cpu"))
    (result,) = [r for n, r in compare_decoding(tiny, [protein], {"flat": codec}) if n == "flat"]
    predictions = result.predictions
    assert predictions is not None and len(predictions.kl) == amino_acids(protein) == protein.residues - 1
    tokens = to_tokens([protein], tiny)
    with torch.no_grad():
        masks = forward.teacher_forced_with_masks(tiny, tokens, [0], None)[1][0]
        logits = tiny.logits(masks)
    places = [at for at, letter in enumerate(protein.sequence, 1) if letter != "X"]
    order = [ESM2_ALPHABET.vocabulary.index(letter) for letter in "ACDEFGHIKLMNPQRSTVWY"]
    expected = [float(logits[at, order].log_softmax(-1)[order.index(int(tokens[0, at]))]) for at in places]
    assert torch.allclose(predictions.reference_log_p, torch.tensor(expected).double(), atol=1e-5)


def test_layer_errors_are_those_of_the_attention_output(
    tiny: EsmModel, entries: list[Entry], peptides: list[Protein]
) -> None:
    codec = PackedCodec(entries[1].spec, torch.device("cpu"))
    (result,) = [r for n, r in compare_decoding(tiny, peptides[:1], {"flat": codec}) if n == "flat"]
    tokens = to_tokens(peptides[:1], tiny)
    outputs: dict[str, list[torch.Tensor]] = {"exact": [], "packed": []}
    with torch.no_grad():
        forward.teacher_forced(tiny, tokens, [0], None, outputs["exact"].append)
        forward.teacher_forced(tiny, tokens, [0], codec, outputs["packed"].append)
    assert result.layers is not None and len(result.layers) == 2
    for (error, norm), exact, packed in zip(result.layers, outputs["exact"], outputs["packed"], strict=True):
        assert float(error) == pytest.approx(float((exact - packed).square().sum()), rel=1e-4)
        assert float(norm) == pytest.approx(float(exact.square().sum()), rel=1e-4)
    assert result.layers[0, 0] < result.layers[1, 0]  # errors add up on their way


def test_rows_of_all_are_the_tokens_of_all_families(
    tiny: EsmModel, entries: list[Entry], peptides: list[Protein]
) -> None:
    families = {"a": peptides[:2], "b": peptides[2:5]}
    done, costs = list[int](), list[float]()

    @contextmanager
    def phase(label: str, total: int, cost: float | None = None) -> Iterator[Tick]:
        assert (label, total) == ("decoding", 5 * 3)  # two recipes and the drift
        costs.append(cost or 0.0)
        yield tick

    def tick(done_now: int = 1, again: bool = False, cost: float | None = None) -> None:
        done.append(done_now)
        costs.append(-(cost or 0.0))

    rows = list(accuracy(tiny, entries, families, phase))
    assert sum(done) == 5 * 3 and sum(costs) == pytest.approx(0)

    def value(family: str, metric: str, protocol: str = "decode") -> tuple[float, int]:
        found = [
            r for r in rows if (r.recipe, r.family, r.metric, r.protocol) == ("flat", family, metric, protocol)
        ]
        (row,) = [r for r in found if not r.accession]
        return row.value, row.n

    (a, n_a), (b, n_b), (both, n) = (value(f, "cosine_mean") for f in ("a", "b", "all"))
    assert n == n_a + n_b == sum(p.residues + 2 for p in peptides[:5])
    assert both == pytest.approx((a * n_a + b * n_b) / n)
    assert value("all", "error")[0] == pytest.approx(1 - both)
    assert len({r.accession for r in rows if r.accession}) == 5


def test_paper_protocol_leaves_the_residual_out(
    tiny: EsmModel, entries: list[Entry], peptides: list[Protein]
) -> None:
    layer = entries[0].spec.layers[0]
    assert layer is not None
    three_bits = without_residual(layer.k)
    assert three_bits.levels[0].unique().numel() <= 8 + 1
    found = list(first_layer_cosines(tiny, peptides[:3], entries[0].spec))
    assert sum(len(part.joined) for part in found) == sum(p.residues + 2 for p in peptides[:3])
    assert sum(len(part.heads) for part in found) == 2 * sum(p.residues + 2 for p in peptides[:3])
    rows = list(first_layer(tiny, entries, {"a": peptides[:3]}))
    assert {row.protocol for row in rows} == {"paper", "paper_heads"}


def test_memory_rows_count_every_byte(tiny: EsmModel, entries: list[Entry]) -> None:
    rows = [row for row in memory(tiny, entries) if row.tokens == 1024]
    held = {(row.recipe, row.metric): row.value for row in rows}
    assert held["flat", "bytes"] == entries[1].spec.size.sequence_bytes(1024)
    assert held["flat", "bits_per_value"] == pytest.approx(8 * held["flat", "bytes"] / (2 * 2 * 2 * 16 * 1024))
    assert held["flat", "ratio_fp16"] * 2 == pytest.approx(held["flat", "ratio_fp32"])
    assert held["fp16", "ratio_fp32"] == 2


def test_time_rows_name_their_spread(tiny: EsmModel, entries: list[Entry]) -> None:
    rows = list(times(tiny, entries, repeats=3))
    assert [row.recipe for row in rows] == ["fp32", "fp16", "paper", "flat"]
    assert all(row.p20 is not None and row.p80 is not None and row.p20 <= row.value <= row.p80 for row in rows)


def test_seen_proteins_are_refused(entries: list[Entry], calibration_proteins: list[Protein]) -> None:
    with pytest.raises(InputError, match="calibration set of paper"):
        refuse_seen(entries, {"x": calibration_proteins[:1]})
    clean: Bundle = entries[0].bundle
    refuse_seen([replace(entries[0], bundle=clean)], {"x": calibration_proteins[100:101]})
