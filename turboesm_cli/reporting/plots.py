"""Result rows → plots. What they look like is in `drawing`.

Each function takes the rows of one model and the recipes of the whole page, in which a recipe has one colour, and
gives nothing where the rows hold nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from turboesm_cli.reporting import proteins
from turboesm_cli.reporting.drawing import (
    HEIGHT,
    PAPER,
    Line,
    Plot,
    canvas,
    draw_dots,
    draw_lines,
    height_beside,
    label_below,
    label_points,
    label_right,
    length_axis,
    log_axis,
    short,
    styles,
)
from turboesm_cli.reporting.grouping import (
    Rows,
    Variant,
    bits_held,
    budget_text,
    code_of,
    families_of,
    labels,
    memory_curves,
    variant_of,
)
from turboesm_cli.reporting.proteins import ProteinError
from turboesm_cli.reporting.results import ResultRow
from turboesm_cli.reporting.tables import MIB

ERROR = "error: 1 minus mean cosine (log scale)"
LANE = 0.18  # inches of height of a recipe within a family
SPREAD = (0.1, 0.9)
"""Quantiles over proteins between which the frontier's bars go."""
DOTS = 4000
"""Of a recipe, at most: with more a page would be slow, and its dots one blot."""
Drawn = TypeVar("Drawn")


def frontier_plot(rows: Rows, recipes: Sequence[str]) -> Plot | None:
    """Error against the bits held for a value, a line a recipe, with the spread over proteins."""
    held = bits_held(rows)
    overall = families_of(_errors(rows))[-1:]
    chosen = [row for row in _errors(rows) if (row.family or "all") in overall]
    chosen = [row for row in chosen if math.isfinite(held.get(code_of(variant_of(row)), math.nan))]
    if not chosen:
        return None
    names, drawn = labels(map(variant_of, chosen)), styles(recipes, map(variant_of, chosen))
    whole = labels(map(variant_of, chosen), bits=True)
    at = {variant_of(row): (held[code_of(variant_of(row))], row.value) for row in chosen}
    lines: dict[str, Line] = {}
    for variant, point in at.items():
        # Variants of one recipe share a name, so a line, whatever their bits.
        alone = list(names.values()).count(names[variant]) == 1
        line = lines.setdefault(names[variant], Line((whole if alone else names)[variant], drawn[variant]))
        line.points.append(point)
    several = {name for name, line in lines.items() if len(line.points) > 1}
    budgets = [(*at[variant], budget_text(variant)) for variant, name in names.items() if name in several]
    with canvas(f"Error against memory, {_of(overall[0])}") as (axes, publish):
        spread = False
        for variant, low, high in _spreads(rows, overall[0]):
            if variant in drawn:
                spread = True
                axes.vlines(held[code_of(variant)], low, high, color=drawn[variant].colour, alpha=0.4, linewidth=4)
        draw_lines(axes, lines.values())
        label_points(axes, budgets)
        axes.margins(x=0.1)  # for the letters beside the first points
        log_axis(axes, "y", ERROR)
        note = "\nbars: the middle 80 % of the proteins" if spread else ""
        label_below(axes, f"bits held for a value, everything counted{note}")
        return publish("error-against-bits", "A line a recipe; the table of errors has the same numbers.")


def family_plot(rows: Rows, recipes: Sequence[str]) -> Plot | None:
    """Error by family: a mark a recipe, and a dot a protein where there are rows of proteins."""
    chosen = _errors(rows)
    if not chosen:
        return None
    cells = {(variant_of(row), row.family or "all"): row.value for row in chosen}
    names = labels((variant for variant, _ in cells), bits=True)
    families, drawn, each = families_of(chosen), styles(recipes, names), _each_protein(rows)
    ticks: list[tuple[float, str]] = []
    dots = False
    with canvas("Error by protein family", HEIGHT / 3 + LANE * len(families) * (len(names) + 1)) as (
        axes,
        publish,
    ):
        for index, family in enumerate(families):
            top = index * (len(names) + 1)
            ticks.append((top, short(family)))
            for lane, (variant, name) in enumerate(names.items(), start=top + 1):
                ticks.append((lane, short(name)))
                mine = _thinned([p.error for p in each.get(variant, ()) if family in (p.family, "all")])
                dots = dots or bool(mine)
                draw_dots(axes, zip(sorted(mine), _jitter(lane, len(mine)), strict=True), drawn[variant].colour)
                if (variant, family) in cells:
                    axes.plot(
                        cells[variant, family], lane, marker=drawn[variant].marker, color=drawn[variant].colour,
                        markeredgecolor=PAPER, markeredgewidth=0.5, markersize=8, zorder=3,
                    )  # fmt: skip
        axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=8.5)
        for tick in axes.get_yticklabels()[:: len(names) + 1]:
            tick.set(fontweight="bold", fontsize=9.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.set_ylim(len(ticks) - 0.3, -0.7)
        log_axis(axes, "x", f"{ERROR}\nmark: all tokens together" + ("; dot: a protein" if dots else ""))
        return publish("error-by-family", "Marks and dots on a log scale; the table of errors has the marks.")


def length_plot(rows: Rows, recipes: Sequence[str]) -> Plot | None:
    """Error against length, a dot a protein."""
    each = _each_protein(rows)
    if len({p.tokens for found in each.values() for p in found}) < 2:
        return None
    names, drawn = labels(each, bits=True), styles(recipes, each)
    with canvas("Error by length of the protein: a dot a protein", height_beside(len(names))) as (axes, publish):
        ends = {}
        for variant, found in each.items():
            draw_dots(axes, [(p.tokens, p.error) for p in _thinned(found)], drawn[variant].colour)
            ends[names[variant]] = (_at_the_right(found), drawn[variant])
        lengths = [p.tokens for found in each.values() for p in found]
        log_axis(axes, "y", ERROR)
        if max(lengths) >= 4 * min(lengths):
            length_axis(axes, _powers(min(lengths), max(lengths)), "tokens decoded")
        else:
            label_below(axes, "tokens decoded")
        label_right(axes, ends)
        return publish("error-against-length", "A cloud a recipe, named at the right beside its longest proteins.")


def memory_plot(rows: Rows, recipes: Sequence[str]) -> Plot | None:
    """Bytes held against the length of the context; one length makes no plot, the table says all."""
    curves = memory_curves(rows)
    lengths = sorted({length for curve in curves.values() for length in curve})
    if len(lengths) < 2:
        return None
    names, drawn = labels(curves, bits=True), styles([*recipes, *(v.recipe for v in curves)], curves)
    with canvas("Memory of the cache, by length of the context", height_beside(len(names))) as (axes, publish):
        ends = {}
        for variant, curve in curves.items():
            points = [(length, size / MIB) for length, size in sorted(curve.items())]
            axes.plot(*zip(*points, strict=True), **drawn[variant].of_line(), markersize=5, linewidth=1.6)
            ends[names[variant]] = (points[-1][1], drawn[variant])
        log_axis(axes, "y", "memory held (MiB, log scale)")
        length_axis(axes, lengths, "tokens of context")
        label_right(axes, ends)
        return publish("memory-by-length", "A line a format; the table of memory has the same numbers.")


def _errors(rows: Rows) -> list[ResultRow]:
    """Errors of whole-model decoding that a log axis can show."""
    return [row for row in proteins.errors(rows) if row.value > 0 and math.isfinite(row.value)]


def _each_protein(rows: Rows) -> dict[Variant, list[ProteinError]]:
    """Proteins' errors that a log axis can show."""
    found = {
        variant: [p for p in each if p.error > 0 and p.tokens > 0]
        for variant, each in proteins.protein_errors(rows).items()
    }
    return {variant: each for variant, each in found.items() if each}


def _spreads(rows: Rows, family: str) -> Iterator[tuple[Variant, float, float]]:
    """Quantiles `SPREAD` of the errors of a family's proteins, a variant's where it has three or more."""
    for variant, each in _each_protein(rows).items():
        mine = [p.error for p in each if family in (p.family, "all")]
        if len(mine) > 2:
            yield variant, proteins.quantile(mine, SPREAD[0]), proteins.quantile(mine, SPREAD[1])


def _at_the_right(found: Sequence[ProteinError]) -> float:
    """Where a cloud ends: the median error of its longest proteins, an eighth of them."""
    longest = sorted(found, key=lambda p: (p.tokens, p.accession))[-max(1, len(found) // 8) :]
    return proteins.quantile([p.error for p in longest], 0.5)


def _thinned(found: Sequence[Drawn]) -> Sequence[Drawn]:
    """At most `DOTS` of them, spread evenly."""
    return found[:: math.ceil(len(found) / DOTS) or 1]


def _jitter(lane: int, count: int) -> list[float]:
    """Places within a lane that keep dots of like error apart: multiples of the golden ratio."""
    return [lane + ((index * 0.618034) % 1 - 0.5) * 0.66 for index in range(count)]


def _powers(low: int, high: int) -> list[int]:
    return [2**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]


def _of(family: str) -> str:
    return "all families" if family == "all" else f"family {family}"
