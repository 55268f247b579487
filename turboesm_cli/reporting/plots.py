"""Result rows → plots, as SVG text that is the same bytes each time.

Each function takes the rows of one model, and gives nothing where they hold nothing to draw. Ink and paper
are the colours INK and PAPER, which a page with a theme of its own may replace.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from turboesm_cli.reporting.grouping import (
    Rows,
    Variant,
    bits_held,
    bits_text,
    code_of,
    families_of,
    labels,
    memory_curves,
    seen,
    variant_of,
)
from turboesm_cli.reporting.results import ResultRow
from turboesm_cli.reporting.tables import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1e22"
PAPER = "#fefefe"
GRID = "#9a9fa6"
# Okabe and Ito's colours, told apart by colour-blind readers; black and yellow would vanish on dark or light.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c8c8c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
HATCHES = ("", "///", "...", "xxx")
DASHES = ("-", "--", ":", "-.")
SIZE = (8.0, 4.2)  # inches; 768 CSS pixels across
LEGEND_LINE = 0.22  # inches of height that a line of the legend adds
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "svg.hashsalt": "turboesm",  # otherwise the ids are random
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Style:
    """How a variant is drawn."""

    colour: str
    marker: str
    hatch: str = ""
    dash: str = "-"

    def of_bar(self) -> dict[str, Any]:
        return {"color": self.colour, "hatch": self.hatch, "edgecolor": PAPER}

    def of_line(self) -> dict[str, Any]:
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}


BASELINES = {"fp32": Style(INK, "o"), "fp16": Style(INK, "o", dash="--")}


@dataclass(frozen=True)
class Line:
    name: str
    style: Style
    points: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Plot:
    name: str  # fit for a file's name
    title: str
    description: str  # for those who cannot see it
    svg: str


def plots(rows: Rows) -> list[Plot]:
    """Every plot that the rows of one model can fill."""
    made = (family_plot(rows), bits_plot(rows), memory_plot(rows))
    return [plot for plot in made if plot is not None]


def family_plot(rows: Rows) -> Plot | None:
    """Error by family, a bar a recipe."""
    chosen = _errors(rows)
    if not chosen:
        return None
    title = "Error of the decoded hidden state, by protein family"
    with _canvas(title) as (axes, publish):
        _draw_bars(axes, chosen, _styles(rows, map(variant_of, chosen)))
        return publish("error-by-family", "Grouped bars on a log scale; the table of errors has the same numbers.")


def bits_plot(rows: Rows) -> Plot | None:
    """Error against the bits held for a value; recipes that ran at several bits are joined."""
    held = bits_held(rows)
    overall = families_of(_errors(rows))[-1:]
    chosen = [row for row in _errors(rows) if (row.family or "all") in overall]
    names, styles = labels(map(variant_of, chosen)), _styles(rows, map(variant_of, chosen))
    lines: dict[str, Line] = {}
    for row in chosen:
        variant = variant_of(row)
        bits = held.get(code_of(variant))
        if bits is not None and math.isfinite(bits):
            # Variants of one recipe share a name, so a line, whatever their bits.
            line = lines.setdefault(names[variant], Line(names[variant], styles[variant]))
            line.points.append((bits, row.value))
    if not lines:
        return None
    title = f"Error against memory, family {overall[0]}"
    with _canvas(title) as (axes, publish):
        _draw_lines(axes, lines.values())
        _log_error(axes)
        axes.set_xlabel("bits held for a value, scales and padding included")
        return publish("error-against-bits", "A line a recipe: the error falls as more bits are held.")


def memory_plot(rows: Rows) -> Plot | None:
    """Bytes held against the length of the context; one length makes no plot, the table says all."""
    curves = memory_curves(rows)
    lengths = sorted({length for curve in curves.values() for length in curve})
    if len(lengths) < 2:
        return None
    names, styles = labels(curves), _styles(rows, curves)
    lines = [
        Line(
            f"{names[variant]} {bits_text(variant)}".strip(),
            styles[variant],
            [(length, size / MIB) for length, size in curve.items()],
        )
        for variant, curve in curves.items()
    ]
    with _canvas("Memory of the cache, by length of the context") as (axes, publish):
        _draw_lines(axes, lines)
        _plain_log(axes)
        _length_axis(axes, lengths)
        axes.set_ylabel("memory held (MiB, log scale)")
        return publish("memory-by-length", "A line a format; the table of memory has the same numbers.")


def _errors(rows: Rows) -> list[ResultRow]:
    """Errors of whole-model decoding that a log axis can show."""
    found = [row for row in rows if row.protocol == "decode" and row.metric == "error" and not row.accession]
    return [row for row in found if row.value > 0 and math.isfinite(row.value)]


def _styles(rows: Rows, drawn: Iterable[Variant]) -> dict[Variant, Style]:
    """How each variant is drawn: a colour for a recipe at its bits, the same in every plot of a model.

    Where one ran in several places (device and arithmetic), they differ in marker, dash and hatch.
    """
    drawn = seen(drawn)
    codes = seen(code_of(variant_of(row)) for row in rows if row.recipe not in BASELINES)
    places = seen((variant.device, variant.dtype) for variant in drawn)
    return {
        variant: BASELINES.get(variant.recipe)
        or _style(codes.index(code_of(variant)), places.index((variant.device, variant.dtype)))
        for variant in drawn
    }


def _style(code: int, place: int) -> Style:
    """Where the palette ends its colours come again, hatched and with other markers."""
    marker, hatch = code + 3 * place, code // len(PALETTE) + place
    return Style(
        PALETTE[code % len(PALETTE)],
        MARKERS[marker % len(MARKERS)],
        HATCHES[hatch % len(HATCHES)],
        DASHES[place % len(DASHES)],
    )


@contextmanager
def _canvas(title: str) -> Iterator[tuple[Axes, Callable[[str, str], Plot]]]:
    """Axes to draw on, and `publish(name, description)`, which gives the finished plot."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure of its own: pyplot would keep it alive, and choose a backend.
    with matplotlib.rc_context(), _quiet_fonts():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(_plain(title))

        def publish(name: str, description: str) -> Plot:
            _legend(figure, axes)
            return Plot(name, title, description, _svg(figure))

        yield axes, publish


@contextmanager
def _quiet_fonts() -> Iterator[None]:
    """Letters that matplotlib's font lacks are drawn by the reader's font, so no warning is due."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _draw_bars(axes: Axes, chosen: Rows, styles: Mapping[Variant, Style]) -> None:
    cells = {(variant_of(row), row.family or "all"): row.value for row in chosen}
    families, names = families_of(chosen), labels(variant for variant, _ in cells)
    width = 0.84 / len(names)
    for index, (variant, name) in enumerate(names.items()):
        heights = [cells.get((variant, family), math.nan) for family in families]
        places = [at + (index - (len(names) - 1) / 2) * width for at in range(len(families))]
        label = _plain(f"{name} {bits_text(variant)}")
        axes.bar(places, heights, width * 0.92, **styles[variant].of_bar(), label=label)
    axes.set_xticks(range(len(families)), [_plain(family) for family in families])
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_xlabel("protein family")
    _log_error(axes)


def _draw_lines(axes: Axes, lines: Iterable[Line]) -> None:
    for line in lines:
        across, up = zip(*sorted(line.points), strict=True)
        axes.plot(across, up, **line.style.of_line(), markersize=6.5, linewidth=1.8, label=_plain(line.name))


def _log_error(axes: Axes) -> None:
    _plain_log(axes)
    axes.set_ylabel("error: 1 minus mean cosine (log scale)")


def _plain_log(axes: Axes) -> None:
    """A log axis with plain numbers, more of them where it spans few powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wide = high / low > 30
    plain = FuncFormatter(lambda value, _: f"{value:,.7g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length of the context (tokens, log scale)")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    longest = max(map(len, names), default=0)
    columns = max(1, min(len(names), 120 // (longest + 9)))
    figure.set_figheight(SIZE[1] + LEGEND_LINE * math.ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower left", ncols=columns)


def _plain(text: str) -> str:
    """Fit to be drawn: SVG forbids control characters, and a leading "_" would hide a legend's entry."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return f" {printable}" if printable.startswith("_") else printable
