"""Every input that a user may come with, through the real commands: exit code, one line, nothing half-written."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import importlib
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from forked import run_forked
from test_bundle import FORGERIES, ZIPS, in_manifest, rewrite, with_zip
from test_formats import written
from typer.testing import CliRunner, Result

from turboesm_cli.app import app
from turboesm_cli.console import counted

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = str(ROOT / "data" / "calibration" / "calibration.fasta")
SEQUENCE = "MKWVTFISLLFLFSSAYSRGVFRR"
GOOD = f">good fine\n{SEQUENCE}\n"
LONG = f">long\n{'MKWVT' * 300}\n"


BRIEF = ("--prompt", "0.95")
"""Decode the last tokens alone of what is as long as a model takes."""


def zstd(data: bytes) -> bytes:
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return bytes(importlib.import_module(module).compress(data))
        except ImportError:
            continue
    pytest.skip("neither Python 3.14 nor backports.zstd")


@dataclass(frozen=True)
class Case:
    """A FASTA file, and what commands make of it.

    proteins  how many are used; 0 where the command stops with exit code 3
    said      what stderr says
    rejects   accessions in the rejects file
    """

    name: str
    content: str | bytes | Callable[[], bytes]
    proteins: int
    said: str = ""
    rejects: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    stdin: bool = False

    @property
    def data(self) -> bytes:
        """The file's bytes."""
        found = self.content() if callable(self.content) else self.content
        return found if isinstance(found, bytes) else found.encode()


CASES = [
    Case("plain", GOOD, 1),
    Case("gzip", lambda: gzip.compress(GOOD.encode()), 1),
    Case("bzip2", lambda: bz2.compress(GOOD.encode()), 1),
    Case("xz", lambda: lzma.compress(GOOD.encode()), 1),
    Case("zstd", lambda: zstd(GOOD.encode()), 1),
    Case("stdin", GOOD, 1, stdin=True),
    Case("gzip on stdin", lambda: gzip.compress(GOOD.encode()), 1, stdin=True),
    Case("CRLF", GOOD.replace("\n", "\r\n"), 1),
    Case("byte-order mark", b"\xef\xbb\xbf" + GOOD.encode(), 1),
    Case("blank lines", "\n\n" + GOOD.replace("\n", "\n\n"), 1),
    Case("U, Z, B, X and O", f">a\n{SEQUENCE}UZBXO\n", 1),
    Case("lower case", f">a\n{SEQUENCE.lower()}\n", 1, "lower-case letters upper-cased: 1 record"),
    Case("final stop", f">a\n{SEQUENCE}*\n", 1, "final stop '*' dropped: 1 record"),
    Case(
        "numbered", f">a\n  1 {SEQUENCE[:10]} {SEQUENCE[10:20]} {SEQUENCE[20:]}\n", 1, "blanks or digits dropped"
    ),
    Case("gaps", f">a\n{SEQUENCE}----\n", 1, "gaps dropped: 1 record"),
    Case("duplicate identifiers", GOOD * 3, 3, "duplicate identifier renamed: 2 records"),
    Case("header of a megabyte", f">a {'x' * 1_000_000}\n{SEQUENCE}\n", 1, "long header shortened"),
    Case(
        "unknown letters",
        GOOD + ">bad\nMKW!VTF\n",
        1,
        "skipped record 2 (bad), line 3: unknown letter '!'",
        ("bad",),
    ),
    Case("stop inside", GOOD + ">bad\nMK*WVTF\n", 1, "stop '*' inside the sequence", ("bad",)),
    Case("header without sequence", ">none\n" + GOOD, 1, "no residues after the header", ("none",)),
    Case("a gene among proteins", GOOD + ">gene\n" + "ACGT" * 20 + "\n", 1, "looks like nucleotides", ("gene",)),
    Case("too long", GOOD + LONG, 0, "1,500 residues, over the limit of 1,022"),
    Case(
        "too long, truncated",
        LONG,
        1,
        "long sequence truncated: 1 record",
        options=("--long", "truncate", *BRIEF),
    ),
    Case("too long, in windows", LONG, 2, options=("--long", "window", *BRIEF)),
    Case("100,000 residues", f">a\n{'MKWVT' * 20_000}\n", 0, "100,000 residues, over the limit"),
    Case("empty", "", 0, "holds no record"),
    Case("blank", "\n\n \n", 0, "holds no record"),
    Case("empty gzip", lambda: gzip.compress(b""), 0, "holds no record"),
    Case("no FASTA", "MKWVTFISLL\n", 0, "does not look like FASTA"),
    Case("GenBank", lambda: written("genbank", SEQUENCE), 1),
    Case(
        "GenBank of genes", lambda: written("genbank", "ACGT" * 20, molecule="DNA"), 0, "a record of nucl", ("P1",)
    ),
    Case("FASTQ", "@a\nMKWV\n+\nIIII\n", 0, "does not look like FASTA"),
    Case("nucleotides", ">r\nACGTACGTAC\n" * 30, 0, "looks like nucleotides"),
    Case("binary", bytes(range(256)) * 10, 0, "NUL byte at line 1"),
    Case("UTF-16", GOOD.encode("utf-16"), 0, "UTF-8"),
    Case("Latin-1", b">a Prot\xe9ine\nMKWVTF\n", 0, "is not UTF-8"),
    Case("nothing good", ">a\nM!\n>b\n\n", 0, "every other record was rejected, too", ("a", "b")),
    Case("cut-off gzip", lambda: gzip.compress(GOOD.encode() * 50)[:-9], 0, "gzip data damaged or cut off"),
    Case("cut-off xz", lambda: lzma.compress(GOOD.encode() * 50)[:-9], 0, "xz data damaged or cut off"),
    Case(
        "strict about a mend", f">a\n{SEQUENCE.lower()}\n", 0, "would be mended: lower-case", options=("--strict",)
    ),
    Case("strict about a reject", GOOD + ">bad\nM!\n", 0, "without --strict", options=("--strict",)),
    Case("strict about truncation", LONG, 0, "would be mended", options=("--strict", "--long", "truncate")),
    Case("strict and clean", GOOD, 1, options=("--strict",)),
]
NO_FILES = {"missing": "no such file", "folder": "is a folder"}


@dataclass(frozen=True)
class Place:
    """A folder to run commands in, with a model and a bundle elsewhere."""

    folder: Path
    model: str
    bundle: Path
    runner: CliRunner = field(default_factory=CliRunner)

    def run(self, command: str, source: str, *options: str, stdin: bytes | None = None) -> Result:
        """A command on a FASTA file, in this process; its output is `out`."""
        arguments = {
            "calibrate": ["calibrate", self.model, source, "-o", "out.tqz"],
            "quantize": ["quantize", str(self.bundle), source, "-o", "out.tqkv", "--model", self.model],
            "decode": ["decode", str(self.bundle), source, "-o", "out.csv", "--model", self.model],
            "bench": [
                "bench", "--families", source, "--recipes", "flat", "--max-calibration", "6", "-o", "out.csv",
                "--model", self.model,
            ],
        }[command]  # fmt: skip
        return self.runner.invoke(app, [*arguments, *options], input=stdin)

    def names(self) -> set[str]:
        """Files here, but for inputs."""
        return {path.name for path in self.folder.iterdir()} - {"in.fasta"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.tqz"
    arguments = [
        "calibrate",
        str(tiny_path),
        CALIBRATION,
        "--max-proteins",
        "8",
        "--recipe",
        "flat",
        "-o",
        str(path),
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path, tiny_path: Path) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.parent / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Place(tmp_path / "here", str(tiny_path), bundle)


def check_stopped(result: Result, place: Place, code: int, said: str, *kept: str) -> None:
    assert result.exit_code == code, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last and "Traceback" not in result.output
    assert result.stdout == "" and place.names() == set(kept)


@pytest.mark.parametrize("command", ["quantize", "decode"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fasta(case: Case, command: str, place: Place) -> None:
    (place.folder / "in.fasta").write_bytes(case.data)
    source, stdin = ("-", case.data) if case.stdin else ("in.fasta", None)
    result = place.run(command, source, *case.options, "--rejects", "r.tsv", stdin=stdin)
    with (place.folder / "r.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert tuple(row["accession"] for row in rows) == case.rejects
    if not case.proteins:
        check_stopped(result, place, 3, case.said, "r.tsv")
        return
    assert result.exit_code == 0, result.stderr
    assert case.said in result.stderr
    output = "out.tqkv" if command == "quantize" else "out.csv"
    assert place.names() == {"r.tsv", output}
    assert f"of {counted(case.proteins, 'protein')} in {output}" in result.stderr


STOPPED = [("calibrate", case) for case in CASES if not case.proteins]
# bench leaves long proteins out, and has neither --strict nor --long
STOPPED += [("bench", case) for _, case in STOPPED if not case.options and "over the limit" not in case.said]


@pytest.mark.parametrize(("command", "case"), STOPPED, ids=lambda value: getattr(value, "name", value))
def test_fasta_that_stops_other_commands(case: Case, command: str, place: Place) -> None:
    (place.folder / "in.fasta").write_bytes(case.data)
    check_stopped(place.run(command, "in.fasta", *case.options), place, 3, case.said)


@pytest.mark.parametrize("command", ["calibrate", "quantize", "decode"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file(kind: str, command: str, place: Place) -> None:
    source = str(place.folder.parent) if kind == "folder" else "none.fasta"
    check_stopped(place.run(command, source), place, 3, NO_FILES[kind])


@pytest.mark.parametrize("command", ["calibrate", "quantize", "decode", "bench"])
@pytest.mark.parametrize("content", [GOOD + ">bad\nM!\n" + LONG, GOOD * 40], ids=["stops", "is mended"])
def test_fasta_in_processes_of_their_own(content: str, command: str, place: Place) -> None:
    (place.folder / "in.fasta").write_text(content)
    arguments: list[str] = []

    class Recorder(CliRunner):
        def invoke(self, _app: object, args: list[str], input: object = None) -> Result:  # type: ignore[override]
            arguments.extend(args)
            raise StopIteration

    with pytest.raises(StopIteration):
        few = ("--max-proteins", "6") if command == "decode" else ()
        Place(place.folder, place.model, place.bundle, Recorder()).run(command, "in.fasta", *few)
    done = run_forked(*arguments, cwd=place.folder)
    stopped = content.endswith(LONG) and command != "bench"
    assert done.returncode == (3 if stopped else 0), done.stderr
    assert "Traceback" not in done.stderr and "warning: " in done.stderr
    outputs = {"calibrate": "out.tqz", "quantize": "out.tqkv"}
    assert place.names() == (set() if stopped else {outputs.get(command, "out.csv")})


def test_a_rejects_file_does_not_replace_another_file(place: Place) -> None:
    (place.folder / "in.fasta").write_text(GOOD)
    result = place.run("quantize", "in.fasta", "--rejects", "in.fasta")
    check_stopped(result, place, 7, "is read by this command")
    assert (place.folder / "in.fasta").read_text() == GOOD
    for _ in range(2):
        assert place.run("quantize", "in.fasta", "--rejects", "r.tsv", "--force").exit_code == 0


def test_a_file_that_changes_while_it_is_read_is_noticed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.folder / "in.fasta"
    path.write_text(GOOD)
    from turboesm_cli.commands import options

    load = options.open_model

    def meanwhile(*arguments: object) -> object:
        path.write_text(GOOD * 2)
        return load(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(options, "open_model", meanwhile)
    check_stopped(place.run("quantize", "in.fasta"), place, 3, "changed while it was read")


def test_the_log_has_what_stderr_had(place: Place) -> None:
    (place.folder / "in.fasta").write_text(GOOD + ">bad\nM!\n")
    for code, source in ((0, "in.fasta"), (3, "none.fasta")):
        arguments = ["--log", "run.log", "quantize", str(place.bundle), source, "--model", place.model, "-f"]
        done = run_forked(*arguments, cwd=place.folder)
        assert done.returncode == code
        log = (place.folder / "run.log").read_text()
        assert f"quantize {place.bundle} {source}" in log and f"finished: exit code {code}" in log
        for line in done.stderr.splitlines():
            assert line in log


def test_the_log_of_a_wrong_command_line_is_short(place: Place) -> None:
    assert run_forked("--log", "run.log", "quantize", "--fish", cwd=place.folder).returncode == 2
    log = (place.folder / "run.log").read_text()
    assert "--fish" in log and "Traceback" not in log and len(log.splitlines()) == 2


def test_a_log_that_cannot_be_written_is_an_output_error(place: Place) -> None:
    check_stopped(
        place.runner.invoke(app, ["--log", "/none/x", "report", "x.csv"]), place, 7, "cannot write the log"
    )


ARCHIVES = {**FORGERIES, **{name: change for name, (change, _) in ZIPS.items()}}


@pytest.mark.parametrize("command", ["quantize", "decode", "report"])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_damaged_bundles(kind: str, command: str, place: Place) -> None:
    bad = place.folder.parent / "bad.tqz"
    bad.write_bytes(place.bundle.read_bytes())
    if kind in FORGERIES:
        rewrite(bad, FORGERIES[kind])
    else:
        with_zip(bad, ZIPS[kind][0])
    (place.folder / "in.fasta").write_text(GOOD)
    if command == "report":
        check_stopped(place.runner.invoke(app, ["report", str(bad)]), place, 5, "bad.tqz")
    else:
        check_stopped(replace(place, bundle=bad).run(command, "in.fasta"), place, 5, "bad.tqz")


@pytest.mark.parametrize("command", ["decode", "report"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_cut_off_caches(share: float, command: str, place: Place) -> None:
    (place.folder / "in.fasta").write_text(GOOD)
    assert place.run("quantize", "in.fasta").exit_code == 0
    data = (place.folder / "out.tqkv").read_bytes()
    (place.folder / "out.tqkv").write_bytes(data[: int(len(data) * share)] if share else b"PK\x03\x04")
    arguments = ["report", "out.tqkv"] if command == "report" else []
    result = place.runner.invoke(app, arguments) if arguments else place.run("decode", "out.tqkv")
    check_stopped(result, place, 5, "out.tqkv", "out.tqkv")


def test_text_of_a_file_does_not_steer_the_terminal(place: Place) -> None:
    bad = place.folder.parent / "bad.tqz"
    bad.write_bytes(place.bundle.read_bytes())
    with_zip(bad, lambda members: in_manifest(members, format="\x1b[2J\x07evil"))
    result = place.runner.invoke(app, ["report", str(bad)])
    check_stopped(result, place, 5, "evil")
    assert "\x1b" not in result.stderr and "\x07" not in result.stderr


def test_a_bundle_for_another_model_names_both(
    place: Place, save_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    (place.folder / "in.fasta").write_text(GOOD)
    other = save_tiny_model(tmp_path / "other.pt", seed=5)
    wider = save_tiny_model(tmp_path / "wider.pt", width=64)
    for model in (other, wider):
        result = replace(place, model=str(model)).run("decode", "in.fasta")
        check_stopped(result, place, 5, f"calibrated for tiny, not for {model.stem}")


def test_a_report_of_a_bundle_and_of_caches(place: Place) -> None:
    (place.folder / "in.fasta").write_text(GOOD)
    assert place.run("quantize", "in.fasta").exit_code == 0
    shown = place.runner.invoke(app, ["report", str(place.bundle), "out.tqkv"])
    assert shown.exit_code == 0, shown.stderr
    facts = json.loads(place.runner.invoke(app, ["report", str(place.bundle), "out.tqkv", "--json"]).stdout)
    bundle, caches = facts
    assert bundle["sha256"] == hashlib.sha256(place.bundle.read_bytes()).hexdigest() == caches["bundle_sha256"]
    assert bundle["recipe"]["name"] == "flat" and bundle["calibration"]["proteins"] == 8
    assert [(row["layer"], row["side"]) for row in bundle["codec"]] == [(0, "k"), (0, "v"), (1, "k"), (1, "v")]
    assert (caches["proteins"], caches["tokens"]) == (1, len(SEQUENCE) + 1)
    for word in ("turboesm-bundle", "calibration.proteins", "flat", bundle["sha256"], caches["sha256"]):
        assert word in shown.stdout
    mixed = place.runner.invoke(app, ["report", str(place.bundle), "x.csv"])
    check_stopped(mixed, place, 3, "not reported together", "out.tqkv")
