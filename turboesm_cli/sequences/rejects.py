"""Records that were skipped, as a table: tab-separated, one row per record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from turboesm_cli.errors import OutputError
from turboesm_cli.outputs.files import atomic_output, check_output

HEADER = "accession\trecord\tline\treason\tsource\n"


@dataclass(frozen=True)
class Reject:
    """A record that was skipped, and why."""

    source: str
    record: int
    line: int
    accession: str
    reason: str


def check_rejects(path: Path) -> None:
    """Raise OutputError where `path` is something else than a table of rejects, which may be replaced."""
    check_output(path, may_exist=True)
    try:
        start = b""
        if path.exists():
            with path.open("rb") as stream:
                start = stream.read(len(HEADER))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another path for --rejects") from error
    if start not in (b"", HEADER.encode()):
        raise OutputError(f"{path} exists and is no table of rejects; choose another path for --rejects")


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write a table of skipped records, whole or not at all. Raises OutputError."""
    with atomic_output(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(HEADER)
        for reject in rejects:
            cells = (reject.accession, reject.record, reject.line, reject.reason, reject.source)
            stream.write("\t".join(_cell(cell) for cell in cells) + "\n")


def _cell(value: object) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in str(value))
