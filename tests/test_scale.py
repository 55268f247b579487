"""Files of any number of proteins: memory that does not grow, and no writer that makes what readers refuse."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from turboesm_cli.app import app
from turboesm_cli.cache import cache_file
from turboesm_cli.cache.cache_file import CachedProtein, Packfile, write_packfile
from turboesm_cli.cache.inventory import facts_of
from turboesm_cli.codec import bundle
from turboesm_cli.codec.bundle import read_bundle
from turboesm_cli.commands import generating
from turboesm_cli.engine import prefill
from turboesm_cli.errors import BundleError
from turboesm_cli.outputs import archive
from turboesm_cli.outputs.archive import to_bytes
from turboesm_cli.outputs.files import file_sha256
from turboesm_cli.outputs.journal import Journal
from turboesm_cli.reporting import json_list, results
from turboesm_cli.sequences.fasta import Protein

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(__file__).resolve().parents[1] / "data"
BUNDLE = GOLDEN / "auto-v1.tqz"
CACHES = GOLDEN / "auto-v2.tqkv"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Any, code: int) -> str:
    """The one line that a command ended with."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr.strip().splitlines()[-1]


def write_fasta(path: Path, count: int, name: str = "p") -> Path:
    letters = random.Random(0)
    records = (f">{name}{i}\n{''.join(letters.choices('ACDEFGHIKLMNPQRSTVWY', k=10))}\n" for i in range(count))
    path.write_text("".join(records))
    return path


@pytest.fixture
def quantized(tmp_path: Path, tiny_path: Path) -> Callable[..., Any]:
    """`turboesm quantize` of so many proteins into c.tqkv."""

    def quantize(count: int, *options: object) -> Any:
        fasta = write_fasta(tmp_path / "p.fasta", count)
        return run("quantize", BUNDLE, fasta, "--model", tiny_path, "-o", tmp_path / "c.tqkv", *options)

    return quantize


def test_a_manifest_does_not_grow_with_the_proteins(
    quantized: Callable[..., Any], tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 109,000 proteins did with 64 MiB: what was written with exit code 0 could not be read."""
    with zipfile.ZipFile(BUNDLE) as file:
        monkeypatch.setattr(archive, "MANIFEST_LIMIT", file.getinfo(archive.MANIFEST).file_size)
    assert quantized(60).exit_code == 0
    with zipfile.ZipFile(tmp_path / "c.tqkv") as file:
        assert file.getinfo(archive.MANIFEST).file_size < 1000
    shown = run("report", tmp_path / "c.tqkv")
    assert shown.exit_code == 0 and "p59" not in shown.stdout and len(shown.stdout.splitlines()) < 30
    decoded = run("decode", BUNDLE, tmp_path / "c.tqkv", "--model", tiny_path, "--max-proteins", "2")
    assert decoded.exit_code == 0, decoded.output


def test_totals_and_json_tell_of_every_protein(quantized: Callable[..., Any], tmp_path: Path) -> None:
    found = json.loads(quantized(25, "--json").stdout)
    assert [line["name"] for line in found["proteins"]] == [f"p{i}" for i in range(25)]
    assert found["bytes_model_tables"] > 0
    told = json.loads(run("report", "--json", tmp_path / "c.tqkv").stdout)[0]
    assert (told["proteins"], told["tokens"]) == (25, sum(line["tokens"] for line in found["proteins"]))
    assert told["bytes_of_caches"] == sum(line["nbytes"] for line in found["proteins"])
    table = quantized(25, "--force")
    assert f"{told['bytes_of_caches']:,}" in table.stdout and "first 20 of 25" in table.stderr


def test_what_was_interrupted_goes_on_to_the_same_bytes(
    quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantized(12).exit_code == 0
    whole = (tmp_path / "c.tqkv").read_bytes()
    (tmp_path / "c.tqkv").unlink()
    prefilled, done = prefill.cache_protein, [0]

    def some(*arguments: Any) -> Any:
        done[0] += 1
        if done[0] == 6:
            raise KeyboardInterrupt
        return prefilled(*arguments)

    monkeypatch.setattr(prefill, "cache_protein", some)
    assert quantized(12).exit_code == 130 and not (tmp_path / "c.tqkv").exists()
    assert "5 units are done" in quantized(12).stderr
    assert (tmp_path / "c.tqkv").read_bytes() == whole and done[0] == 6 + 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.tqkv", "p.fasta"]


def bytes_held(folder: Path) -> int:
    """Of all files in a folder, and of those that this process has open without a name."""
    opened = []
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            opened.append(os.fstat(int(handle.name)))
    nameless = [f.st_size for f in opened if f.st_nlink == 0 and f.st_dev == folder.stat().st_dev]
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) + sum(nameless)


def test_unfinished_work_takes_little_more_disk_than_the_output(
    quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, replace, held = Journal.append, Path.replace, []

    def appending(journal: Journal, name: str, data: bytes) -> None:
        append(journal, name, data)
        held.append(bytes_held(tmp_path))

    def replacing(path: Path, target: Path) -> Path:
        held.append(bytes_held(tmp_path))
        return replace(path, target)

    monkeypatch.setattr(Journal, "append", appending)
    monkeypatch.setattr(Path, "replace", replacing)
    before = bytes_held(tmp_path)
    assert quantized(50).exit_code == 0
    assert len(held) > 50
    fasta, output = ((tmp_path / name).stat().st_size for name in ("p.fasta", "c.tqkv"))
    assert max(held) - before - fasta < 1.1 * output, "of short proteins, of each of which 100 bytes are noted"


@pytest.mark.parametrize("renamed", [False, True])
def test_a_file_of_caches_is_finished_once(
    renamed: bool, quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before it is renamed, and before what is beside it is cleared away; caches are not made again."""
    assert quantized(6).exit_code == 0
    output, whole = tmp_path / "c.tqkv", (tmp_path / "c.tqkv").read_bytes()
    output.unlink()
    replace = Path.replace

    def stopping(path: Path, target: Path) -> Path:
        if renamed:
            replace(path, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping)
        assert quantized(6, "--if-done", "skip").exit_code == 130
    assert output.exists() == renamed
    monkeypatch.delattr(prefill, "cache_protein")
    assert quantized(6, "--if-done", "skip").exit_code == 0
    assert output.read_bytes() == whole
    assert "nothing to do" in quantized(6, "--if-done", "skip").stderr


@pytest.mark.parametrize("change", ["cut", "flipped", "gone"])
def test_caches_that_a_power_cut_took_are_made_again(
    change: str, quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantized(6).exit_code == 0
    whole = (tmp_path / "c.tqkv").read_bytes()
    (tmp_path / "c.tqkv").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: 1 / 0)
        assert quantized(6).exit_code != 0
    body = tmp_path / "c.tqkv.partial" / "body"
    data = bytearray(body.read_bytes())
    data[len(data) // 4] ^= 1
    if change == "gone":
        body.unlink()
    else:
        body.write_bytes(data if change == "flipped" else data[: len(data) // 2])
    assert "6 units are done" in quantized(6).stderr
    assert (tmp_path / "c.tqkv").read_bytes() == whole


def made_up(count: int) -> Iterator[CachedProtein]:
    held = to_bytes({"x": torch.zeros(4, dtype=torch.uint8)})
    return (CachedProtein(Protein(f"p{i}", "", "MKTAYIAKQR"), 11, held) for i in range(count))


def growth(work: Callable[[int], object], few: int, many: int) -> float:
    """Bytes by which the peak of memory grows for each further unit of work."""
    peaks = []
    work(few)  # what is made once
    for count in (few, many):
        tracemalloc.start()
        work(count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[1] - peaks[0]) / (many - few)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_proteins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (archive, cache_file):
        monkeypatch.setattr(module, "CHUNK", 4096)  # what is held of the lines, at most
    codec = read_bundle(BUNDLE)

    def there_and_back(count: int) -> None:
        path = tmp_path / f"{count}.tqkv"
        write_packfile(path, codec, file_sha256(BUNDLE), made_up(count))
        assert facts_of(path)["proteins"] == count

    assert growth(there_and_back, 500, 5000) < 100  # it was 6,600


@pytest.mark.slow
def test_a_journal_takes_some_bytes_a_record(tmp_path: Path) -> None:
    def there_and_back(count: int) -> None:
        path = tmp_path / f"{count}"
        for _ in range(2):  # made, and gone on with
            journal = Journal(path)
            for number in range(len(journal), count):
                journal.append(str(number), b"x")
            assert len(journal) == count and str(count - 1) in journal and journal.read("1") == b"x"
            journal.close()

    assert growth(there_and_back, 2000, 20_000) < 24


def test_a_journal_knows_names_of_any_order_and_kind(tmp_path: Path) -> None:
    names = ["7", "run", "0", "007", "-1", "²", "a-3", "99999999999999999999", "700000", "3", "7"]
    latest = {name: number for number, name in enumerate(names)}
    for last in range(2):
        journal = Journal(tmp_path / "journal")
        for number, name in enumerate(names if not last else ()):
            journal.append(name, f"{name} of {number}".encode())
        assert len(journal) == len(set(names)) and "1" not in journal and "70" not in journal
        assert all(journal.read(name) == f"{name} of {number}".encode() for name, number in latest.items())
        with pytest.raises(KeyError):
            journal.read("5")
        journal.close()


class Lines(io.TextIOBase):
    """A JSON list of so many records, made as it is read."""

    def __init__(self, count: int) -> None:
        rows = (json.dumps({"value": number, "text": "x" * 90}) for number in range(count))
        self._lines = (row + (",\n" if number + 1 < count else "]") for number, row in enumerate(rows))
        self._first = True

    def read(self, _size: int | None = -1) -> str:
        line = next(self._lines, "")
        line, self._first = ("[" if self._first else "") + line, False
        return line


def test_a_long_list_of_json_is_read_one_by_one() -> None:
    def read(count: int) -> None:
        assert sum(1 for _ in json_list.list_values(Lines(count))) == count

    assert growth(read, 500, 5000) < 10
    numbers = io.StringIO("[" + ",".join(str(number) for number in range(100_000)) + " ] ")
    assert sum(json_list.list_values(numbers)) == sum(range(100_000)), "none is cut at the end of a chunk"


@pytest.mark.parametrize("how", ["-o", "--json"])
def test_results_of_any_size_are_read(
    how: str, tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "MAX_BYTES", 1000, raising=False)  # a limit that there was, at 256 MiB
    fasta = write_fasta(tmp_path / "p.fasta", 3)
    path = tmp_path / ("r.csv" if how == "-o" else "r.json")
    options = ("-o", path) if how == "-o" else ("--json",)
    decoded = run("decode", BUNDLE, fasta, "--model", tiny_path, *options)
    assert decoded.exit_code == 0, decoded.output
    if how == "--json":
        path.write_text(decoded.stdout)
    assert path.stat().st_size > 1000
    assert run("report", path, "-o", tmp_path / "page.md").exit_code == 0


def test_rows_on_stdout_are_those_of_the_file(tmp_path: Path, tiny_path: Path) -> None:
    fasta = write_fasta(tmp_path / "p.fasta", 2)
    decoded = run("decode", BUNDLE, fasta, "--model", tiny_path, "--json", "-o", tmp_path / "figures")
    assert decoded.exit_code == 0, decoded.output
    (tmp_path / "figures").rename(tmp_path / "figures.csv")
    rows = results.rows_of_frame(results.read_csv([tmp_path / "figures.csv"]))
    assert json.loads(decoded.stdout) == json.loads(json.dumps(results.to_records(rows)))


def test_the_longest_names_that_are_given_can_be_stored(tmp_path: Path, tiny_path: Path) -> None:
    name, sequence = "n" * 250, "MKTAYIAKQR" * 110
    fasta = tmp_path / "p.fasta"
    fasta.write_text(f">{name}\n{sequence}\n>{name}\n{sequence}\n")
    made = run(
        "quantize", BUNDLE, fasta, "--model", tiny_path, "--long", "window", "--prompt", "5",
        "-o", tmp_path / "c.tqkv",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    with Packfile(tmp_path / "c.tqkv") as file:
        names = [item.protein.accession for item in file]
    assert len(set(names)) == 4 and max(map(len, names)) <= archive.TEXT_LIMIT
    assert run("report", tmp_path / "c.tqkv").exit_code == 0


@pytest.mark.parametrize("limit", ["TEXT_LIMIT", "RECORD_CAP", "PART_LIMIT"])
def test_what_readers_refuse_is_refused_before_the_work(
    limit: str, quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "TEXT_LIMIT":
        monkeypatch.setattr(cache_file, "printable", lambda value: 1 / 0 if value == "p2" else value)
        monkeypatch.setattr(cache_file, "check_storable", short_names)
    else:
        monkeypatch.setattr(cache_file, limit, 9)
    monkeypatch.setattr(prefill, "cache_protein", lambda *_: pytest.fail("work was done"))
    message = refused(quantized(3), 3)
    assert {"TEXT_LIMIT": "p2", "RECORD_CAP": "over 9", "PART_LIMIT": "over 9"}[limit] in message
    assert not (tmp_path / "c.tqkv").exists()


def short_names(accession: object, _sequence: object) -> None:
    if accession == "p2":
        raise ValueError(f"{accession!r} is no short printable text")


def calibrate(model: Path, output: Path) -> Any:
    fasta = DATA / "calibration" / "calibration.fasta"
    return run("calibrate", model, fasta, "--max-proteins", "6", "--recipe", "flat", "-o", output)


@pytest.mark.parametrize("name", ["tiny\x01.pt", " .pt", "a\nb.pt"])
def test_a_model_whose_name_cannot_be_told_is_refused_before_the_work(
    name: str, tmp_path: Path, tiny_path: Path
) -> None:
    (tmp_path / name).write_bytes(tiny_path.read_bytes())
    assert "rename it" in refused(calibrate(tmp_path / name, tmp_path / "b.tqz"), 4)


def test_too_many_calibration_proteins_are_refused_before_the_work(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "PROTEINS_LIMIT", 5)
    assert "6 calibration proteins, over 5" in refused(calibrate(tiny_path, tmp_path / "b.tqz"), 3)
    assert not list(tmp_path.iterdir())


def test_as_many_calibration_proteins_as_are_taken_fit_a_manifest() -> None:
    listed = json.dumps({"calibration": {"sequences": ["0" * 16] * 1000}}, indent=1)
    room = archive.MANIFEST_LIMIT - len(listed) / 1000 * bundle.PROTEINS_LIMIT
    assert room > 16 << 20  # for what describes the layers of the largest model


@pytest.mark.parametrize(("cap", "said"), [(50, "over 50"), (10**6, "--long")])
def test_no_more_is_sampled_than_can_be_read(
    cap: int, said: str, tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generating, "RECORD_CAP", cap)
    monkeypatch.setattr(generating, "MAX_RESIDUES", 40)
    fasta = write_fasta(tmp_path / "p.fasta", 1)
    found = run("decode", BUNDLE, fasta, "--model", tiny_path, "--prompt", "all", "--generate", "41")
    assert found.exit_code == (3 if cap == 50 else 0) and said in found.stderr


def test_caches_are_read_at_any_time_and_in_any_order(quantized: Callable[..., Any], tmp_path: Path) -> None:
    assert quantized(5).exit_code == 0
    with Packfile(tmp_path / "c.tqkv", read_bundle(BUNDLE), file_sha256(BUNDLE)) as file:
        forwards = [item.read()["unmasked"] for item in file]
        items = list(file)
        assert all(set(item.read()) == set(items[0].read()) for item in reversed(items))
        assert len(forwards) == len(file) == 5


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c.tqkv"
    path.write_bytes(CACHES.read_bytes())
    with Packfile(path) as file:
        first = next(iter(file))
        first.read()
        with path.open("r+b") as stream:
            stream.write(b"PK")
        with pytest.raises(BundleError, match="changed while it was read"):
            first.read()
        with pytest.raises(BundleError, match="changed while it was read"):
            list(file)


def test_beyond_4_GiB_sizes_are_those_of_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    path = tmp_path / "c.tqkv"
    write_packfile(path, read_bundle(BUNDLE), file_sha256(BUNDLE), made_up(50))
    assert b"PK\x06\x06" in path.read_bytes()[-300:], "the zip's end of central directory, of 64 bits"
    assert facts_of(path)["proteins"] == 50


def forged(path: Path, change: Callable[[list[Any], dict[str, Any], dict[str, bytes]], object]) -> None:
    """The golden file with a change, its sizes and hashes made right again."""
    with zipfile.ZipFile(CACHES) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    manifest = json.loads(parts.pop(archive.MANIFEST))
    lines = [json.loads(line) for line in parts[cache_file.PROTEINS].splitlines()]
    raw = change(lines, manifest, parts)
    text = raw if isinstance(raw, bytes) else b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    parts[cache_file.PROTEINS] = text
    manifest["parts"] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in parts.items()
    }
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (parts | {archive.MANIFEST: json.dumps(manifest).encode()}).items():
            file.writestr(name, data)


FORGERIES: dict[str, Callable[[list[Any], dict[str, Any], dict[str, bytes]], object]] = {
    "another-order": lambda lines, _m, _p: lines.reverse(),
    "one-too-few": lambda lines, _m, _p: lines.pop(),
    "one-too-many": lambda lines, manifest, _p: (lines.append(lines[0]), manifest.update(proteins=3)),
    "more-bytes": lambda lines, _m, parts: parts.update({cache_file.CACHES: parts[cache_file.CACHES] + b"x"}),
    "no-hash": lambda lines, _m, _p: lines[0].update(sha256=None),
    "terabytes": lambda lines, _m, _p: lines[0].update(stored=10**13),
    "less-than-nothing": lambda lines, _m, _p: lines[0].update(stored=-1),
    "too-many-tokens": lambda lines, _m, _p: lines[1].update(cached=400),
    "no-tokens": lambda lines, _m, _p: lines[1].update(cached=0),
    "text-for-bytes": lambda lines, _m, _p: lines[1].update(bytes="many"),
    "no-sequence": lambda lines, _m, _p: lines[1].pop("sequence"),
    "no-residues": lambda lines, _m, _p: lines[1].update(sequence="MKT1"),
    "a-name-that-steers": lambda lines, _m, _p: lines[1].update(accession="\x1b[2J"),
    "a-long-name": lambda lines, _m, _p: lines[1].update(accession="n" * 301),
    "nan": lambda lines, _m, _p: lines[1].update(bytes=float("nan")),
    "a-list": lambda lines, _m, _p: lines.__setitem__(0, [1]),
    "not-json": lambda *_: b"hello\nworld\n",
    "not-text": lambda *_: b"\xff\n\xfe\n",
    "deep": lambda *_: b"[" * 100_000 + b"\n\n",
    "a-line-without-end": lambda *_: b"[" + b" " * (9 << 20) + b"\n\n",
    "no-count": lambda _l, manifest, _p: manifest.update(proteins="2"),
    "none": lambda _l, manifest, _p: manifest.update(proteins=0),
    "a-part-more": lambda _l, _m, parts: parts.update(more=b"x"),
    "a-later-version": lambda _l, manifest, _p: manifest.update(format_version=3),
    "an-earlier-version": lambda _l, manifest, _p: manifest.update(format_version=1),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged_caches_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c.tqkv"
    forged(path, FORGERIES[kind])
    message = refused(run("report", path), 5)
    assert str(path) in message and len(message) < 600


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_caches_that_were_cut_off_are_refused(share: float, tmp_path: Path) -> None:
    path, data = tmp_path / "c.tqkv", CACHES.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "cut off" in refused(run("report", path), 5)


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    path, data, whole = tmp_path / "c.tqkv", CACHES.read_bytes(), facts_of(CACHES)
    for at in range(0, len(data), len(data) // 150):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            found = facts_of(path)
        except BundleError as error:
            assert "\n" not in str(error)
        else:
            assert found["parts"] == whole["parts"]
