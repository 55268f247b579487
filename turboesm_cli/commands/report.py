"""`turboesm report`: result files → one page of tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboesm_cli import console
from turboesm_cli.errors import InputError, OutputError
from turboesm_cli.outputs.files import write_text

if TYPE_CHECKING:
    from turboesm_cli.reporting.pages import Page


PAGE, TITLE = Path("report.html"), "turboesm results"


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Result files: CSV, or the JSON that --json prints. Or bundles (.tqz) and caches (.tqkv).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Page to write: .html (one file) or .md (plots in a folder beside it)."
        ),
    ] = PAGE,
    title: Annotated[str, typer.Option(help="Title of the page.")] = TITLE,
    json: Annotated[
        bool, typer.Option("--json", help="Print what a bundle or a file of caches holds as JSON.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite an earlier report.")] = False,
) -> None:
    """Show result files as tables and plots, in one page; or what a bundle or a file of caches holds.

    Per model: what was measured, error against memory, by protein family and by length, memory, time, drift, the
    worst proteins; with a glossary and the data as CSV inside. Prints the path of the page. Of a bundle it prints
    model, recipe, calibration, how each layer is coded and what error that is predicted to make, sizes and sha256,
    with everything in the file checked.

    Example: turboesm report results.csv more.csv -o report.html

    Example: turboesm report 650M.tqz
    """
    archives = [path for path in results if path.suffix.lower() in (".tqz", ".tqkv")]
    if archives and len(archives) < len(results):
        raise InputError("bundles and caches are not reported together with results; name one kind of file")
    if archives:
        _inventory(archives, json, to_page=output != PAGE or title != TITLE)
        return
    if json:
        raise InputError("--json goes with bundles and caches; results make a page (see --output)")
    _check_output(output, force)
    from turboesm_cli.outputs.shard_records import record_of

    for path in results:
        if path.is_file() and record_of(path).exists():
            console.warn(f"{path} is one shard of several; `turboesm merge` joins them")
    page = _page(output, title, results)
    for name, text in page.files:
        write_text(output.parent / name, text)
    # The page comes last: where it exists, all that it shows exists.
    write_text(output, page.text)
    console.files.append(output)
    console.print_line(str(output))


def _inventory(paths: list[Path], as_json: bool, to_page: bool) -> None:
    from turboesm_cli.cache.inventory import facts_of, tables_of

    found = [facts_of(path) for path in paths]
    if to_page:
        raise InputError("what bundles and caches hold is printed; leave --output and --title out")
    if as_json:
        console.print_json(found)
        return
    for facts in found:
        for title, columns, rows in tables_of(facts):
            console.print_table(title, columns, rows)


def _check_output(output: Path, force: bool) -> None:
    if output.suffix.lower() not in (".html", ".md"):
        raise InputError(f"cannot write a report to {output}: name it .html or .md")
    if output.is_dir():
        raise OutputError(f"cannot write {output}: it is a folder; choose another output path")
    if output.exists() and not force:
        raise OutputError(f"{output} exists; pass --force to overwrite it, or choose another output path")


def _page(output: Path, title: str, results: list[Path]) -> Page:
    from turboesm_cli.reporting.markdown import markdown_page
    from turboesm_cli.reporting.pages import html_page
    from turboesm_cli.reporting.results import read_csv
    from turboesm_cli.reporting.sections import sections
    from turboesm_cli.reporting.sources import sources

    frame = read_csv(results)
    if output.suffix.lower() == ".md":
        return markdown_page(title, sections(frame), sources(results, frame), f"{output.stem}_figures")
    return html_page(title, sections(frame), sources(results, frame))
