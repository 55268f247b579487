"""Predictions may not see what they predict: through the real commands, random sequences are not predicted."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from turboesm_cli.app import app
from turboesm_cli.models import forward
from turboesm_cli.models.loading import load_model
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens

pytestmark = pytest.mark.slow

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
CHANCE = 17.0
"""Of uniformly random residues nobody has a perplexity below 20 in the long run; some 300 leave 15 %."""


def random_sequences() -> list[str]:
    draws = random.Random(3)
    return ["".join(draws.choices(LETTERS, k=100)) for _ in range(3)]


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "random.fasta"
    path.write_text("".join(f">r{i}\n{sequence}\n" for i, sequence in enumerate(random_sequences())))
    return path


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[..., Path]) -> Path:
    """A model whose layers add nothing to the embedding: its head names the token that was fed."""
    path = save_tiny_model(tmp_path_factory.mktemp("models") / "copying.pt")
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        data = torch.load(path, weights_only=True)
    state = data["model"]
    for name, tensor in state.items():
        if "out_proj" in name or "fc2" in name:
            tensor.zero_()
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 3)
        elif name.endswith("lm_head.dense.weight"):
            tensor.copy_(torch.eye(len(tensor)))
    torch.save(data, path)
    return path


def residue_figures(arguments: list[str]) -> dict[str, float]:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    return {
        row["metric"]: row["value"]
        for row in rows
        if row["metric"].startswith("residue_") and not row["accession"]
    }


def calibrated(model: Path, folder: Path, recipe: str = "flat") -> Path:
    root = Path(__file__).resolve().parents[1]
    bundle = folder / "bundle.tqz"
    calibration = root / "data" / "calibration" / "calibration.fasta"
    arguments = [
        "calibrate",
        str(model),
        str(calibration),
        "--max-proteins",
        "8",
        "--recipe",
        recipe,
        "-o",
        str(bundle),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return bundle


def test_a_model_that_copies_predicts_nothing(copying: Path, fasta: Path, tmp_path: Path) -> None:
    model = load_model(str(copying), "cpu")
    tokens = to_tokens([Protein("r", "", random_sequences()[0])], model)
    with torch.no_grad():
        seen = model.logits(forward.teacher_forced(model, tokens, [0], None))[0, 1:-1]
    assert seen.argmax(-1).eq(tokens[0, 1:-1]).all()  # the head at a residue that was fed
    bundle = calibrated(copying, tmp_path)
    figures = residue_figures(["decode", str(bundle), str(fasta), "--model", str(copying), "--json"])
    assert figures["residue_perplexity_fp32"] >= CHANCE and figures["residue_perplexity"] >= CHANCE


@pytest.mark.parametrize("name", ["esm2_t6_8M_refit", "esm2_t8_25M_hd64.pt"])
def test_random_sequences_are_not_predicted(
    checkpoint_path: Callable[[str], Path], fasta: Path, tmp_path: Path, name: str
) -> None:
    model = checkpoint_path(name)
    bundle = calibrated(model, tmp_path, "waterfill")  # whose codes are looked up, which is faster
    arguments = ["decode", str(bundle), str(fasta), "--model", str(model), "--prompt", "1", "--json"]
    figures = residue_figures(arguments)
    assert figures["residue_perplexity_fp32"] >= CHANCE and figures["residue_perplexity"] >= CHANCE


def test_bench_predicts_as_decode_does(copying: Path, fasta: Path, tmp_path: Path) -> None:
    bundle, figures = calibrated(copying, tmp_path), tmp_path / "bench.csv"
    arguments = [
        "bench",
        "--bundle",
        str(bundle),
        "--families",
        str(fasta),
        "--model",
        str(copying),
        "--max-proteins",
        "2",
    ]
    done = CliRunner().invoke(app, [*arguments, "-o", str(figures)])
    assert done.exit_code == 0, done.output
    with figures.open() as stream:
        figures_of_all = (row for row in csv.DictReader(stream) if not row["accession"])
        rows = [row for row in figures_of_all if row["metric"].startswith("residue_perplexity")]
    found = {row["metric"]: float(row["value"]) for row in rows}
    assert found["residue_perplexity"] >= CHANCE and found["residue_perplexity_fp32"] >= CHANCE
    assert {row["protocol"] for row in rows} == {"decode"}  # of the drift there is none
    assert {int(row["n"]) for row in rows} == {200}
