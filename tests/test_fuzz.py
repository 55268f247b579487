"""Fuzzing: the corpus is replayed, command lines and journals are made up; `make fuzz` searches on by coverage.

`--hypothesis-profile=search` makes many more examples of each kind, here and in the tests of the bit layout.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS
from typer.testing import CliRunner

from turboesm_cli.app import app
from turboesm_cli.outputs.journal import Journal

HERE = Path(__file__).parent
CORPUS = sorted(path for path in (HERE / "fuzz" / "corpus").glob("*/*"))
searching = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_corpus_finds_nothing(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.binary(max_size=60))
@searching
def test_made_up_bytes_find_nothing(target: str, data: bytes) -> None:
    TARGETS[target](data)


@given(
    records=st.lists(st.tuples(st.text(max_size=9), st.binary(max_size=40)), max_size=4, unique_by=lambda r: r[0]),
    cut=st.integers(0, 400),
    damage=st.binary(max_size=3),
)
@searching
def test_a_damaged_journal_gives_whole_records_or_none(
    records: list[tuple[str, bytes]], cut: int, damage: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "journal"
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for name, data in records:
        journal.append(name, data)
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + damage + whole[cut + len(damage) :])
    again = Journal(path)
    assert all(again.read(name) == data for name, data in records[: len(again)])
    again.close()


TEXTS = st.sampled_from(
    ["", "0", "1", "-1", "3", "2.5", "nan", "inf", "1e999", "99999999999999999999", "x", "é\n", "../x"]
)
OPTIONS = (
    "--recipe", "--bits", "--bits-k", "--bits-v", "--prompt", "--kv", "--generate", "--temperature", "--top-p",
    "--seed", "--batch", "--dtype", "--max-proteins", "--long", "--device", "--recipes", "--families", "--rejects",
    "--max-residues", "--max-calibration", "--model", "-o", "--bundle", "--calibration", "--title", "--log",
)  # fmt: skip
FLAGS = (
    "--strict",
    "--json",
    "--force",
    "--plan",
    "--ablate",
    "--kernels",
    "--allow-seen",
    "--help",
    "--debug",
    "--",
)
VALUES = {
    "--recipe": ["paper", "flat", "auto@2", "flat@2/4", "auto@9", "@", "flat@nan"],
    "--recipes": ["flat", "flat,flat", "paper,fp16", ",", "int8"],
    "--kv": ["packed", "fp32", "int8", "fp8"],
    "--prompt": ["all", "0.5", "0", "7", "1.5", "-0.1"],
    "--long": ["error", "truncate", "window"],
    "--device": ["cpu", "cuda", "cuda:9", "meta", "mps"],
    "--families": ["peptide", "in.fasta", "in.fasta,in.fasta", "tm,fish"],
    "--dtype": ["fp32", "bf16", "fp16"],
}
SOURCES = st.sampled_from(["in.fasta", "none", ".", "tiny.tqz", "-", "out.csv"])


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with arguments that are mostly its own, and mostly right."""
    command = draw(st.sampled_from(["calibrate", "quantize", "decode", "bench", "report"]))
    first = {"calibrate": ["tiny.pt"], "bench": [], "report": []}.get(command, ["tiny.tqz"])
    arguments = first if draw(st.booleans()) else [draw(SOURCES) for _ in first]
    if command != "bench":
        arguments = [*arguments, draw(SOURCES)]
    if draw(st.integers(0, 3)):
        arguments += ["--max-proteins", "1"] if command != "report" else []
        arguments += ["--model", "tiny.pt"] if command not in ("calibrate", "report") else []
    if command == "bench":
        arguments += ["--families", "in.fasta", "--max-calibration", "4", "--recipes", "flat"]
    for option in draw(st.lists(st.sampled_from(OPTIONS), max_size=3)):
        arguments += [option, draw(st.sampled_from(VALUES[option]) if option in VALUES else TEXTS)]
    return [command, *arguments, *draw(st.lists(st.sampled_from(FLAGS), max_size=2))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    path = tmp_path_factory.mktemp("command-lines")
    (path / "tiny.pt").write_bytes(tiny_path.read_bytes())
    (path / "in.fasta").write_text(">one\nMKTAYIAKQRQISFVKSHFSRQ\n>two\nGIGKFLHSAKKFGKAFVGEIMNS\n")
    arguments = ["calibrate", "tiny.pt", str(HERE.parent / "data" / "calibration" / "calibration.fasta")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        done = CliRunner().invoke(app, [*arguments, "--max-proteins", "6", "-o", "tiny.tqz"])
        assert done.exit_code == 0, done.stderr
    return path


@pytest.mark.slow
@given(arguments=command_lines())
@searching
def test_made_up_command_lines_end_in_a_line(
    arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    before = {path.name for path in folder.iterdir()}
    result = CliRunner().invoke(app, arguments, input=b">stdin\nMKTAYIAKQRQISFVKSHFSRQ\n")
    if "--debug" not in arguments:
        assert result.exception is None or isinstance(result.exception, SystemExit), arguments
        assert result.exit_code in (0, 2, 3, 4, 5, 6, 7), arguments
        assert "Traceback" not in result.output
    if result.exit_code in (3, 4, 5, 6, 7):
        assert result.stderr.strip().splitlines()[-1].startswith("error: "), result.stderr
    new = {path.name for path in folder.iterdir()} - before
    assert not any(name.endswith((".part", ".partial")) for name in new), arguments
    for name in new - {"cache"}:
        path = folder / name
        path.unlink() if path.is_file() else None
