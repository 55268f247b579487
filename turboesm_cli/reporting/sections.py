"""Frame of results → sections of tables and plots, one section per model, each in parts under a heading.

Needs neither torch nor a GPU: everything shown comes from the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from turboesm_cli.reporting import overview, plots, tables
from turboesm_cli.reporting.drawing import Plot
from turboesm_cli.reporting.glossary import Term, terms
from turboesm_cli.reporting.grouping import Gathered, Rows, gathered, seen
from turboesm_cli.reporting.proteins import compared, recipes_of
from turboesm_cli.reporting.results import ResultRow, rows_of_frame
from turboesm_cli.reporting.tables import Table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Part:
    """What a section shows under one heading."""

    title: str
    plots: tuple[Plot, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Section:
    """All that a report says of one model.

    summary  sentences for who reads no further
    caveats  what the figures are not
    facts    names and values: where and with what it was measured
    """

    model: str
    summary: tuple[str, ...]
    caveats: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]
    terms: tuple[Term, ...]

    @property
    def plots(self) -> tuple[Plot, ...]:
        return tuple(plot for part in self.parts for plot in part.plots)

    @property
    def tables(self) -> tuple[Table, ...]:
        return tuple(table for part in self.parts for table in part.tables)


KERNELS = "attention kernels"
"""What the section of all shapes is called."""


def sections(frame: pd.DataFrame) -> list[Section]:
    """One section for each model of a frame that `results.read_csv` made, in order of appearance.

    Kernels have one for all shapes, which stand where other rows name a family.
    """
    rows = rows_of_frame(frame)
    by_model: dict[str, list[ResultRow]] = {}
    for row in rows:
        if row.protocol == "kernel":
            row = replace(row, model=KERNELS, family=row.model)
        by_model.setdefault(row.model, []).append(row)
    recipes = recipes_of(rows)
    return [_section(model, mine, recipes) for model, mine in by_model.items()]


def _section(model: str, measured: Sequence[ResultRow], recipes: Sequence[str]) -> Section:
    found = gathered(measured)
    rows = found.rows
    return Section(
        model,
        overview.sentences(rows),
        overview.caveats(rows),
        _facts(measured, found),
        tuple(_parts(rows, recipes)),
        terms(rows),
    )


def _parts(rows: Rows, recipes: Sequence[str]) -> list[Part]:
    """The parts that the rows can fill, the decision first."""
    errors, others = tables.error_tables(rows, compared(rows))
    parts = (
        _part("What was measured", [], [overview.counts_table(rows)]),
        _part("Error against memory", [plots.frontier_plot(rows, recipes)], errors),
        _part("Error by family", [plots.family_plot(rows, recipes)], [*tables.language_tables(rows), *others]),
        _part("Error against length", [plots.length_plot(rows, recipes)], []),
        _part("Memory and time", [plots.memory_plot(rows, recipes)], tables.cost_tables(rows)),
        _part("Drift, which is no error of compression", [], [tables.drift_table(rows)]),
        _part("Proteins that fare worst", [], [tables.worst_table(rows)]),
        _part("Further figures", [], tables.further_tables(rows)),
    )
    return [part for part in parts if part.plots or part.tables]


def _part(title: str, drawn: Sequence[Plot | None], written: Sequence[Table | None]) -> Part:
    return Part(title, tuple(filter(None, drawn)), tuple(filter(None, written)))


def _facts(rows: Rows, found: Gathered) -> tuple[tuple[str, str], ...]:
    named = {
        "Device": "device",
        "Arithmetic": "dtype",
        "turboesm": "version",
        "torch": "torch",
        "Commit": "commit",
        "Seed": "seed",
        "Date": "date",
        "Prompt": "prompt",
        "Set of proteins": "inputs",
    }
    facts = [(name, _distinct(rows, field)) for name, field in named.items()]
    facts += [("Calibration set", "; ".join(overview.calibrations(rows)))]
    facts += [("Command", "; ".join(seen(row.command for row in rows if row.command)))]
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
