"""Choosing bits: what budgets are predicted to cost, the smallest that will do, and how that is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import turboesm
from typer.testing import CliRunner, Result

from turboesm_cli.app import app
from turboesm_cli.cache.packed import PackedCodec
from turboesm_cli.codec.bundle import read_bundle
from turboesm_cli.codec.recipes import RECIPES, parse_recipe
from turboesm_cli.errors import InputError
from turboesm_cli.evaluation import frontier
from turboesm_cli.evaluation.frontier import Point, budgets_of, estimate, half_fitted, smallest
from turboesm_cli.evaluation.teacher_forced import compare_decoding
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.reporting.recipe_names import RECIPE_NAMES, typed
from turboesm_cli.sequences.fasta import Protein, read_fasta, write_fasta
from turboesm_cli.statistics.collect import collect

DATA = Path(__file__).parents[1] / "data"
CALIBRATION = str(DATA / "calibration" / "calibration.fasta")


def test_an_estimate_by_hand() -> None:
    found = estimate([torch.tensor([0.1, 0.3]).double(), torch.tensor([0.5, 0.5, 0.5, 0.5]).double()])
    assert found.mean == pytest.approx(2.4 / 6) and found.proteins == 2
    residuals = (0.4 - 2 * 0.4, 2.0 - 4 * 0.4)
    assert found.error == pytest.approx(math.sqrt(2 * sum(x * x for x in residuals)) / 6)
    assert (found.lowest, found.highest) == pytest.approx((0.2, 0.5))
    assert found.bound == found.mean + found.error
    assert estimate([torch.tensor([0.1]).double()]).bound == pytest.approx(0.2)  # one says nothing of others


def test_budgets_are_those_that_a_recipe_takes() -> None:
    assert [recipe.typed for recipe in budgets_of(RECIPES["auto"])] == [
        "auto@2", "auto@2.5", "auto@3", "auto@3.5", "auto@4"
    ]  # fmt: skip
    assert [recipe.typed for recipe in budgets_of(RECIPES["paper"])] == [
        "paper@2", "paper@3", "paper@4/3", "paper@4"
    ]  # fmt: skip
    assert all(parse_recipe(typed(*bits)).typed == typed(*bits) for bits in [("auto", 3, 3), ("flat", 2.5, 4)])


def test_reports_know_the_names_of_recipes() -> None:
    assert set(RECIPE_NAMES) == set(RECIPES)


def test_bounds_are_for_programs_too(tiny: EsmModel, calibration_proteins: list[Protein]) -> None:
    few = calibration_proteins[:12]
    bundle = turboesm.calibrate(tiny, few, "flat", max_error=0.9)
    assert bundle.spec.recipe.typed == "flat@2" and bundle.calibration.proteins == 12
    with pytest.raises(InputError, match="max_error and max_kl choose"):
        turboesm.calibrate(tiny, few, "flat@3", max_kl=0.1)


@pytest.fixture(scope="module")
def points(tiny: EsmModel, calibration_proteins: list[Protein]) -> list[Point]:
    few = calibration_proteins[:60]
    return frontier.frontier(tiny, few, collect(tiny, few), budgets_of(RECIPES["auto"])[::2])


def test_more_bits_cost_less_and_what_is_predicted_is_what_decoding_costs(
    tiny: EsmModel, points: list[Point], calibration_proteins: list[Protein]
) -> None:
    assert [point.recipe.bits_k for point in points] == [2, 3, 4]
    assert points[0].error.mean > 2 * points[1].error.mean > 4 * points[2].error.mean > 0
    assert points[0].kl and points[2].kl and points[0].kl.mean > points[2].kl.mean > 0
    assert [point.nbytes for point in points] == sorted(point.nbytes for point in points)
    held = frontier.held_proteins(calibration_proteins[:60])
    codec = {"": PackedCodec(points[1].bundle.spec, tiny.device)}
    errors = torch.cat([1 - found.cosines for _, found in compare_decoding(tiny, held, codec, drift=False)])
    assert float(errors.mean()) == pytest.approx(points[1].error.mean, rel=1e-9)
    assert len(held) == points[1].error.proteins


def test_the_smallest_that_holds_is_taken(points: list[Point]) -> None:
    for point in points:
        assert smallest(points, point.error.bound, None) is point
    assert smallest(points, 1.0, None) is points[0]
    assert points[1].kl is not None
    assert smallest(points, 1.0, points[1].kl.bound) is points[1]
    with pytest.raises(InputError, match=r"--max-error 1e-12: no budget .* the best, auto@4"):
        smallest(points, 1e-12, None)


def test_half_of_the_proteins_are_tried_where_that_tells_something(
    tiny: EsmModel, points: list[Point], calibration_proteins: list[Protein]
) -> None:
    assert half_fitted(tiny, calibration_proteins[:1], points[0]) is None
    few = calibration_proteins[:125]
    half = half_fitted(tiny, few, points[0])
    assert half is not None and half.error.proteins == len(frontier.held_proteins(few)) >= 4
    assert half.bundle.calibration.proteins < 0.6 * len(few)


@pytest.fixture
def run(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*more: str, source: str = CALIBRATION) -> Result:
        return CliRunner().invoke(app, ["calibrate", str(tiny_path), source, "-f", "-o", "out.tqz", *more])

    return call


def test_the_command_chooses_and_says_what_it_predicts(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("--max-proteins", "30", "--frontier", "--max-error", "0.001", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    budgets = {each["recipe"]: each for each in found["budgets"]}
    chosen = budgets[found["recipe"]]
    assert chosen["error"]["predicted"] <= 0.001
    smaller = [each for each in budgets.values() if each["bytes_per_sequence"] < chosen["bytes_per_sequence"]]
    assert smaller and all(each["error"]["predicted"] > 0.001 for each in smaller)
    bundle = read_bundle(tmp_path / "out.tqz")
    assert bundle.spec.recipe.typed == found["recipe"]
    assert f"{found['recipe']} takes {chosen['bits_per_value']:.2f} bits per value" in done.stderr
    assert f"predicted error {chosen['error']['predicted']:.3g}" in done.stderr
    assert "3 proteins held back (73 to 322 residues), and may be far off" in done.stderr
    by_choice = (tmp_path / "out.tqz").read_bytes()
    plain = run("--max-proteins", "30", "--bits", found["recipe"].partition("@")[2])
    assert plain.exit_code == 0 and (tmp_path / "out.tqz").read_bytes() == by_choice


def test_a_bound_that_nothing_holds_is_refused_and_nothing_written(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    done = run("--max-proteins", "12", "--recipe", "flat", "--frontier", "--max-kl", "1e-9")
    assert done.exit_code == 3 and "no budget is predicted to hold it" in done.stderr
    assert not (tmp_path / "out.tqz").exists()
    assert run("--max-error", "0.1", "--bits", "3").exit_code == 2
    assert run("--max-error", "0.1", "--recipe", "auto@3").exit_code == 2


def test_too_few_tokens_are_refused_before_the_pass(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "one.fasta").write_text(">a\nMKTAYIAKQR\n")
    done = run(source="one.fasta")
    assert done.exit_code == 3 and "12 tokens are too few" in done.stderr
    assert "give at least 256 residues" in done.stderr and "statistics" not in done.stderr


def test_few_proteins_are_a_warning_with_numbers(run: Callable[..., Result]) -> None:
    done = run("--max-proteins", "12", "--recipe", "flat")
    assert "warning: 12 proteins and 4,293 tokens are few" in done.stderr and "give 32 proteins" in done.stderr


def test_one_protein_is_not_two(run: Callable[..., Result], tmp_path: Path) -> None:
    longest = max(read_fasta(CALIBRATION), key=lambda protein: protein.residues)
    write_fasta(tmp_path / "one.fasta", [longest])
    done = run(source="one.fasta")
    assert done.exit_code == 0, done.output
    assert "statistics: 1 of 1" in done.stderr and "2 of 1" not in done.stderr
    assert "1 protein, " in done.stderr


@pytest.mark.slow
def test_prediction_holds_on_other_proteins(embedded: EsmModel, calibration_proteins: list[Protein]) -> None:
    proteins = [protein for protein in calibration_proteins if protein.residues <= 110][:45]
    [point] = frontier.frontier(embedded, proteins, collect(embedded, proteins), [RECIPES["auto"]])
    others = [protein for protein in read_fasta(DATA / "heldout" / "bacteria.fasta") if protein.residues <= 130]
    codec = {"": PackedCodec(point.bundle.spec, embedded.device)}
    found = [1 - each.cosines for _, each in compare_decoding(embedded, others[:6], codec, drift=False)]
    assert 0.3 < estimate(found).mean / point.error.bound < 1.5
