"""`bench` as a help to choose: budgets by --bits, which recipe to take, the model by default, completion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_results import ERROR
from typer.testing import CliRunner

from turboesm_cli.app import app
from turboesm_cli.codec.recipes import parse_recipe
from turboesm_cli.commands import completion
from turboesm_cli.evaluation.recommendation import recommended
from turboesm_cli.models.names import findable, known_shape
from turboesm_cli.models.shapes import OFFICIAL
from turboesm_cli.reporting.results import ResultRow

MEASURED = {"auto@2": (0.006, 2.4), "auto@3": (0.0006, 3.4), "auto@4": (0.0001, 4.4), "fp8": (0.002, 8.0)}


def rows() -> list[ResultRow]:
    found = []
    for name, (error, bits) in MEASURED.items():
        recipe, _, budget = name.partition("@")
        own = replace(ERROR, recipe=recipe, bits_k=float(budget or 8), bits_v=float(budget or 8), family="all")
        found.append(replace(own, protocol="decode", metric="error", value=error))
        found.append(replace(own, protocol="decode", metric="error", value=9.0, accession="P1"))
        for tokens, factor in ((1024, 1.0), (128, 1.3)):
            memory = replace(own, family="", protocol="memory", metric="bits_per_value")
            found.append(replace(memory, value=bits * factor, tokens=tokens))
    return found


def test_the_smallest_that_does_as_well_is_named() -> None:
    recipes = [parse_recipe(name) for name in ("auto@4", "auto@3", "auto@2")]
    said = recommended(rows(), recipes, ["fp8", "int8"], "all", 0.0005)
    assert said == [
        "auto@4 (4.40 bits per value, error 0.0001) is the smallest with an error up to 0.0005",
        "auto@3 (3.40 bits per value, error 0.0006) is the smallest with no more error than fp8 (8.00 bits per "
        "value, error 0.002)",
    ]  # int8 was not measured
    assert recommended(rows(), recipes, [], "all", 1e-9) == ["no recipe measured has an error up to 1e-09"]
    assert recommended([], recipes, ["fp8"], "all", 0.1) == []  # random weights


@pytest.mark.slow
def test_bits_are_swept(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = ["--families", "peptide", "--max-calibration", "8", "--max-proteins", "2", "--model", str(tiny_path)]
    done = CliRunner().invoke(app, ["bench", "--bits", "2, 3", "--peers", " fp8", "--max-error", "0.5", *few])
    assert done.exit_code == 0, done.output
    assert "auto@2 " in done.stdout and "auto@3 " in done.stdout and "paper" not in done.stdout
    assert "auto@2 (" in done.stderr and "is the smallest with an error up to 0.5" in done.stderr
    assert "fp8 (" in done.stderr
    done = CliRunner().invoke(app, ["bench", "--bits", "2,3", "--recipes", "flat@2", "-f", *few])
    assert done.exit_code == 3 and "flat@2 has its own budget" in done.stderr


def test_the_bundles_model_is_found_by_name_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert findable("esm2_t33_650M_UR50D") and findable("IgLM-S") and findable("random_t6_8M")
    assert findable("mine") is None
    (tmp_path / "mine.pt").touch()
    assert findable("mine") == "./mine.pt"
    assert known_shape("random:t6_8M") == known_shape("embedded") == OFFICIAL["esm2_t6_8M_UR50D"]
    assert known_shape("./mine.pt") is None


def test_the_shell_completes_names() -> None:
    assert completion.recipes("flat@2,au") == ["flat@2,auto", "flat@2,auto-coded"]
    assert completion.families("tm,hel") == ["tm,heldout"]
    assert completion.peers("int") == ["int8", "int4"]
    assert "random:esm2_t33_650M" in completion.model("random:esm2_t3")
