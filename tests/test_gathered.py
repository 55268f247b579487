"""Several result files in one report: combined where that is exact, else refused or left out, and told."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from turboesm_cli.app import app
from turboesm_cli.errors import InputError
from turboesm_cli.reporting.grouping import gathered
from turboesm_cli.reporting.results import ResultRow, csv_rows, read_csv, write_csv

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = str(ROOT / "data" / "calibration" / "calibration.fasta")
SEQUENCES = [
    "MKWVTFISLLFLFSSAYSRGVFRRDAHKSEVAHRFKDLGE",
    "MTEYKLVVVGAGGVGKSALTIQLIQNHFVDEYDPTIEDSY",
    "MSDNGPQNQRNAPRITFGGPSDSTGSNQNGERSGARSKQR",
    "MAHHHHHHVDDDDKMLEEKVKALEAQNRQLKQENDELRAKLA",
]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fasta(path: Path, sequences: list[str], first: int = 0) -> Path:
    path.write_text("".join(f">p{first + i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    return path


@pytest.fixture(scope="module")
def bundle(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gathered") / "flat.tqz"
    done = invoke("calibrate", tiny_path, CALIBRATION, "--max-proteins", "8", "--recipe", "flat", "-o", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def decode(tiny_path: Path, bundle: Path) -> Callable[..., Path]:
    def run(source: Path, output: Path, *more: str) -> Path:
        done = invoke("decode", bundle, source, "--model", tiny_path, "-o", output, *more)
        assert done.exit_code == 0, done.output
        return output

    return run


def of_all(path: Path) -> dict[tuple[str, str], ResultRow]:
    """The rows that are about no single protein, by protocol and metric."""
    return {(row.protocol, row.metric): row for row in csv_rows(path) if not row.accession}


def test_parts_of_a_file_report_what_the_whole_file_does(decode: Callable[..., Path], tmp_path: Path) -> None:
    whole = decode(fasta(tmp_path / "whole.fasta", SEQUENCES), tmp_path / "whole.csv")
    parts = [
        decode(fasta(tmp_path / f"{at}.fasta", SEQUENCES[at : at + 2], at), tmp_path / f"{at}.csv")
        for at in (0, 2)
    ]
    rows = [row for part in parts for row in csv_rows(part)]
    found = gathered(rows)
    expected = of_all(whole)
    together = {(row.protocol, row.metric): row for row in found.rows if not row.accession}
    assert {metric for _, metric in expected.keys() - together.keys()} == {"cosine_p05", "residue_kl_p95"}
    for key, row in together.items():
        assert row.n == expected[key].n
        assert row.value == pytest.approx(expected[key].value, rel=1e-6), key
    assert set(found.left_out) == {"cosine_p05", "residue_kl_p95"}
    assert {row.accession for row in found.rows} == {"", "p0", "p1", "p2", "p3"}
    page = tmp_path / "report.md"
    done = invoke("report", *parts, "-o", page)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "Combined: " in text and "Left out: cosine_p05, residue_kl_p95" in text
    assert "Measured again" not in text


def test_the_same_proteins_again_are_told(decode: Callable[..., Path], tmp_path: Path) -> None:
    source = fasta(tmp_path / "a.fasta", SEQUENCES[:2])
    first = decode(source, tmp_path / "a.csv")
    second = tmp_path / "b.csv"
    write_csv(second, [replace(row, value=row.value * 0.5) for row in csv_rows(first)])
    done = invoke("report", first, second, "-o", tmp_path / "report.md")
    assert done.exit_code == 0, done.output
    assert "Measured again" in (tmp_path / "report.md").read_text()


def test_other_prompts_are_refused(decode: Callable[..., Path], tmp_path: Path) -> None:
    source = fasta(tmp_path / "a.fasta", SEQUENCES[:2])
    parts = [decode(source, tmp_path / f"{prompt}.csv", "--prompt", prompt) for prompt in ("0.5", "3")]
    assert {row.prompt for part in parts for row in csv_rows(part)} == {"0.5", "3"}
    page = tmp_path / "report.html"
    elsewhere = tmp_path / "elsewhere.csv"
    write_csv(elsewhere, [replace(row, device="another", recipe="flat") for row in csv_rows(parts[1])])
    for second in (parts[1], elsewhere):
        done = invoke("report", parts[0], second, "-o", page)
        assert done.exit_code == 3 and not page.exists()
        assert "was decoded after other prompts (0.5, 3)" in done.stderr and "report them apart" in done.stderr


def test_a_protein_in_two_files_is_refused(decode: Callable[..., Path], tmp_path: Path) -> None:
    parts = [
        decode(fasta(tmp_path / f"{count}.fasta", SEQUENCES[:count]), tmp_path / f"{count}.csv")
        for count in (1, 2)
    ]
    done = invoke("report", *parts, "-o", tmp_path / "report.html")
    assert done.exit_code == 3
    assert "p0 is among the proteins of several" in done.stderr


def test_files_that_do_not_say_their_proteins(decode: Callable[..., Path], tmp_path: Path) -> None:
    """As turboesm wrote them before: told apart by how many tokens are behind a figure."""
    parts = []
    for at, count in ((0, 1), (1, 2)):
        made = decode(fasta(tmp_path / f"{at}.fasta", SEQUENCES[at : at + count], at), tmp_path / f"{at}.csv")
        with made.open() as stream:
            rows = list(csv.DictReader(stream))
        old = tmp_path / f"old{at}.csv"
        with old.open("w") as stream:
            writer = csv.DictWriter(stream, [name for name in rows[0] if name not in ("inputs", "prompt")])
            writer.writeheader()
            writer.writerows({name: row[name] for name in writer.fieldnames} for row in rows)
        parts.append(old)
    assert len(read_csv([parts[0]]))
    done = invoke("report", *parts, "-o", tmp_path / "report.html")
    assert done.exit_code == 3
    assert "other proteins, and not all say on which" in done.stderr
    assert invoke("report", parts[0], parts[0], "-o", tmp_path / "twice.html").exit_code == 0


ROW = ResultRow(
    "m", "flat", 3, 3, "tm", "decode", "error", 0.1, "1", 10, "cpu", "float32", 0, "0.1.0", "", inputs="a"
)


def test_figures_by_hand() -> None:
    def of(metric: str, *values: tuple[float, int]) -> float:
        rows = [replace(ROW, metric=metric, value=v, n=n, inputs=f"i{k}") for k, (v, n) in enumerate(values)]
        (found,) = gathered(rows).rows
        assert found.n == sum(n for _, n in values)
        return found.value

    assert of("error", (0.1, 10), (0.4, 30)) == pytest.approx(0.325)
    assert of("cosine_min", (0.1, 10), (0.4, 30)) == 0.1
    assert of("residue_perplexity", (4.0, 10), (16.0, 10)) == pytest.approx(8.0)
    assert of("residue_kl_mean", (1.0, 1), (4.0, 2)) == pytest.approx(3.0)


@pytest.mark.parametrize("metric, value, n", [("error", 0.1, 0), ("residue_perplexity", 0.0, 5)])
def test_numbers_that_cannot_be_combined_are_refused(metric: str, value: float, n: int) -> None:
    with pytest.raises(InputError, match="cannot be combined"):
        gathered([replace(ROW, metric=metric, value=value, n=n, inputs=name) for name in "ab"])


def test_codecs_of_other_calibration_sets_are_not_combined() -> None:
    other = replace(ROW, inputs="b", calibration="2")
    assert gathered([ROW, other]).combined == 1
    with pytest.raises(InputError, match="other calibration sets"):
        gathered([replace(ROW, calibration="1"), other])


def test_a_family_in_several_files_counts_once_in_all() -> None:
    def family(name: str, value: float, n: int, inputs: str) -> ResultRow:
        return replace(ROW, family=name, value=value, n=n, inputs=inputs)

    first = [family("tm", 0.1, 10, "t"), family("idr", 0.2, 10, "i"), family("all", 0.15, 20, "ti")]
    second = [family("tm", 0.1, 10, "t"), family("peptide", 0.6, 10, "p"), family("all", 0.35, 20, "tp")]
    found = {row.family: row for row in gathered(first + second).rows}
    assert set(found) == {"tm", "idr", "peptide", "all"}
    assert found["all"].n == 30 and found["all"].value == pytest.approx(0.3)


def test_subsets_of_an_ablation_are_figures_of_their_own() -> None:
    rows = [replace(ROW, protocol="ablation", seed=seed, value=seed / 10) for seed in range(3)]
    assert gathered(rows).rows == rows


def test_metrics_that_saw_the_answer_are_left_out() -> None:
    found = gathered([replace(ROW, metric="top1_agreement"), ROW])
    assert found.rows == [ROW] and found.left_out == ["top1_agreement"]


def test_timings_and_bytes_depend_on_no_proteins() -> None:
    rows = [
        replace(ROW, protocol="time", metric="us_per_token", value=v, n=n, inputs="") for v, n in ((1, 3), (2, 9))
    ]
    found = gathered(rows)
    assert found.rows == [rows[1]] and found.again == 1


def test_unknown_inputs_of_other_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="not all say on which"):
        gathered([ROW, replace(ROW, n=11, inputs="")])
    assert math.isclose(gathered([replace(ROW, inputs=""), replace(ROW, value=0.2, inputs="")]).rows[0].value, 0.2)
