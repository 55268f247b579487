"""`--shard` and `turboesm merge`: split and joined, the bytes of what never was; what does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from turboesm_cli.app import app
from turboesm_cli.codec.bundle import read_bundle
from turboesm_cli.evaluation.streaming import ExactSum
from turboesm_cli.outputs.shard_records import record_of
from turboesm_cli.outputs.shards import Shard, parse_shard, part_of
from turboesm_cli.reporting.results import csv_rows

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = ROOT / "data" / "calibration" / "calibration.fasta"
FASTA = """>a first
MKTAYIAKQRQISFVKSHFSRQ
>b
GIGKFLHS
>a again
MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILS
>no residues at all
>c d
FLPLIGRVLSGIL
>b again
GIGKFLHSAKKF
>beyond the limit
MMMMMMMM
"""
"""Names that are there twice, and a record that is skipped."""
LIMIT = ("--max-proteins", "5")
SHARDS = 6
"""More than there are proteins: one is empty."""

sizes = st.lists(st.integers(0, 2000), max_size=60)


@given(sizes, st.integers(1, 70))
def test_every_item_is_in_one_shard_and_shards_are_alike(sizes: list[int], of: int) -> None:
    parts = [part_of(sizes, Shard(index, of)) for index in range(of)]
    assert [number for part in parts for number in part] == list(range(len(sizes)))
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    mean, most = sum(sizes) / of, max(sizes, default=0)
    assert all(abs(sum(sizes[part.start : part.stop]) - mean) <= most for part in parts)


def slurm(number: int, count: int, least: int, **more: int) -> dict[str, str]:
    values = {"ID": number, "COUNT": count, "MIN": least, **more}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        ("0/1", {}, Shard(0, 1)),
        ("3/4", {}, Shard(3, 4)),
        ("auto", slurm(2, 4, 0, MAX=3, STEP=1), Shard(2, 4)),
        ("auto", slurm(5, 4, 2), Shard(3, 4)),
        ("auto", slurm(6, 4, 0, MAX=6, STEP=2), Shard(3, 4)),
    ],
)
def test_shards_as_they_are_written(text: str, environment: dict[str, str], shard: Shard) -> None:
    assert parse_shard(text, environment) == shard


@pytest.mark.parametrize(
    ("text", "environment", "said"),
    [
        ("4/4", {}, "from 0 to N-1"),
        ("0/0", {}, "from 0 to N-1"),
        ("-1/4", {}, "is not I/N"),
        ("1", {}, "is not I/N"),
        ("auto", {}, "SLURM_ARRAY_TASK_ID is not set"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        ("auto", slurm(3, 3, 1, MAX=7, STEP=1), "not evenly spaced"),
        ("auto", slurm(1, 2, 0) | {"SLURM_ARRAY_TASK_MIN": "x"}, "no number"),
    ],
)
def test_what_is_no_shard_is_refused(text: str, environment: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_shard(text, environment)


@given(st.lists(st.floats(-1e300, 1e300), max_size=30), st.integers(0, 30))
def test_exact_sums_are_the_same_in_any_parts(values: list[float], cut: int) -> None:
    whole, first, second = ExactSum(), ExactSum(), ExactSum()
    for value in values:
        whole.add(value)
    for value in reversed(values[:cut]):
        first.add(value)
    for value in values[cut:]:
        second.add(value)
    second.add_state(json.loads(json.dumps(first.state)))
    assert float(second) == float(whole)
    assert float(whole) == pytest.approx(sum(values), abs=1e285)


# Commands


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Any, code: int, *words: str) -> None:
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    said = result.stderr.strip().splitlines()[-1]
    assert all(word in said for word in words), said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "in.fasta").write_text(FASTA)
    done = run("calibrate", tiny_path, CALIBRATION, "--max-proteins", 12, "-o", folder / "tiny.tqz")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An autoregressive model and a bundle of it."""
    pytest.importorskip("transformers")
    from decoder_folders import save_tiny

    folder = tmp_path_factory.mktemp("causal")
    save_tiny(folder / "model", "gpt2")
    short = folder / "short.fasta"
    short.write_text("".join(f">{index}\n{'MKTAYIAKQRQISFVKSHFSRQLEERLG'[index:]}\n" for index in range(12)))
    arguments = ("calibrate", folder / "model", short, "--recipe", "flat", "-o", folder / "b.tqz")
    assert run(*arguments).exit_code == 0
    return folder / "model", folder / "b.tqz"


Commands = Callable[[str], tuple[tuple[object, ...], str]]


@pytest.fixture(scope="module")
def commands(folder: Path, tiny_path: Path, request: pytest.FixtureRequest) -> Commands:
    """A command without its output, and how that ends."""
    bundle, fasta, model = folder / "tiny.tqz", folder / "in.fasta", ("--model", tiny_path)

    def command(name: str) -> tuple[tuple[object, ...], str]:
        if name in ("score", "sample"):
            path, own = request.getfixturevalue("causal")
            if name == "score":
                return ("score", own, fasta, "--model", path, *LIMIT), ".tsv"
            sampling = ("--prompt", "all", "--generate", 6, "--num-samples", 2, "--seed", 5)
            return ("decode", own, fasta, "--model", path, *sampling, *LIMIT), ".fasta"
        if name == "generate":
            return ("decode", bundle, fasta, *model, "--generate", 4, "--seed", 3, *LIMIT), ".fasta"
        return {
            "quantize": (("quantize", bundle, fasta, *model, "--prompt", "0.6", *LIMIT), ".tqkv"),
            "decode": (("decode", bundle, fasta, *model, *LIMIT), ".csv"),
        }[name]

    return command


def split(command: tuple[object, ...], end: str, folder: Path, of: int = SHARDS) -> list[Path]:
    parts = [folder / f"part-{index}{end}" for index in range(of)]
    for index, part in enumerate(parts):
        done = run(*command, "--shard", f"{index}/{of}", "-o", part)
        assert done.exit_code == 0, done.output
    return parts


@pytest.mark.parametrize("name", ["quantize", "decode", "generate", "sample", "score"])
def test_what_is_split_and_merged_has_the_bytes_of_what_never_was(
    name: str, commands: Commands, tmp_path: Path
) -> None:
    command, end = commands(name)
    whole, merged = tmp_path / f"whole{end}", tmp_path / f"merged{end}"
    assert run(*command, "-o", whole).exit_code == 0
    parts = split(command, end, tmp_path)
    done = run("merge", merged, *parts[3:], *parts[:3])
    assert done.exit_code == 0, done.output
    assert merged.read_bytes() == whole.read_bytes()
    assert {json.loads(record_of(part).read_text())["count"] for part in parts} == {0, 1}
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".partial", ".part")]


def test_the_caches_of_shards_are_decoded_in_shards_too(
    commands: Commands, folder: Path, tiny_path: Path, tmp_path: Path
) -> None:
    command, _ = commands("quantize")
    assert run(*command, "-o", tmp_path / "c.tqkv").exit_code == 0
    again = ("decode", folder / "tiny.tqz", tmp_path / "c.tqkv", "--model", tiny_path)
    assert run(*again, "-o", tmp_path / "whole.csv").exit_code == 0
    assert run("merge", tmp_path / "merged.csv", *split(again, ".csv", tmp_path, 2)).exit_code == 0
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_statistics_of_shards_make_the_bundle_of_one_run(
    kind: str, tiny_path: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """More shards than batches; the model of the latter has learned positions, and its sinks are chosen."""
    fasta, model = CALIBRATION, tiny_path
    if kind == "causal":
        model, bundle = request.getfixturevalue("causal")
        fasta = bundle.with_name("short.fasta")
    command = ("calibrate", model, fasta, "--max-proteins", 20)
    whole, merged = tmp_path / "whole.tqz", tmp_path / "merged.tqz"
    assert run(*command, "-o", whole).exit_code == 0
    parts = split(command, ".tqs", tmp_path, 7)
    done = run("merge", merged, *reversed(parts))
    assert done.exit_code == 0, done.output
    assert 0 in {json.loads(record_of(part).read_text())["count"] for part in parts}
    found, expected = read_bundle(merged), read_bundle(whole)
    assert found.calibration == expected.calibration and found.spec.recipe == expected.spec.recipe
    for own, other in zip(found.spec.layers, expected.spec.layers, strict=True):
        for side in () if own is None or other is None else ("k", "v"):
            mine, theirs = getattr(own, side), getattr(other, side)
            assert mine.profiles == theirs.profiles and mine.profile_of_head == theirs.profile_of_head
            for name, tensor in theirs.tensors.items():
                torch.testing.assert_close(mine.tensors[name], tensor, rtol=0, atol=1e-6)
    refused(run("merge", tmp_path / "m.tqz", *parts, "--model", "embedded"), 5, "not of", "--model")


def test_a_bench_of_shards_has_the_figures_of_one(folder: Path, tiny_path: Path, tmp_path: Path) -> None:
    """All but the timings, which no two runs share: the first shard's."""
    (tmp_path / "other.fasta").write_text(">x\nMKVLAAGIVGLLLAQWERTY\n>y\nGIGKWLHSAKWW\n")
    families = f"{folder / 'in.fasta'},{tmp_path / 'other.fasta'}"
    command = ("bench", "--families", families, "--bundle", folder / "tiny.tqz", "--peers", "fp16")
    command = (*command, "--model", tiny_path)
    whole, merged = tmp_path / "whole.csv", tmp_path / "merged.csv"
    assert run(*command, "-o", whole).exit_code == 0
    done = run("merge", merged, *split(command, ".part", tmp_path, 3)[::-1])
    assert done.exit_code == 0, done.output

    def untimed(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if ",time," not in line]

    assert untimed(merged) == untimed(whole) and len(untimed(whole)) > 20
    assert len(merged.read_text().splitlines()) == len(whole.read_text().splitlines())
    refused(run(*command, "--shard", "0/3"), 2)
    made_of = read_bundle(folder / "tiny.tqz").calibration
    for row in csv_rows(merged):
        known = (row.calibration, row.calibration_source, row.calibration_proteins, row.calibration_tokens)
        own = (made_of.sha256[:16], CALIBRATION.name, made_of.proteins, made_of.tokens)
        assert known == (own if row.recipe == "auto" else ("", "", 0, 0))
        said = "turboesm bench --families in.fasta,other.fasta --peers fp16 --bundle tiny.tqz --model "
        assert row.command == ("" if row.accession else said + tiny_path.name)


@pytest.fixture(scope="module")
def three(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return split(*commands("decode"), tmp_path_factory.mktemp("three"), 3)


@pytest.fixture
def parts(three: list[Path], tmp_path: Path) -> list[Path]:
    """The outputs of three shards, to be spoiled."""
    for path in three:
        shutil.copy(path, tmp_path)
        shutil.copy(record_of(path), tmp_path)
    return [tmp_path / path.name for path in three]


def spoil(part: Path, **changes: object) -> None:
    found = json.loads(record_of(part).read_text())
    found["run"].update({name: value for name, value in changes.items() if name in found["run"]})
    found.update({name: value for name, value in changes.items() if name not in found["run"]})
    record_of(part).write_text(json.dumps(found))


def test_gaps_and_overlaps_are_refused(parts: list[Path], commands: Commands, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    refused(run("merge", out, parts[0], parts[2]), 3, "missing: 1/3")
    refused(run("merge", out, *parts, parts[1]), 3, "both shard 1/3")
    spoil(parts[1], first=0)
    refused(run("merge", out, *parts), 3, "begins at item 0")
    command, _ = commands("decode")
    assert run(*command, "--shard", "1/2", "-o", tmp_path / "other.csv").exit_code == 0
    refused(run("merge", out, parts[0], tmp_path / "other.csv"), 3, "the same N")
    assert not out.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"bundle": "0"}, {"model": "other 0"}, {"proteins and prompts": "0"}, {"cache": "fp16"}, {"dtype": "bf16"},
        {"slots": "16"}, {"sampling": "0"}, {"version": "turboesm 0.0.9 (00000000), torch 2"}, {"device": "tape"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_shards_of_other_runs_are_refused(changes: dict[str, str], parts: list[Path], tmp_path: Path) -> None:
    spoil(parts[1], **changes)
    (name, value), *_ = changes.items()
    refused(run("merge", tmp_path / "out.csv", *parts), 3, "another run", f"{name}: {value}")


def test_shards_of_another_version_than_this_are_refused(parts: list[Path], tmp_path: Path) -> None:
    for part in parts:
        spoil(part, version="turboesm 0.0.9 (00000000), torch 2")
    refused(run("merge", tmp_path / "out.csv", *parts), 3, "merge with that version")


def test_different_devices_are_merged_where_that_is_asked_for(parts: list[Path], tmp_path: Path) -> None:
    spoil(parts[1], device="a tape")
    done = run("merge", tmp_path / "out.csv", *parts, "--any-device")
    assert done.exit_code == 0, done.output
    assert ", then a tape" in (tmp_path / "out.csv").read_text().splitlines()[-1]


def test_what_a_shard_did_not_write_is_refused(parts: list[Path], commands: Commands, tmp_path: Path) -> None:
    out, text = tmp_path / "out.csv", parts[2].read_text()
    parts[2].write_text(text.replace("0.9", "0.8", 1))
    refused(run("merge", out, *parts), 3, "is not what the run of shard 2/3 wrote")
    parts[2].write_text(text)
    record_of(parts[1]).write_text("{}")
    refused(run("merge", out, *parts), 3, "is damaged")
    record_of(parts[1]).unlink()
    refused(run("merge", out, *parts), 3, "no part-1.csv.shard beside it")
    refused(run("merge", out, tmp_path / "none.csv"), 3, "no such file")
    command, end = commands("quantize")
    other = split(command, end, tmp_path, 1)
    refused(run("merge", out, parts[0], *other), 3, "parts of no one output")
    assert not out.exists() and not out.with_name("out.csv.partial").exists()


def test_a_merge_again_is_refused_or_done(parts: list[Path], commands: Commands, tmp_path: Path) -> None:
    """With --if-done skip; and the run that was never split knows the merged output as its own."""
    out, (command, _) = tmp_path / "out.csv", commands("decode")
    skip = ("--if-done", "skip")
    assert run("merge", out, *parts, *skip).exit_code == 0
    refused(run("merge", out, *parts), 7, "exists")
    assert "nothing to do" in run("merge", out, *parts, *skip).stderr
    assert "nothing to do" in run(*command, "-o", out, *skip).stderr


def test_a_shard_is_a_run_of_its_own(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command, _), out = commands("decode"), tmp_path / "out.csv"
    refused(run(*command, "--shard", "0/2"), 2, "")
    record_of(out).write_text("mine")
    refused(run(*command, "--shard", "0/2", "-o", out), 7, "no record of a shard")
    record_of(out).unlink()
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert "SLURM_ARRAY_TASK_ID is not set" in run(*command, "--shard", "auto", "-o", out).stderr
    for name, value in slurm(1, 2, 0).items():
        monkeypatch.setenv(name, value)
    assert run(*command, "--shard", "auto", "-o", out, "--if-done", "skip").exit_code == 0
    assert json.loads(record_of(out).read_text())["shard"] == "1/2"
    assert "nothing to do" in run(*command, "--shard", "1/2", "-o", out, "--if-done", "skip").stderr
    refused(run(*command, "--shard", "0/2", "-o", out, "--if-done", "skip"), 7, "shard: 1/2, not 0/2")
    assert run(*command, "-o", out, "--force").exit_code == 0
    assert not record_of(out).exists()
