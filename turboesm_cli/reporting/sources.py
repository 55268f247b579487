"""The files that a report shows: their names and hashes, and their rows as one CSV text."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turboesm_cli.reporting.results import rows_of_frame, write_rows

if TYPE_CHECKING:
    import pandas as pd

DATA_LIMIT = 100_000
"""Rows of which a page holds the data, some 30 MB: with more it would be hard to open."""


@dataclass(frozen=True)
class Sources:
    """lines: what a reader should know of the files. csv: their rows, "" where they are too many for a page."""

    lines: tuple[str, ...]
    csv: str


def sources(paths: Sequence[Path], frame: pd.DataFrame) -> Sources:
    """The files that `frame` was read from."""
    lines = [f"{path.name}, sha256 {_sha256(path)}" for path in paths]
    if len(frame) > DATA_LIMIT:
        kept = f"The data are not in this page: {len(frame):,} rows are more than {DATA_LIMIT:,}. Keep the files."
        return Sources((*lines, kept), "")
    stream = io.StringIO(newline="")
    write_rows(stream, rows_of_frame(frame))
    return Sources(tuple(lines), stream.getvalue())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
