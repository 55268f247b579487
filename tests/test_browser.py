"""The page of `report` in a real browser, Debian's chromium.

It sorts, prints, is dark where the reader's screen is, loads nothing, and can be read on a telephone and by those
who cannot see it.
"""

# ruff: noqa: RUF001  (reports show en dashes)

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from turboesm_cli.commands.report import report
from turboesm_cli.reporting.pages import html_page
from turboesm_cli.reporting.results import frame, read_rows, write_csv
from turboesm_cli.reporting.sections import sections
from turboesm_cli.reporting.sources import Sources

CHROMIUM = shutil.which("chromium")
RESULTS = Path(__file__).resolve().parents[1] / "data" / "results" / "0.1.0"
FILES = ("nvidia-h100-ar_gptj_25M_d80-families.csv", "cpu-esm2_t6_8M_refit-throughput.csv")
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 400, "height": 800}
OVERFLOWING = """
() => [...document.querySelectorAll("main *")]
  .filter(one => !one.closest("svg") && !one.parentElement.closest(".wide"))
  .filter(one => one.getBoundingClientRect().right > innerWidth + 0.5)
  .map(one => one.tagName + " " + one.textContent.slice(0, 40))
"""
LETTER_HEIGHTS = """
() => [...document.querySelectorAll("svg text")]
  .map(one => [parseFloat(getComputedStyle(one).fontSize), one.getScreenCTM()])
  .map(([size, {a, b}]) => size * Math.hypot(a, b))
"""
CUT = """
() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
  const all = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < all.left - 1 || own.right > all.right + 1
      || own.top < all.top - 1 || own.bottom > all.bottom + 1;
  }).map(text => text.textContent);
})
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some recipes of real results, a model with proteins and one without."""
    path = tmp_path_factory.mktemp("report") / "data.csv"
    rows = [row for name in FILES for row in read_rows(RESULTS / name)]
    write_csv(path, [row for row in rows if row.recipe in ("fp32", "fp16", "int8", "paper", "auto")])
    return path


@pytest.fixture(scope="module")
def written(data: Path) -> Path:
    path = data.with_name("report.html")
    report([data], path, "turboesm results", json=False, force=False)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses to have one as root
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, written: Path) -> Iterator[Any]:
    """The page, of which everything that it asks for and complains of is checked at the end."""
    context = browser.new_context(viewport=WIDE, color_scheme="light")
    opened, complaints, asked = context.new_page(), [], []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(written.as_uri())
    yield opened
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:text/csv;")] == [written.as_uri()]
    context.close()


def test_tables_sort_by_mouse_and_by_keyboard(page: Any) -> None:
    table = page.locator("table", has=page.get_by_role("button", name="paper / this")).first
    heading = table.locator("th", has_text="bits per value")

    def column() -> list[float]:
        return [float(text) for text in table.locator("tbody td:nth-child(4)").all_inner_texts()]

    before = column()
    assert before != sorted(before) and heading.get_attribute("aria-sort") is None
    heading.get_by_role("button").click()
    assert column() == sorted(before) and heading.get_attribute("aria-sort") == "ascending"
    heading.get_by_role("button").press("Enter")
    assert column() == sorted(before, reverse=True) and heading.get_attribute("aria-sort") == "descending"
    table.locator("th", has_text="recipe").get_by_role("button").press("Space")
    names = table.locator("tbody td:nth-child(1)").all_inner_texts()
    assert names == sorted(names) and heading.get_attribute("aria-sort") is None


def test_what_is_missing_stays_last(page: Any) -> None:
    table = page.locator("table", has=page.get_by_role("button", name="model tables")).first
    for _ in range(2):
        table.get_by_role("button", name="model tables").click()
        cells = table.locator("tbody td:last-child").all_inner_texts()
        missing = [index for index, text in enumerate(cells) if text == "–"]
        assert missing == list(range(len(cells) - len(missing), len(cells))) and 0 < len(missing) < len(cells)


def colours(page: Any) -> tuple[str, str]:
    """Of the paper, and of a figure's ink."""
    return page.evaluate(
        '() => [getComputedStyle(document.body).backgroundColor,'
        ' getComputedStyle(document.querySelector("svg text")).fill]'
    )  # fmt: skip


def test_dark_and_print_styles(page: Any) -> None:
    light = colours(page)
    page.emulate_media(color_scheme="dark")
    assert colours(page) == ["rgb(21, 24, 27)", "rgb(228, 230, 233)"] and light != colours(page)
    page.emulate_media(color_scheme="dark", media="print")
    assert colours(page) == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert not page.get_by_text("Save the data as CSV").is_visible()
    assert page.locator("details:not([open])").count() > 0
    assert page.evaluate('getComputedStyle(document.querySelector("th button")).display') == "contents"
    page_height = 267 / 25.4 * 96  # of A4 within its margins, in pixels
    heights = page.evaluate('Array.from(document.querySelectorAll("figure svg"), (x) => x.clientHeight)')
    assert heights and max(heights) < page_height
    assert page.pdf(format="A4").startswith(b"%PDF")
    assert page.locator("details:not([open])").count() == 0


def test_on_a_telephone_nothing_is_cut(page: Any) -> None:
    assert page.evaluate(CUT) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(CUT) == [] and min(page.evaluate(LETTER_HEIGHTS)) >= 9


def test_names_of_any_length_are_shown_whole_or_shortened(browser: Any) -> None:
    base = next(read_rows(RESULTS / FILES[0]))
    rows = [
        dataclasses.replace(base, recipe=f"recipe {index} of a long and a longer name", family=family, **figure)
        for index in range(18)
        for family in ("a family that has a file's name, too", "b")
        for figure in (
            {"protocol": "decode", "metric": "error", "value": 0.5 / (index + 1)},
            *(
                {"protocol": "decode", "metric": "error", "value": 0.01 * n, "accession": f"p{n}", "n": n}
                for n in (1, 9)
            ),
            {"protocol": "memory", "metric": "bits_per_value", "value": index, "tokens": 512},
            *({"protocol": "memory", "metric": "bytes", "value": 99.0 * n, "tokens": n} for n in (1, 2)),
        )
    ]
    context = browser.new_context(viewport=PHONE)
    opened = context.new_page()
    opened.set_content(html_page("t", sections(frame(rows)), Sources((), "")).text)
    assert opened.locator("figure").count() == 4
    assert opened.evaluate(CUT) == [] and opened.evaluate(OVERFLOWING) == []
    context.close()


def test_the_data_can_be_saved_from_the_page(page: Any, data: Path, tmp_path: Path) -> None:
    with page.expect_download() as started:
        page.get_by_text("Save the data as CSV").click()
    started.value.save_as(tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_bytes() == data.read_bytes()


def test_axe_finds_nothing_serious(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    drawings = {"exclude": [["svg > *"]]}  # their thousands of parts are one image to whoever cannot see them
    everything = axe.run(page, context=drawings).response
    page.emulate_media(color_scheme="dark")
    contrast = axe.run(page, context=drawings, options={"runOnly": ["color-contrast"]}).response
    assert {"color-contrast", "svg-img-alt"} <= {rule["id"] for rule in everything["passes"]}
    assert {rule["id"] for rule in contrast["passes"]} == {"color-contrast"}
    found = [rule for rule in everything["violations"] if rule["impact"] in ("serious", "critical")]
    found += contrast["violations"]
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
