"""Sections of a report → a Markdown page with its plots beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from urllib.parse import quote

from turboesm_cli.reporting.pages import Page, all_terms, printable
from turboesm_cli.reporting.sections import Section
from turboesm_cli.reporting.sources import Sources
from turboesm_cli.reporting.tables import Table


def markdown_page(title: str, sections: Sequence[Section], sources: Sources, folder: str) -> Page:
    """A Markdown page; its plots are files to be written into `folder`, beside the page."""
    parts, files = [f"# {_m(title)}"], []
    for index, section in enumerate(sections):
        parts += [f"## {_m(section.model)}", _m(" ".join(section.summary)), _list(section.caveats)]
        parts.append(_list([f"{name}: {text}" for name, text in section.facts]))
        for part in section.parts:
            parts.append(f"### {_m(part.title)}")
            for plot in part.plots:
                path = f"{folder}/{index + 1}-{plot.name}.svg"
                files.append((path, plot.svg))
                parts.append(f"![{_m(plot.title)}]({quote(path)})")
            parts += [_table(table) for table in part.tables]
    terms = [f"{term.word}: {term.meaning}" for term in all_terms(sections)]
    parts += ["## Glossary", _list(terms)] if terms else []
    parts += ["## Data", _list(sources.lines)]
    return Page("\n\n".join(filter(None, parts)) + "\n", tuple(files))


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {_m(item)}" for item in items)


def _table(table: Table) -> str:
    grid = [f"| {' | '.join(map(_m, table.columns))} |"]
    grid += [f"| {' | '.join((':--', *['--:'] * (len(table.columns) - 1)))} |"]
    grid += [f"| {' | '.join(map(_m, row))} |" for row in table.rows]
    return "\n\n".join(part for part in (f"#### {_m(table.title)}", "\n".join(grid), _m(table.note)) if part)


def _m(text: str) -> str:
    """`text` on one line of Markdown, with nothing in it that Markdown or HTML would act on."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(printable(text).split()), quote=False))
