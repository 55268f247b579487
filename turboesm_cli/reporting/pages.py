"""Sections of a report → one HTML page, or a Markdown page with its plots beside it.

Everything that came from a result file is escaped here, so that no file can put markup into the page.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from turboesm_cli.reporting.plots import INK, PAPER, Plot
from turboesm_cli.reporting.sections import Section
from turboesm_cli.reporting.tables import Table

LABELS_NOTE = (
    "Labels of the families idr and globular are predictions and heuristics, not annotations: idr is "
    "disorder predicted from the sequence; globular means no transmembrane helix, little predicted disorder "
    "and no enzyme's name."
)
CSS = """
:root { color-scheme: light dark; --ink: #1b1e22; --paper: #fefefe; --faint: #5d646c; --line: #d5d9de; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #15181b; --faint: #a0a7af; --line: #363c43; }
}
body { margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 2px solid var(--line); overflow-wrap: anywhere; }
h3 { margin: 2rem 0 0.5rem; font-size: 1.05rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; }
dt, .note { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; font-weight: 600; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
figure { margin: 1.5rem 0; max-width: 800px; }
figure svg { width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; margin: 2rem 0 0.5rem; font-size: 1.05rem; }
"""
HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<h1>{title}</h1>
<p class="note">{note}</p>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Page:
    """A page's text, and the files that it shows by their path relative to the page."""

    text: str
    files: tuple[tuple[str, str], ...] = ()


def html_page(title: str, sections: Sequence[Section]) -> Page:
    """One self-contained page: no script, nothing to fetch, light or dark as the reader's screen."""
    body = "\n".join(_html_section(index, section) for index, section in enumerate(sections))
    return Page(HTML.format(title=_h(title), css=CSS, note=_h(LABELS_NOTE), body=body))


def markdown_page(title: str, sections: Sequence[Section], folder: str) -> Page:
    """A Markdown page; its plots are files to be written into `folder`, beside the page."""
    parts, files = [f"# {_m(title)}", _m(LABELS_NOTE)], []
    for index, section in enumerate(sections):
        parts += [
            f"## {_m(section.model)}",
            "\n".join(f"- {_m(name)}: {_m(text)}" for name, text in section.facts),
        ]
        for plot in section.plots:
            path = f"{folder}/{index + 1}-{plot.name}.svg"
            files.append((path, plot.svg))
            parts.append(f"![{_m(plot.title)}]({quote(path)})")
        parts += [_markdown_table(table) for table in section.tables]
    return Page("\n\n".join(parts) + "\n", tuple(files))


def _html_section(index: int, section: Section) -> str:
    facts = "\n".join(f"<dt>{_h(name)}</dt><dd>{_h(text)}</dd>" for name, text in section.facts)
    plots = "\n".join(_html_plot(f"m{index}-{plot.name}-", plot) for plot in section.plots)
    tables = "\n".join(_html_table(table) for table in section.tables)
    return f"<section>\n<h2>{_h(section.model)}</h2>\n<dl>\n{facts}\n</dl>\n{plots}\n{tables}\n</section>"


def _html_plot(prefix: str, plot: Plot) -> str:
    """The plot inline, in the page's ink; its ids are prefixed, for a page may not have one id twice."""
    svg = re.sub(r'(<[^<>]*? id="|url\(#|href="#)', rf"\g<1>{prefix}", plot.svg)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    label = _h(f"{plot.title}. {plot.description}")
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>\n{named}</figure>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_h(column)}</th>' for column in table.columns)
    rows = "\n".join(f"<tr>{''.join(f'<td>{_h(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    grid = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    note = f'\n<p class="note">{_h(table.note)}</p>' if table.note else ""
    body = f'<div class="wide"><table>\n{grid}\n</table></div>{note}'
    if table.folded:
        return f"<details>\n<summary>{_h(table.title)}</summary>\n{body}\n</details>"
    return f"<h3>{_h(table.title)}</h3>\n{body}"


def _markdown_table(table: Table) -> str:
    lines = [table.columns, (":--", *["--:"] * (len(table.columns) - 1))]
    grid = [f"| {' | '.join(line)} |" for line in (tuple(map(_m, lines[0])), lines[1])]
    grid += [f"| {' | '.join(map(_m, row))} |" for row in table.rows]
    return "\n\n".join(part for part in (f"### {_m(table.title)}", "\n".join(grid), _m(table.note)) if part)


def _h(text: str) -> str:
    return html.escape(_printable(text), quote=True)


def _m(text: str) -> str:
    """`text` on one line of Markdown, with nothing in it that Markdown or HTML would act on."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(_printable(text).split()), quote=False))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
