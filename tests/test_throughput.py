"""`bench throughput`: what it derives from what it measures, and the command on a tiny model."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Done, run_forked

from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.codec.bundle import write_bundle
from turboesm_cli.codec.calibration import calibrate
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.engine.batch import Graph, Stepper
from turboesm_cli.engine.memory_plan import KINDS
from turboesm_cli.evaluation import crossover, throughput, timing
from turboesm_cli.evaluation.crossover import Crossover, crossovers
from turboesm_cli.evaluation.throughput import Kind, Load, Throughput
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.sequences.fasta import Protein


def made(kind: Kind, batch: int, context: int, us: float, first: float = 1.0) -> Throughput:
    prefilling = timing.Timing(first, first / 2, first * 2, 3)
    return Throughput(kind, Load(batch, context), timing.Timing(us, us, us, 5), prefilling, 10, 20, 30)


@pytest.fixture
def kinds(specs: dict[str, CodecSpec]) -> tuple[Kind, Kind]:
    return Kind.of("fp16", specs["auto"]), Kind.of("packed", specs["auto"])


def test_crossovers(kinds: tuple[Kind, Kind]) -> None:
    fp16, packed = kinds
    found = [made(fp16, batch, 64, 100) for batch in (1, 4, 16)]
    found += [
        made(packed, batch, 64, us) for batch, us in ((1, 200), (4, 100 / 0.75), (16, 80))
    ]  # 0.5, 0.75, 1.25
    (crossing,) = crossovers(found)
    assert (crossing.kind, crossing.along, crossing.at) == (packed, "batch", 64)
    assert crossing.value == pytest.approx(8.0)  # half the way from 4 to 16 in the logarithm
    assert "from batch 8.0 on" in crossing.sentence
    never = [made(fp16, 1, n, 100) for n in (8, 16)] + [made(packed, 1, n, 150) for n in (8, 16)]
    assert crossovers(never) == [Crossover(packed, "context", 1, math.inf)]
    always = [made(fp16, 1, n, 100) for n in (8, 16)] + [made(packed, 1, n, 50) for n in (8, 16)]
    assert crossovers(always)[0].value == 0.0


def test_rows(tiny: EsmModel, kinds: tuple[Kind, Kind]) -> None:
    fp16, packed = kinds
    found = [made(fp16, 8, 64, 100, 6e6), made(packed, 8, 64, 40, 3e6), made(packed, 16, 64, 40)]
    rows = crossover.rows(tiny, found, [made(packed, 33, 64, 1)])
    figures = {(row.recipe, row.family, row.metric): row.value for row in rows}
    assert figures["auto", "batch 8", "tokens_per_second"] == pytest.approx(8 / 40e-6)
    assert figures["auto", "batch 8", "tokens_per_second_over_fp16"] == pytest.approx(2.5)
    assert figures["auto", "batch 8", "first_token_over_fp16"] == pytest.approx(0.5)
    (first,) = (row for row in rows if (row.recipe, row.family, row.metric) == ("auto", "batch 8", "first_token"))
    assert (first.value, first.unit, first.p20, first.p80, first.n) == (3.0, "s", 1.5, 6.0, 3)
    assert ("auto", "batch 16", "tokens_per_second_over_fp16") not in figures
    assert figures["auto", "batch 33", "largest_batch"] == 33
    assert {row.tokens for row in rows} == {64} and {row.protocol for row in rows} == {"throughput"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Whatever is measured takes as long as it is told to."""

    def set_to(microseconds: float) -> None:
        def once(call: Callable[[], object], device: torch.device) -> float:
            call()
            return microseconds

        monkeypatch.setattr(timing, "once", once)

    return set_to


@pytest.mark.parametrize("form", KINDS)
def test_measuring(tiny: EsmModel, specs: dict[str, CodecSpec], form: str, clock: Callable[[float], None]) -> None:
    kind = Kind.of(form, specs["auto"])
    clock(1e5)
    found = throughput.measure(tiny, kind, Load(3, 24), repeats=2, prefills=1)
    assert found.held == 3 * kind.nbytes(24)
    assert found.step == found.first_token == timing.Timing(1e5, 1e5, 1e5, 2)


@pytest.mark.parametrize(("took", "prefills"), [(1e5, 10), (1e4, 20), (6e5, 3), (5e6, 3)])
def test_quick_prefills_are_repeated(
    tiny: EsmModel, kinds: tuple[Kind, Kind], clock: Callable[[float], None], took: float, prefills: int
) -> None:
    clock(took)
    found = throughput.measure(tiny, kinds[0], Load(2, 8))
    assert found.first_token == timing.Timing(took, took, took, prefills)


@pytest.mark.parametrize(("fixed", "each", "memory", "planned"), [(100, 7, 1000, 60), (100, 7, 1000, 200)])
def test_the_largest_batch_is_found_from_either_side(
    tiny: EsmModel, kinds: tuple[Kind, Kind], monkeypatch: pytest.MonkeyPatch, fixed: int, each: int,
    memory: int, planned: int,
) -> None:  # fmt: skip
    tried = []

    def measure(model: EsmModel, kind: Kind, load: Load, repeats: int, prefills: int) -> Throughput:
        tried.append(load.batch)
        if load.batch > 160:
            raise torch.OutOfMemoryError("injected")
        peak = fixed + each * load.batch
        return Throughput(kind, load, timing.Timing(1, 1, 1, 5), 1.0, peak, peak, 1)

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput, "peak_memory", lambda device: fixed)
    best = throughput.largest_batch(tiny, kinds[1], 64, memory, planned)
    assert best is not None and best.load.batch == (memory - fixed) // each
    assert len(tried) <= throughput.TRIES
    assert throughput.largest_batch(tiny, kinds[1], 64, fixed, planned) is None


def test_loads_that_do_not_fit_are_named(tiny: EsmModel, kinds: tuple[Kind, Kind]) -> None:
    skipped: list[str] = []
    assert list(throughput.sweep(tiny, list(kinds), [Load(2, 24)], 10, skipped.append)) == []
    assert [text.split(",")[0] for text in skipped] == ["fp16", "auto@3"]


def test_a_step_without_a_gpu_is_no_graph(tiny: EsmModel) -> None:
    cache = DenseCache(tiny, 2, 8, FORMATS["fp32"])
    stepper, calls = Stepper(tiny, cache), []
    graph = Graph(lambda: calls.append(stepper.step(torch.tensor([5, 6]))), cache, 0)
    with torch.no_grad():
        for _ in range(4):
            graph()
    assert len(calls) == cache.length == 4


@pytest.mark.slow
def test_the_command(tiny: EsmModel, tiny_path: Path, calibration_proteins: list[Protein], tmp_path: Path) -> None:
    write_bundle(tmp_path / "t.tqz", calibrate(tiny, calibration_proteins[:12], RECIPES["flat"]))
    command = ["bench", "throughput", "--bundle", "t.tqz", "--context", "24,32", "--device", "cpu"]

    def call(*more: str) -> Done:
        return run_forked(*command, *more, cwd=tmp_path, env=os.environ | {"COLUMNS": "220"})

    planned = call("--plan", "--json", "--memory", "1GiB")
    assert {line["memory"] for line in json.loads(planned.stdout)} == {2**30}
    assert {line["context"] for line in json.loads(planned.stdout)} == {24, 32}
    measured = ("--kinds", "fp16,packed", "--batch", "1,2", "--dtype", "bf16", "-o", "t.csv")
    done = call(*measured, "--model", str(tiny_path))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    speeds = [row for row in rows if row["metric"] == "tokens_per_second"]
    assert {(row["family"], row["tokens"], row["recipe"]) for row in speeds} == {
        (f"batch {batch}", tokens, recipe)
        for batch in (1, 2) for tokens in ("24", "32") for recipe in ("fp16", "flat")
    }  # fmt: skip
    assert "first token" in done.stdout and "flat@3" in done.stdout and "than fp16" in done.stderr
    refused = call("--kinds", "fp12", "-o", "u.csv")
    assert refused.returncode == 3 and "fp12" in refused.stderr
    refused = call("--batch", "0", "-o", "u.csv")
    assert refused.returncode == 3
