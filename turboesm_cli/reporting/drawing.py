"""How plots look: colours, axes, labels and dots, as SVG text that is the same bytes each time.

Ink and paper are the colours INK and PAPER, which a page with a theme of its own may replace. A plot is narrow
enough for its text to be read on a telephone: it grows in height instead.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from turboesm_cli.reporting.grouping import Variant, seen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1e22"
PAPER = "#fefefe"
GRID = "#9a9fa6"
# Okabe and Ito's colours, told apart by colour-blind readers (but black and yellow, which would vanish on dark or
# light), then others between them.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c8c8c", "#7b61c4", "#a8632f", "#8fa31e",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 4.8, 3.6  # inches, of a plot without its legend
LEGEND_LINE = 0.2  # inches of height that a line of the legend adds
LABEL_GAP = 0.062  # of the axes of a plot of HEIGHT, between labels at the right
LABELS_BESIDE = 14  # that there is room for at that height
TITLE_LETTERS = 48
NAME_LETTERS = 34
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "svg.hashsalt": "turboesm",  # otherwise the ids are random
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "path.simplify": False,  # which would drop dots that lie close together
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
class Plot:
    name: str  # fit for a file's name
    title: str
    description: str  # for those who cannot see it
    svg: str


@dataclass(frozen=True)
class Style:
    """How a variant is drawn."""

    colour: str
    marker: str
    dash: str = "-"

    def of_line(self) -> dict[str, Any]:
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}


BASELINES = {"fp32": Style(INK, "o"), "fp16": Style(INK, "s", dash="--")}


@dataclass(frozen=True)
class Line:
    name: str
    style: Style
    points: list[tuple[float, float]] = field(default_factory=list)


def styles(recipes: Sequence[str], drawn: Iterable[Variant]) -> dict[Variant, Style]:
    """How each variant is drawn: a recipe's colour is its place among `recipes`, those of the whole page.

    Beyond the palette colours come again, with another marker; devices and arithmetics differ in dash and marker.
    """
    drawn = seen(drawn)
    coloured = [recipe for recipe in recipes if recipe not in BASELINES]
    places = seen((variant.device, variant.dtype) for variant in drawn)
    return {
        variant: BASELINES.get(variant.recipe)
        or _style(coloured.index(variant.recipe), places.index((variant.device, variant.dtype)))
        for variant in drawn
    }


def _style(recipe: int, place: int) -> Style:
    marker = recipe % len(PALETTE) + recipe // len(PALETTE) + 3 * place
    return Style(PALETTE[recipe % len(PALETTE)], MARKERS[marker % len(MARKERS)], DASHES[place % len(DASHES)])


@contextmanager
def canvas(title: str, height: float = HEIGHT) -> Iterator[tuple[Axes, Callable[[str, str], Plot]]]:
    """Axes to draw on, and `publish(name, description)`, which gives the finished plot."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure of its own: pyplot would keep it alive, and choose a backend.
    with matplotlib.rc_context(), _quiet_fonts():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        figure.suptitle(_title(title), x=0.01, ha="left", fontsize=10.5, fontweight="bold")

        def publish(name: str, description: str) -> Plot:
            _legend(figure, axes)
            return Plot(name, title, description, _svg(figure))

        yield axes, publish


def draw_lines(axes: Axes, lines: Iterable[Line]) -> None:
    for line in lines:
        across, up = zip(*sorted(line.points), strict=True)
        axes.plot(across, up, **line.style.of_line(), markersize=6, linewidth=1.6, label=short(line.name))


def label_points(axes: Axes, points: Iterable[tuple[float, float, str]]) -> None:
    """A few letters beside each point."""
    for x, y, text in points:
        axes.annotate(short(text), (x, y), (-5, -2), textcoords="offset points", ha="right", va="top", fontsize=9)


def draw_dots(axes: Axes, points: Iterable[tuple[float, float]], colour: str, size: float = 2.6) -> None:
    """Many dots as one path: each a line without length, with round ends."""
    across, up = list[float](), list[float]()
    for x, y in points:
        across += (x, x, math.nan)
        up += (y, y, math.nan)
    axes.plot(across, up, color=colour, alpha=0.5, linewidth=size, solid_capstyle="round", zorder=1.5)


def label_right(axes: Axes, ends: Mapping[str, tuple[float, Style]]) -> None:
    """The name of each line or cloud at the right, at its height in the data or just beside the label there."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure(root=True)
    assert figure is not None
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = sorted((to_axes.transform((axes.get_xlim()[1], y))[1], name) for name, (y, _) in ends.items())
    heights = _apart([height for height, _ in wanted], LABEL_GAP * HEIGHT / figure.get_figheight())
    beside = axes.transAxes + ScaledTranslation(9 / 72, 0, figure.dpi_scale_trans)
    for height, (_, name) in zip(heights, wanted, strict=True):
        look: dict[str, Any] = {"marker": ends[name][1].marker, "color": ends[name][1].colour, "markersize": 5}
        axes.plot(1, height, transform=beside, clip_on=False, **look)
        axes.annotate(
            short(name), (1, height), (16, 0), xycoords="axes fraction", textcoords="offset points", va="center",
            fontsize=9, annotation_clip=False,
        )  # fmt: skip


def height_beside(labels: int) -> float:
    """Inches of height of a plot with so many labels at the right."""
    return HEIGHT * (1 + LABEL_GAP * max(0, labels - LABELS_BESIDE))


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved up to be `gap` apart, then down to be below 1 where they were."""
    moved = list[float]()
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    limit = max(1.0, *heights)
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


def log_axis(axes: Axes, which: str, label: str) -> None:
    """A log axis ("x" or "y") with plain numbers, more of them where it spans few powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    if which == "x":
        label_below(axes, label)
    else:
        axes.set_ylabel(label)
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    wide = high / low > 100
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _in_full(value)))
    axis.set_minor_formatter(NullFormatter())


def length_axis(axes: Axes, lengths: Sequence[int], label: str) -> None:
    """Lengths in tokens on a log axis of base 2, each with its tick."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    label_below(axes, f"{label} (log scale)")


def label_below(axes: Axes, label: str) -> None:
    """What the x axis is, up to its end: to the left there is room, also where names beside it are long."""
    axes.set_xlabel(label, loc="right")


def short(text: str) -> str:
    """Fit to name what is drawn: where it is too long, its begin and end."""
    text, half = plain(text), NAME_LETTERS // 2
    return text if len(text) <= NAME_LETTERS else f"{text[: half - 1]}…{text[-half:]}"


def plain(text: str) -> str:
    """Fit to be drawn: SVG forbids control characters, and a leading "_" would hide a legend's entry."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return f" {printable}" if printable.startswith("_") else printable


def _in_full(value: float) -> str:
    """A tick's number; below a thousandth with an exponent, so that neighbours do not touch: 2e-5."""
    if value >= 1e-3:
        return f"{value:,.7g}"
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


def _title(text: str) -> str:
    return "\n".join(textwrap.wrap(plain(text), TITLE_LETTERS))


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


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if not names:
        return
    longest = max(map(len, names))
    columns = max(1, min(len(names), 62 // (longest + 6)))
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * math.ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower left", ncols=columns, fontsize=9)
