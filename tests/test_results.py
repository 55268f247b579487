"""Result rows on disk: golden bytes, there and back, and every way in which a file can be wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from turboesm_cli.errors import InputError, OutputError
from turboesm_cli.reporting import results
from turboesm_cli.reporting.results import COLUMNS, ResultRow, read_csv, rows_of_frame, to_records, write_csv

ERROR = ResultRow(
    model="esm2_t6_8M_UR50D",
    recipe="flat",
    bits_k=3,
    bits_v=2.5,
    family="tm",
    protocol="decode",
    metric="error",
    value=0.1 + 0.2,
    unit="1",
    n=80,
    device="NVIDIA H200",
    dtype="float32",
    seed=7,
    version="0.1.0",
    commit="abc+dirty",
)
TIME = dataclasses.replace(
    ERROR,
    protocol="time",
    metric="us_per_token",
    value=12.0,
    p20=11.5,
    p80=1e-7,
    tokens=1024,
    date="2026-01-02",
)
GOLDEN = (
    b"model,recipe,bits_k,bits_v,family,protocol,metric,value,unit,n,device,dtype,seed,version,commit,"
    b"accession,tokens,p20,p80,torch,date,inputs,prompt,"
    b"calibration,calibration_source,calibration_proteins,calibration_tokens,calibration_seen,command\n"
    b"esm2_t6_8M_UR50D,flat,3.0,2.5,tm,decode,error,0.30000000000000004,1,80,NVIDIA H200,float32,7,0.1.0,"
    b"abc+dirty,,0,,,,,,,,,0,0,0,\n"
    b"esm2_t6_8M_UR50D,flat,3.0,2.5,tm,time,us_per_token,12.0,1,80,NVIDIA H200,float32,7,0.1.0,"
    b"abc+dirty,,1024,11.5,1e-07,,2026-01-02,,,,,0,0,0,\n"
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    write_csv(path, [ERROR, TIME])
    return path


def spoil(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_csv([path])
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_golden_bytes(written: Path) -> None:
    assert written.read_bytes() == GOLDEN


def test_there_and_back(written: Path) -> None:
    frame = read_csv([written])
    assert tuple(frame.columns) == COLUMNS
    assert rows_of_frame(frame) == [ERROR, TIME]
    assert frame["value"].tolist() == [0.1 + 0.2, 12.0]


def test_awkward_text_and_numbers_come_back(tmp_path: Path) -> None:
    row = dataclasses.replace(ERROR, model='a,"b"\r\nc', recipe="é<&>", value=math.inf, n=2**62, commit=" NA ")
    write_csv(tmp_path / "a.csv", [row])
    assert rows_of_frame(read_csv([tmp_path / "a.csv"])) == [row]


def test_several_files_keep_their_order(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    write_csv(other, [dataclasses.replace(ERROR, model="second")])
    assert read_csv([written, other])["model"].tolist()[-1] == "second"
    assert read_csv([other, written])["model"].tolist()[0] == "second"


def test_json_records_read_as_csv_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(to_records([ERROR, TIME]), allow_nan=False))
    assert rows_of_frame(read_csv([path])) == [ERROR, TIME]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_records_are_json_safe(value: float, tmp_path: Path) -> None:
    records = to_records([dataclasses.replace(ERROR, value=value)])
    assert records[0]["value"] is None and records[0]["n"] == 80
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(records, allow_nan=False))
    assert math.isnan(read_csv([path])["value"][0])


def test_unknown_columns_and_blank_lines_are_ignored(written: Path) -> None:
    lines = written.read_text().splitlines()
    written.write_text("\n".join([lines[0] + ",extra", lines[1] + ",x", "", lines[2] + ",y"]) + "\n\n")
    assert rows_of_frame(read_csv([written])) == [ERROR, TIME]


def test_optional_columns_get_their_defaults(tmp_path: Path) -> None:
    required = {name: value for name, value in to_records([ERROR])[0].items() if name in results.REQUIRED}
    path = tmp_path / "rows.csv"
    path.write_text(",".join(required) + "\n" + ",".join(map(str, required.values())) + "\n")
    assert rows_of_frame(read_csv([path])) == [ERROR]


def test_what_spreadsheets_write_is_read(written: Path) -> None:
    text = written.read_text().replace(",80,", ",80.0,").replace("\n", "\r\n")
    written.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert rows_of_frame(read_csv([written])) == [ERROR, TIME]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("0.30000000000000004", "much", "line 2: value is 'much', expected a number"),
        ("0.30000000000000004", "", "line 2: value is '', expected a number"),
        (",80,", ",80.5,", "line 2: n is '80.5', expected a whole number"),
        (",80,", ",nan,", "line 2: n is 'nan', expected a whole number"),
        (",80,", ",inf,", "line 2: n is 'inf', expected a whole number"),
        (",80,", ",9223372036854775808,", "expected a whole number"),
        (",1024,", ",long,", "line 3: tokens is 'long', expected a whole number"),
        ("11.5", "fast", "line 3: p20 is 'fast', expected a number or nothing"),
        ("esm2_t6_8M_UR50D", " ", "line 2: model is ' ', expected a name"),
        ("flat", "flat,flat", "line 2: 30 cells under 29 columns"),
        ("model,recipe,", "model,", "no column recipe"),
        ("model,recipe,bits_k", "name,recipe,k", "no column model, bits_k"),
        ("torch", "model", "column model appears twice"),
        ("flat", '"flat', "line 3: not CSV"),
        ("flat", '"fl"at', "line 2: not CSV"),
        ("flat", "x" * 140_000, "line 2: not CSV"),
    ],
)
def test_a_spoiled_file_is_named_with_its_line(written: Path, old: str, new: str, said: str) -> None:
    assert said in refusal(spoil(written, old, new))


def test_a_long_wrong_cell_is_cut(written: Path) -> None:
    assert len(refusal(spoil(written, "0.30000000000000004", "x" * 5000))) < len(str(written)) + 150


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "expected a list of records"),
        ("[1]", "record 1: expected an object"),
        ('[{"model": "a"}]', "record 1: no column recipe"),
        ("[]", "holds no results"),
        ("", "is empty"),
        (" ", "not JSON"),
        ("[1,]", "record 1: expected an object"),
        ("[{},]", "no column"),
        ("[] []", "not JSON"),
        ("[" + " " * 100_000, "not JSON"),
        ('["' + "x" * (2 << 20) + '"]', "not JSON"),
    ],
)
def test_json_that_is_no_result(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert said in refusal(path)


@pytest.mark.parametrize(
    "wrong", [{"value": True}, {"value": "x"}, {"model": ["a"]}, {"n": None}, {"unit": None}, {"p20": []}]
)
def test_json_cells_of_another_type(tmp_path: Path, wrong: dict[str, object]) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([to_records([ERROR])[0] | wrong]))
    assert f"record 1: {next(iter(wrong))} is" in refusal(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n\n", "no column model"),
        ("a.csv", GOLDEN.splitlines()[0], "holds no results"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\x00\xff", "not UTF-8"),
        ("a.json", b"\xff\xfe[]", "not UTF-8"),
        ("a.csv", b"<html><body>404</body></html>", "no column model"),
        ("a.txt", GOLDEN, "expected a .csv file"),
        ("a.tqz", GOLDEN, "expected a .csv file"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert said in refusal(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "not a file" in refusal(tmp_path / "folder.csv")


def test_a_failed_write_leaves_what_was_there(written: Path, tmp_path: Path) -> None:
    def broken() -> object:
        yield ERROR
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_csv(written, broken())  # type: ignore[arg-type]
    assert written.read_bytes() == GOLDEN
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
    with pytest.raises(OutputError):
        write_csv(written / "below.csv", [ERROR])


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "turboesm_cli").mkdir()
    source = tmp_path / "turboesm_cli" / "a.py"
    source.write_text("1")
    assert results.commit_of(tmp_path) == ""
    git(tmp_path, "init", "-q")
    assert results.commit_of(tmp_path) == ""  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert results.commit_of(tmp_path) == head
    source.write_text("2")
    assert results.commit_of(tmp_path) == head + "+dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.commit_of(tmp_path) == ""  # no git


def test_commit_is_empty_where_git_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "turboesm_cli").mkdir()
    program = tmp_path / "git"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(results, "GIT_SECONDS", 0.2)
    assert results.commit_of(tmp_path) == ""


def test_reading_results_needs_no_torch(written: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from turboesm_cli.reporting.results import read_csv;"
        "read_csv([Path(sys.argv[1])]);"
        "assert not {'torch', 'esm', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(written)], check=True)
