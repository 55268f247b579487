"""Sections of a report → one HTML page that is complete in itself.

Everything that came from a result file is escaped here, so that no file can put markup into the page; and the page
forbids itself to load anything, or to run any script but its own. `markdown` makes the other kind of page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from turboesm_cli.reporting.accessions import uniprot_address
from turboesm_cli.reporting.drawing import INK, PAPER, Plot
from turboesm_cli.reporting.glossary import Term
from turboesm_cli.reporting.sections import Part, Section
from turboesm_cli.reporting.sources import Sources
from turboesm_cli.reporting.tables import ACCESSION, Table

HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Page:
    """A page's text, and the files that it shows by their path relative to the page."""

    text: str
    files: tuple[tuple[str, str], ...] = ()


def html_page(title: str, sections: Sequence[Section], sources: Sources) -> Page:
    """One self-contained page: nothing to fetch, light or dark as the reader's screen, fit for paper."""
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [_html_section(index, section) for index, section in enumerate(sections)]
    body = "\n".join([_html_contents(sections), *parts, _html_terms(all_terms(sections)), _html_sources(sources)])
    return Page(
        HTML.format(policy=policy, title=escaped(title), css=_resource("page.css"), body=body, script=script)
    )


def all_terms(sections: Iterable[Section]) -> list[Term]:
    """The terms of a page's glossary."""
    return list(dict.fromkeys(term for section in sections for term in section.terms))


def printable(text: str) -> str:
    """With blanks for letters that cannot be shown."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def escaped(text: str) -> str:
    """As text of HTML, or as the value of an attribute."""
    return html.escape(printable(text), quote=True)


def _html_contents(sections: Sequence[Section]) -> str:
    """Links to the models, where there are several."""
    links = [f'<li><a href="#m{index}">{escaped(one.model)}</a></li>' for index, one in enumerate(sections)]
    return f'<nav aria-label="Models"><ul>\n{chr(10).join(links)}\n</ul></nav>' if len(links) > 1 else ""


def _html_section(index: int, section: Section) -> str:
    summary = f'<p class="summary">{escaped(" ".join(section.summary))}</p>'
    caveats = "\n".join(f"<li>{escaped(text)}</li>" for text in section.caveats)
    facts = "\n".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in section.facts)
    parts = "\n".join(_html_part(f"m{index}", part) for part in section.parts)
    notes = f'<ul class="note">\n{caveats}\n</ul>' if caveats else ""
    listed = f'<dl class="facts">\n{facts}\n</dl>'
    heading = f'<h2 id="m{index}">{escaped(section.model)}</h2>'
    return f"<section>\n{heading}\n{summary}\n{notes}\n{listed}\n{parts}\n</section>"


def _html_part(prefix: str, part: Part) -> str:
    plots = "\n".join(_html_plot(f"{prefix}-{plot.name}-", plot) for plot in part.plots)
    tables = "\n".join(_html_table(table) for table in part.tables)
    return f"<h3>{escaped(part.title)}</h3>\n{plots}\n{tables}"


def _html_plot(prefix: str, plot: Plot) -> str:
    """The plot inline, in the page's ink; its ids are prefixed, for a page may not have one id twice."""
    svg = re.sub(r'(<[^<>]*? id="|url\(#|href="#)', rf"\g<1>{prefix}", plot.svg)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    label = escaped(f"{plot.title}. {plot.description}")
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>\n{named}</figure>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in table.columns)
    rows = "\n".join(f"<tr>{''.join(_html_cells(table.columns, row))}</tr>" for row in table.rows)
    grid = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    note = f'\n<p class="note">{escaped(table.note)}</p>' if table.note else ""
    title = escaped(table.title)
    # What scrolls must be reached by the keyboard, too.
    body = (
        f'<div class="wide" role="group" tabindex="0" aria-label="{title}"><table>\n{grid}\n</table></div>{note}'
    )
    if table.folded:
        return f"<details>\n<summary>{title}</summary>\n{body}\n</details>"
    return f"<h4>{title}</h4>\n{body}"


def _html_cells(columns: Sequence[str], row: Sequence[str]) -> list[str]:
    addresses = [
        uniprot_address(cell) if column == ACCESSION else "" for column, cell in zip(columns, row, strict=True)
    ]
    return [
        f'<td><a href="{address}" rel="noreferrer">{escaped(cell)}</a></td>'
        if address
        else f"<td>{escaped(cell)}</td>"
        for address, cell in zip(addresses, row, strict=True)
    ]


def _html_terms(terms: Sequence[Term]) -> str:
    if not terms:
        return ""
    items = "\n".join(f"<dt>{escaped(term.word)}</dt><dd>{escaped(term.meaning)}</dd>" for term in terms)
    return f'<section>\n<h2>Glossary</h2>\n<dl class="terms">\n{items}\n</dl>\n</section>'


def _html_sources(sources: Sources) -> str:
    items = "\n".join(f"<li>{escaped(line)}</li>" for line in sources.lines)
    encoded = base64.b64encode(sources.csv.encode("utf-8", errors="backslashreplace")).decode()
    link = f'<a download="results.csv" href="data:text/csv;base64,{encoded}">Save the data as CSV</a>'
    download = (
        f'<p class="download">{link}: all rows that this page shows. <code>turboesm report</code> reads it.</p>'
    )
    return f"<section>\n<h2>Data</h2>\n<ul>\n{items}\n</ul>\n{download if sources.csv else ''}\n</section>"


def _resource(name: str) -> str:
    return files("turboesm_cli.reporting").joinpath(name).read_text(encoding="utf-8")
