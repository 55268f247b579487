"""Measurements as a tidy table: one row per figure, with its unit, spread, device, version and commit.

`write_csv` and `to_records` put rows out; `read_csv` reads CSV files, and the JSON that `--json` prints, back
into one checked data frame, row by row: files may be of any size, since what writes them knows no limit. Nothing
is computed here.
"""

from __future__ import annotations

import csv
import io
import math
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from turboesm_cli.errors import InputError
from turboesm_cli.outputs.files import atomic_output
from turboesm_cli.outputs.shard_records import Seal
from turboesm_cli.reporting.json_list import list_values

if TYPE_CHECKING:
    import pandas as pd

GIT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One measured figure, and what is needed to measure it again."""

    model: str
    recipe: str
    bits_k: float  # payload bits asked for
    bits_v: float
    family: str  # tm, idr, enzyme, globular, peptide, all or ""
    protocol: str  # decode, paper, memory, time, layer, drift, ...
    metric: str  # error, cosine_mean, bits_per_value, bytes, us_per_token, ...
    value: float
    unit: str
    n: int  # tokens, proteins or repeats behind the value
    device: str
    dtype: str
    seed: int
    version: str
    commit: str
    accession: str = ""  # set on rows about one protein
    tokens: int = 0  # context length that the row is about, else 0
    p20: float | None = None  # spread of a timing
    p80: float | None = None
    torch: str = ""
    date: str = ""  # ISO date
    inputs: str = ""  # start of a sha256 of the proteins that the figure is of, where it is of proteins
    prompt: str = ""  # what of a protein was prompt, in protocol prompted: all, 0.5, 40, stored
    calibration: str = ""  # start of a sha256 of the proteins that the codec was fitted to, where there is one
    calibration_source: str = ""  # name of their file
    calibration_proteins: int = 0
    calibration_tokens: int = 0
    calibration_seen: int = 0  # proteins of the whole measurement that a codec had been fitted to
    command: str = ""  # that measured it, without what figures do not follow from; not on rows about one protein


COLUMNS = tuple(field.name for field in fields(ResultRow))
HEAD = ",".join(COLUMNS) + "\n"
"""The first line of a CSV file."""
REQUIRED = tuple(field.name for field in fields(ResultRow) if field.default is MISSING)
SPREAD = ("p20", "p80")
FLOATS = ("bits_k", "bits_v", "value", *SPREAD)
WHOLE = ("n", "seed", "tokens", "calibration_proteins", "calibration_tokens", "calibration_seen")
Reader = Callable[[Path], Iterator[tuple[str, Mapping[str, Any]]]]
"""A file -> (where, record) for each of its records."""


def write_csv(path: Path, rows: Iterable[ResultRow], seal: Seal | None = None) -> None:
    """Write `rows` to `path`, whole or not at all; the same rows always give the same bytes.

    `seal`: of a shard.
    """
    with (
        atomic_output(path, seal) as partial,
        partial.open("w", encoding="utf-8", errors=_HOW, newline="") as stream,
    ):
        write_rows(stream, rows)


def csv_bytes(rows: Iterable[ResultRow]) -> bytes:
    """Rows as `write_csv` writes them, without the line of columns."""
    text = io.StringIO(newline="")
    _write_rows(text, rows)
    return text.getvalue().encode("utf-8", _HOW)


def write_rows(stream: TextIO, rows: Iterable[ResultRow]) -> None:
    """Rows as CSV with a header."""
    stream.write(HEAD)
    _write_rows(stream, rows)


def _write_rows(stream: TextIO, rows: Iterable[ResultRow]) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([_to_text(value) for value in _plain(row).values()] for row in rows)


_HOW = "backslashreplace"
"""A file's name that is no UTF-8 may be a family's: no reason to lose the work at its end."""


def to_records(rows: Iterable[ResultRow]) -> list[dict[str, Any]]:
    """Rows as JSON-safe dictionaries: JSON has no NaN or infinity, so these become None."""
    return list(map(to_record, rows))


def to_record(row: ResultRow) -> dict[str, Any]:
    """One row, as in `to_records`."""
    return {name: _to_json(value) for name, value in _plain(row).items()}


def read_csv(paths: Sequence[Path]) -> pd.DataFrame:
    """Read result files (`.csv`, or `.json` from `--json`) into one frame, in the order given.

    Its columns are COLUMNS: others in the files are ignored, missing optional ones get their defaults.
    Raises InputError for a file that is missing, of another kind, or holds what it should not.
    """
    return frame(row for path in paths for row in read_rows(Path(path)))


def frame(rows: Iterable[ResultRow]) -> pd.DataFrame:
    """Rows as a frame with the columns COLUMNS."""
    import numpy as np
    import pandas as pd

    columns = {name: _empty_column(name) for name in COLUMNS}
    for row in rows:
        for name, column in columns.items():
            value = getattr(row, name)
            column.append(math.nan if value is None else value)
    values = {
        name: np.asarray(column) if isinstance(column, array) else column for name, column in columns.items()
    }
    return pd.DataFrame(values, columns=list(COLUMNS))


def read_rows(path: Path) -> Iterator[ResultRow]:
    """The rows of one file, one by one. Raises InputError as `read_csv` does."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"cannot read {path}: expected a .csv file, or .json that --json printed")
    return _rows_of(path, reader)


def csv_rows(path: Path) -> Iterator[ResultRow]:
    """The rows of a file that `write_csv` wrote, whatever its name."""
    return _rows_of(path, _csv_records)


def _rows_of(path: Path, reader: Reader) -> Iterator[ResultRow]:
    _check_file(path)
    empty = True
    try:
        for where, record in reader(path):
            empty = False
            yield _row(record, where)
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: not UTF-8 text; give a CSV or JSON file of results") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    if empty:
        raise InputError(f"{path} holds no results; run the measurement again")


def rows_of_frame(frame: pd.DataFrame) -> list[ResultRow]:
    """The rows of a frame that `read_csv` made."""
    columns = {name: frame[name].astype(object).tolist() for name in COLUMNS}
    for name in SPREAD:  # a missing number is NaN to pandas, None to a row
        columns[name] = [None if value != value else value for value in columns[name]]
    return [ResultRow(*values) for values in zip(*columns.values(), strict=True)]


@cache
def commit_of_source() -> str:
    """The git commit that turboesm runs from, with "+dirty" where tracked files are modified.

    $TURBOESM_COMMIT where it is set, for copies of a checkout without its history; "" where turboesm
    is not run from a git checkout of its own, or git is missing, slow or fails.
    """
    return os.environ.get("TURBOESM_COMMIT") or commit_of(Path(__file__).resolve().parents[2])


def commit_of(root: Path) -> str:
    """The git commit of the checkout at `root`, as in `commit_of_source`; "" where none can be told."""
    if not (root / ".git").exists() or not (root / "turboesm_cli").is_dir():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+dirty", "--abbrev=40", "--exclude=*"]
    # A GIT_DIR left by a hook would name another repository; optional locks would write to this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=GIT_SECONDS, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _plain(row: ResultRow) -> dict[str, Any]:
    # 3, 3.0 and a numpy scalar are one number, so they are written as one.
    cells = asdict(row)
    return cells | {name: float(cells[name]) for name in FLOATS if cells[name] is not None}


def _to_text(value: object) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def _to_json(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _empty_column(name: str) -> list[Any] | array[Any]:
    """Where a column's values go: a number takes 8 bytes, a text as much for each time that it occurs."""
    if name in FLOATS:
        return array("d")
    return array("q") if name in WHOLE else []


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    if not path.is_file():
        raise InputError(f"cannot read {path}: not a file; give a CSV or JSON file of results")
    if size == 0:
        raise InputError(f"{path} is empty; run the measurement again")


def _csv_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, record) for each record, read row by row so that an error can name its line."""
    # utf-8-sig: spreadsheets put a byte-order mark first.
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            _check_columns(header, str(path))
            for cells in reader:
                if cells:
                    where = f"{path} line {reader.line_num}"
                    yield where, _csv_record(header, cells, where)
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num}: not CSV ({error}); give a CSV file") from error


def _csv_record(header: Sequence[str], cells: Sequence[str], where: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise InputError(f"{where}: {len(cells)} cells under {len(header)} columns; mend or remove the line")
    return dict(zip(header, cells, strict=True))


def _json_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for index, record in enumerate(_json_values(path), start=1):
        where = f"{path} record {index}"
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object with the columns of a result; remove it")
        _check_columns(list(record), where)
        yield where, {name: _json_cell(name, value) for name, value in record.items()}


def _json_values(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as stream:
        try:
            yield from list_values(stream)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error}); give what --json printed") from error
        except TypeError as error:
            raise InputError(f"{path}: expected a list of records; give what --json printed") from error


# A further kind of input is a further suffix here.
_READERS: Mapping[str, Reader] = {
    ".csv": _csv_records,
    ".json": _json_records,
}


def _json_cell(name: str, value: object) -> object:
    """A JSON value as the CSV would hold it; null is a NaN that JSON could not say, or a missing spread."""
    if value is None and name in FLOATS:
        return "" if name in SPREAD else "nan"
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check_columns(header: Sequence[str], where: str) -> None:
    if missing := [name for name in REQUIRED if name not in header]:
        raise InputError(f"{where}: no column {', '.join(missing)}; give a file that turboesm wrote")
    if doubled := [name for name in COLUMNS if header.count(name) > 1]:
        raise InputError(f"{where}: column {', '.join(doubled)} appears twice; remove one")


def _row(record: Mapping[str, Any], where: str) -> ResultRow:
    return ResultRow(**{name: _cell(name, record[name], where) for name in COLUMNS if name in record})


def _cell(name: str, text: object, where: str) -> Any:
    expected, convert = _KINDS[name]
    try:
        if not isinstance(text, str):
            raise ValueError
        return convert(text)
    except (ValueError, OverflowError):
        raise InputError(f"{where}: {name} is {_quote(text)}, expected {expected}; mend or remove it") from None


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _integer(text: str) -> int:
    # Spreadsheets and pandas write 3 as 3.0 in a column with a gap.
    value = int(text) if text.lstrip("+-").isdigit() else float(text)
    if value != int(value) or abs(value) >= 2**63:
        raise ValueError
    return int(value)


def _optional_float(text: str) -> float | None:
    return float(text) if text else None


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text


_TEXT: tuple[str, Callable[[str], Any]] = ("text", sys.intern)  # the same few words in every row
_NUMBER: tuple[str, Callable[[str], Any]] = ("a number", float)
_WHOLE: tuple[str, Callable[[str], Any]] = ("a whole number", _integer)
_SPREAD_CELL: tuple[str, Callable[[str], Any]] = ("a number or nothing", _optional_float)
_NAME: tuple[str, Callable[[str], Any]] = ("a name", _name)
_KINDS = dict.fromkeys(COLUMNS, _TEXT)
_KINDS |= dict.fromkeys(("model", "protocol", "metric"), _NAME)
_KINDS |= dict.fromkeys(FLOATS, _NUMBER)
_KINDS |= dict.fromkeys(WHOLE, _WHOLE)
_KINDS |= dict.fromkeys(SPREAD, _SPREAD_CELL)
