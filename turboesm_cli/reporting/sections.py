"""Frame of results → sections of tables and plots, one section per model.

Needs neither torch nor a GPU: everything shown comes from the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turboesm_cli.reporting.grouping import Gathered, Rows, gathered
from turboesm_cli.reporting.plots import Plot, plots
from turboesm_cli.reporting.results import ResultRow, rows_of_frame
from turboesm_cli.reporting.tables import Table, tables

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Section:
    """All that a report says of one model."""

    model: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]


def sections(frame: pd.DataFrame) -> list[Section]:
    """One section for each model of a frame that `results.read_csv` made, in order of appearance."""
    by_model: dict[str, list[ResultRow]] = {}
    for row in rows_of_frame(frame):
        by_model.setdefault(row.model, []).append(row)
    return [_section(model, rows) for model, rows in by_model.items()]


def _section(model: str, rows: Sequence[ResultRow]) -> Section:
    found = gathered(rows)
    return Section(model, _facts(rows, found), tuple(tables(found.rows)), tuple(plots(found.rows)))


def _facts(rows: Rows, found: Gathered) -> tuple[tuple[str, str], ...]:
    named = {
        "Device": "device",
        "Arithmetic": "dtype",
        "turboesm": "version",
        "torch": "torch",
        "Commit": "commit",
        "Seed": "seed",
        "Date": "date",
    }
    facts = [(name, _distinct(rows, field)) for name, field in named.items()]
    if found.again:
        facts.append(("Measured again", f"{found.again:,} of {len(rows):,} figures; the last of each is shown"))
    if found.combined:
        facts.append(("Combined", f"{found.combined:,} figures are of the proteins of several measurements"))
    if found.left_out:
        reason = "no such figure of several measurements together, or of residues that the model had seen"
        facts.append(("Left out", f"{', '.join(found.left_out)}: {reason}"))
    return tuple((name, text) for name, text in facts if text)


def _distinct(rows: Rows, field: str) -> str:
    return ", ".join(sorted({str(getattr(row, field)) for row in rows} - {""}))
