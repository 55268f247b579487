"""Tables by hand, plots, both kinds of page, and the command that makes them."""

# ruff: noqa: RUF001  (reports show en dashes and multiplication signs)

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from turboesm_cli.commands.report import report
from turboesm_cli.errors import BundleError, InputError, OutputError
from turboesm_cli.reporting.numbers import cosine, number
from turboesm_cli.reporting.results import ResultRow, read_csv, to_records, write_csv
from turboesm_cli.reporting.sections import Section, sections
from turboesm_cli.reporting.tables import Table

MIB = 2**20
HOSTILE = "<script>alert(1)</script>\"' onload=x $a$ _b_ | [x](javascript:y) `c` \x07 \\frac{"


def row(recipe: str, bits: float, protocol: str, metric: str, value: float, **more: object) -> ResultRow:
    base = ResultRow(
        model="esm2_t6_8M_UR50D",
        recipe=recipe,
        bits_k=bits,
        bits_v=bits,
        family="all",
        protocol=protocol,
        metric=metric,
        value=value,
        unit="1",
        n=100,
        device="NVIDIA H200",
        dtype="float32",
        seed=5,
        version="0.1.0",
        commit="abc",
        torch="2.11.0",
        date="2026-01-02",
    )
    return dataclasses.replace(base, **more)


ROWS = [
    row("paper", 4, "decode", "error", 0.03),
    row("paper", 4, "decode", "error", 0.02, family="tm"),
    row("flat", 3, "decode", "error", 0.01),
    row("flat", 3, "decode", "error", 0.004, family="tm"),
    row("flat", 4, "decode", "error", 0.000123456),
    row("flat", 3, "decode", "cosine_mean", 0.99),
    row("flat", 3, "decode", "cosine_p05", 0.97),
    row("flat", 4, "decode", "cosine_mean", 0.99998765),
    row("flat", 3, "paper", "cosine_mean", 0.9612345),
    row("flat", 3, "decode", "residue_kl_mean", 0.001234567, unit="nat"),
    row("flat", 3, "decode", "residue_top1_agreement", 0.98765),
    row("flat", 3, "memory", "bytes", 2 * MIB, unit="B", tokens=512),
    row("flat", 3, "memory", "bytes", 4 * MIB, unit="B", tokens=1024),
    row("flat", 3, "memory", "ratio_fp32", 9.0, tokens=512),
    row("flat", 3, "memory", "ratio_fp32", 10.0, tokens=1024),
    row("flat", 3, "memory", "ratio_fp16", 5.0, tokens=1024),
    row("flat", 3, "memory", "bits_per_value", 3.5, tokens=512),
    row("flat", 3, "memory", "bits_per_value", 3.25, tokens=1024),
    row("flat", 3, "memory", "bytes_model_tables", MIB / 4, unit="B"),
    row("flat", 3, "time", "us_per_token", 1234.5, unit="us", tokens=1024, p20=1200.0, p80=1300.25),
    row("fp32", 32, "drift", "cosine_mean", 0.9734),
    *(row("flat", 3, "decode", "cosine_mean", 0.90 + i / 100, accession=f"P{i:02}", n=i) for i in range(12)),
]


def section_of(tmp_path: Path, rows: list[ResultRow]) -> Section:
    write_csv(tmp_path / "rows.csv", rows)
    (only,) = sections(read_csv([tmp_path / "rows.csv"]))
    return only


def table_of(section: Section, start: str) -> Table:
    (only,) = [table for table in section.tables if table.title.startswith(start)]
    return only


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Section:
    return section_of(tmp_path_factory.mktemp("section"), ROWS)


def test_table_of_errors(section: Section) -> None:
    table = table_of(section, "Error (1 minus mean cosine): final hidden state")
    assert table.columns == ("recipe", "K bits", "V bits", "bits per value", "tm", "all", "paper / this")
    assert table.rows == (
        ("paper", "4", "4", "–", "0.02000", "0.03000", "1.000×"),
        ("flat", "3", "3", "3.250", "0.004000", "0.01000", "3.000×"),
        ("flat", "4", "4", "–", "–", "0.0001235", "243.0×"),
    )


def test_tables_of_cosines(section: Section) -> None:
    # Per-protein rows, which have the same metric, stay out.
    assert [line[-1] for line in table_of(section, "Mean cosine: final").rows] == ["0.9900", "0.99999"]
    assert table_of(section, "5th percentile").rows == (("flat", "3", "3", "3.250", "0.9700"),)
    assert [line[-1] for line in table_of(section, "Mean cosine: attention output of layer 0").rows] == ["0.9612"]


def test_table_of_memory(section: Section) -> None:
    table = table_of(section, "Memory")
    assert table.columns[3:] == (
        "bits per value",
        "512 tokens",
        "1,024 tokens",
        "fp32 / this",
        "fp16 / this",
        "model tables",
    )
    assert table.rows == (
        ("fp32", "32", "32", "–", "18.00", "40.00", "1.000×", "0.5000×", "–"),
        ("fp16", "16", "16", "–", "–", "20.00", "2.000×", "1.000×", "–"),
        ("flat", "3", "3", "3.250", "2.000", "4.000", "10.00×", "5.000×", "0.2500"),
    )


def test_ratios_come_from_bytes_where_they_are_not_stored(tmp_path: Path) -> None:
    rows = [
        row("flat", 3, "memory", "bytes", MIB, tokens=128),
        row("fp32", 32, "memory", "bytes", 8 * MIB, tokens=128),
    ]
    table = table_of(section_of(tmp_path, rows), "Memory")
    assert [(line[0], *line[4:7]) for line in table.rows] == [
        ("fp32", "8.000", "1.000×", "–"),
        ("flat", "1.000", "8.000×", "–"),
    ]


def test_tables_of_time_language_and_drift(section: Section) -> None:
    assert table_of(section, "Time: us per token").rows == (
        ("flat", "3", "3", "NVIDIA H200", "float32", "1,234 (1,200–1,300)"),
    )
    language = table_of(section, "Predictions")
    assert language.columns[4:] == ("residue kl mean (nat)", "residue top1 agreement")
    assert language.rows == (("flat", "3", "3", "all", "0.001235", "0.9877"),)
    assert table_of(section, "Drift").rows == (("fp32", "32", "32", "all", "0.9734"),)


def test_table_of_the_worst_proteins(section: Section) -> None:
    table = table_of(section, "Worst")
    assert [line[3] for line in table.rows] == [f"P{i:02}" for i in range(10)]
    assert table.rows[0][4:] == ("all", "0.1000", "0")


def test_a_figure_measured_again_is_shown_once(tmp_path: Path) -> None:
    rows = [row("flat", 3, "decode", "error", value) for value in (0.5, 0.25)]
    section = section_of(tmp_path, rows)
    assert table_of(section, "Error").rows == (("flat", "3", "3", "–", "0.2500"),)
    assert ("Measured again", "1 of 2 figures; the last of each is shown") in section.facts


def test_devices_are_told_apart(tmp_path: Path) -> None:
    rows = [
        row(recipe, 3, "decode", "error", error, device=device)
        for device, factor in (("cpu", 1), ("cuda", 2))
        for recipe, error in (("paper", 0.4 * factor), ("flat", 0.1))
    ]
    table = table_of(section_of(tmp_path, rows), "Error")
    assert [(line[0], line[-1]) for line in table.rows] == [
        ("paper, cpu", "1.000×"),
        ("flat, cpu", "4.000×"),
        ("paper, cuda", "1.000×"),
        ("flat, cuda", "8.000×"),
    ]


def test_only_what_was_measured_is_shown(tmp_path: Path) -> None:
    section = section_of(tmp_path, [row("flat", 3, "unheard_of", "error", 0.1)])
    assert section.tables == () and section.plots == () and section.parts == ()
    section = section_of(
        tmp_path, [row("flat", 3, "decode", "error", 0.0), row("a", 3, "decode", "error", math.nan)]
    )
    assert [line[-1] for line in table_of(section, "Error").rows] == ["0", "–"] and section.plots == ()


def test_a_section_a_model(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [*ROWS, dataclasses.replace(ROWS[0], model="second")])
    assert [one.model for one in sections(read_csv([tmp_path / "a.csv"]))] == ["esm2_t6_8M_UR50D", "second"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00056149, "0.0005615"),
        (330, "330.0"),
        (12345.6, "12,346"),
        (1e-9, "1.000e-09"),
        (1e300, "1.000e+300"),
        (-2.5, "-2.500"),
        (9.99996, "10.00"),
        (999.99, "1,000"),
        (0, "0"),
        (math.inf, "inf"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_numbers_have_four_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.99944, "0.9994"), (0.99996, "0.99996"), (1.0, "1.0000"), (1 - 1e-9, "1.00000000"), (-0.5, "-0.5000")],
)
def test_a_cosine_is_not_rounded_up_to_one(value: float, text: str) -> None:
    assert cosine(value) == text


def test_plots_are_svg_with_axes_and_legend(section: Section) -> None:
    assert [plot.name for plot in section.plots] == [
        "error-against-bits",
        "error-by-family",
        "error-against-length",
        "memory-by-length",
    ]
    for plot in section.plots:
        ET.fromstring(plot.svg)
        assert plot.title in plot.svg and "flat" in plot.svg
    assert ">memory held (MiB, log scale)<" in section.plots[3].svg
    assert ">fp16<" in section.plots[3].svg and ">flat@3<" in section.plots[3].svg


def test_many_recipes_and_one_point_can_be_drawn(tmp_path: Path) -> None:
    rows = [row(f"recipe {i}", 3, "decode", "error", 0.1 / (i + 1)) for i in range(30)]
    assert section_of(tmp_path, rows).plots[0].svg.count("recipe ") >= 30


def test_memory_at_one_length_is_a_table_alone(tmp_path: Path) -> None:
    section = section_of(tmp_path, [row("flat", 3, "memory", "bytes", MIB, tokens=128)])
    assert section.plots == () and table_of(section, "Memory").rows[0][4] == "1.000"


app = typer.Typer()
app.command()(report)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def rows_csv(tmp_path: Path) -> Path:
    write_csv(tmp_path / "rows.csv", ROWS)
    return tmp_path / "rows.csv"


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_report(rows_csv: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "report.html"
    result = run(rows_csv, "-o", output, "--title", "A & B")
    assert result.exit_code == 0, result.exception
    assert result.stdout == f"{output}\n"
    text = output.read_text()
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    for fact in (
        "A &amp; B",
        "esm2_t6_8M_UR50D",
        "NVIDIA H200",
        "0.1.0",
        "2.11.0",
        "abc",
        "2026-01-02",
        "fp32 cache",
    ):
        assert fact in text
    tags = Tags(text)
    assert sum(tag == "svg" for tag, _ in tags.found) == 4
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {
        name
        for _, attributes in tags.found
        for name in re.findall(r"#([\w-]+)", attributes.get("xlink:href") or "")
    }
    assert named <= set(ids)


def test_html_report_asks_for_nothing(rows_csv: Path, tmp_path: Path) -> None:
    run(rows_csv, "-o", tmp_path / "report.html")
    tags = Tags((tmp_path / "report.html").read_text())
    assert not {"link", "img", "iframe", "image"} & {tag for tag, _ in tags.found}
    assert not [a for _, attributes in tags.found for a in attributes if a.startswith("on") or a == "src"]
    links = [attributes.get(name) or "" for _, attributes in tags.found for name in ("href", "xlink:href")]
    assert all(link == "" or link.startswith(("#", "data:text/csv;")) for link in links)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["html", "md"])
def test_hostile_text_stays_text(tmp_path: Path, suffix: str) -> None:
    texts = ("model", "recipe", "family", "unit", "device", "dtype", "version", "commit", "torch", "date")
    hostile = [dataclasses.replace(one, **dict.fromkeys(texts, HOSTILE)) for one in ROWS]
    hostile += [dataclasses.replace(one, recipe=name) for one in ROWS for name in (HOSTILE, "蛋白", "_x", "$")]
    hostile += [dataclasses.replace(ROWS[-1], accession=HOSTILE), row("a", 3, "time", HOSTILE, 1.0)]
    write_csv(tmp_path / "rows.csv", hostile)
    output = tmp_path / f"report.{suffix}"
    result = run(tmp_path / "rows.csv", "-o", output, "--title", HOSTILE)
    assert result.exit_code == 0, result.exception
    text = output.read_text()
    assert text.count("<script") == (suffix == "html") and "&lt;script&gt;" in text
    if suffix == "html":
        tags = Tags(text)
        assert not [a for _, attributes in tags.found for a in attributes if a.startswith("on")]
    else:
        assert "[x](" not in text.replace("\\[x\\](", "")
    for path in tmp_path.glob("report_figures/*.svg"):
        assert "<script" not in path.read_text()
        ET.parse(path)


def test_markdown_report(rows_csv: Path, tmp_path: Path) -> None:
    output = tmp_path / "my results.md"
    result = run(rows_csv, "-o", output)
    assert result.exit_code == 0 and result.stdout == f"{output}\n"
    text = output.read_text()
    assert "| flat | 3 | 3 | 3.250 | 0.004000 | 0.01000 | 3.000× |" in text
    assert "- Device: NVIDIA H200" in text and "what compression changes" in text
    linked = re.findall(r"!\[.*\]\((.*)\)", text)
    assert linked == [
        f"my%20results_figures/1-{name}.svg"
        for name in ("error-against-bits", "error-by-family", "error-against-length", "memory-by-length")
    ]
    assert all((tmp_path / link.replace("%20", " ")).is_file() for link in linked)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["html", "md"])
def test_the_same_input_gives_the_same_bytes(rows_csv: Path, tmp_path: Path, suffix: str) -> None:
    def files(folder: str, seed: str) -> dict[str, bytes]:
        output = tmp_path / folder / f"report.{suffix}"
        script = (
            "import typer; from turboesm_cli.commands.report import report;"
            "app = typer.Typer(); app.command()(report); app()"
        )
        command = [sys.executable, "-c", script, str(rows_csv), "-o", str(output)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        root = output.parent
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert files("a", "1") == files("b", "2")


def test_json_and_several_files(rows_csv: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(to_records([dataclasses.replace(ROWS[0], model="second")])))
    assert run(rows_csv, other, "-o", tmp_path / "report.html").exit_code == 0
    assert '<h2 id="m1">second</h2>' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("results", "output", "kind", "said"),
    [
        ("rows.csv", "report.pdf", InputError, "name it .html or .md"),
        ("rows.csv", "report", InputError, "name it .html or .md"),
        ("none.csv", "report.html", InputError, "No such file"),
        ("bundle.tqz", "report.html", BundleError, "no file"),
        ("rows.csv", "taken.html", OutputError, "pass --force"),
        ("rows.csv", "folder.md", OutputError, "it is a folder"),
        ("rows.csv", "taken.html/below.html", OutputError, "cannot write"),
    ],
)
def test_refusals(
    rows_csv: Path, tmp_path: Path, results: str, output: str, kind: type[Exception], said: str
) -> None:
    (tmp_path / "taken.html").write_text("mine")
    (tmp_path / "folder.md").mkdir()
    result = run(tmp_path / results, "-o", tmp_path / output)
    assert isinstance(result.exception, kind) and said in str(result.exception)
    assert result.stdout == "" and (tmp_path / "taken.html").read_text() == "mine"


def test_force_overwrites(rows_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    assert run(rows_csv, "-o", tmp_path / "report.html", "--force").exit_code == 0
    assert "<h1>turboesm results</h1>" in (tmp_path / "report.html").read_text()


def test_help_has_an_example() -> None:
    assert "Example: turboesm report" in " ".join(run("--help").stdout.split())


def test_imports_are_light() -> None:
    script = (
        "import sys, turboesm_cli.commands.report;"
        "assert not {'pandas', 'matplotlib', 'torch'} & set(sys.modules);"
        "from turboesm_cli.reporting import pages, plots, results;"
        "assert not {'torch', 'esm', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_a_report_needs_no_torch(rows_csv: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['esm'] = None; from pathlib import Path;"
        "from turboesm_cli.commands.report import report;"
        "report([Path(sys.argv[1])], Path(sys.argv[2]), 'title', False)"
    )
    subprocess.run([sys.executable, "-c", script, str(rows_csv), str(tmp_path / "r.html")], check=True)
