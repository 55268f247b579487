"""The documentation against the repository: links, anchors, file names and command lines that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from turboesm_cli.app import app

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "turboesm_cli" / "guides").glob("*.md"))
MEASURED = sorted((ROOT / "data" / "results").rglob("README.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *GUIDES,
    ROOT / "kernels" / "README.md",
    ROOT / "data" / "README.md",
    *MEASURED,
]
README_WORDS = 1500

NOT_IN_THE_REPOSITORY = {"demo/report.html", "caches/NNNNNN.safetensors"}
"""What `make demo` makes, and a name inside an archive."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.*?) *$", re.MULTILINE)
FILE = re.compile(r"(?!/)[\w.@-]*(/[\w.@-]+)+\.\w+")
FOLDER = re.compile(r"([\w.-]+/)+")
STARTED = re.compile(r"\s*(srun )?turboesm ")

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> Iterator[str]:
    for found, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if found == language:
            yield text


@cache
def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub makes it."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(prose(page)):
        text = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, 0) + 1
    return {slug if n == 0 else f"{slug}-{n}" for slug, count in found.items() for n in range(count)}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


def test_the_readme_leads_to_every_guide() -> None:
    text = prose(ROOT / "README.md")
    assert [page.name for page in GUIDES if f"guides/{page.name}" not in text] == []


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@by_page
def test_files_that_are_named_exist(page: Path) -> None:
    top = {path.name for path in ROOT.iterdir()}
    for span in SPAN.findall(prose(page)):
        is_folder = FOLDER.fullmatch(span) and span.split("/")[0] in top
        if (is_folder or FILE.fullmatch(span)) and span not in NOT_IN_THE_REPOSITORY:
            assert (ROOT / span).exists() or (page.parent / span).exists(), f"{span}: no such file"


@by_page
def test_python_is_python(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, str(page), "exec")


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def wrong(words: list[str]) -> str | None:
    """What of a command line, the program's name left out, does not exist."""
    command, rest = command_line(), iter(words)
    for word in rest:
        options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
        name, _, value = word.partition("=")
        if name in ("--help", "-h"):
            continue
        if name.startswith("-") and len(name) > 1:
            if name not in options:
                return f"{command.name} has no option {name}"
            if not value and not getattr(options[name], "is_flag", False):
                next(rest, None)
        elif hasattr(command, "commands") and word in command.commands:
            command = command.commands[word]
        elif hasattr(command, "commands") and word.isidentifier() and word.islower():
            return f"{command.name} has no command {word}"
    return None


def lines(text: str) -> Iterator[list[str]]:
    """The words of each command line of turboesm in a shell's text, without the program and what starts it."""
    for line in text.replace("\\\n", " ").splitlines():
        if STARTED.match(line):
            words = shlex.split(line, comments=True)
            yield words[words.index("turboesm") + 1 :]


@by_page
def test_command_lines_exist(page: Path) -> None:
    spans = [" ".join(span.split()) for span in SPAN.findall(prose(page)) if span.startswith("turboesm ")]
    for text in [*blocks(page, "sh"), *spans]:
        for words in lines(text):
            assert (reason := wrong(words)) is None, f"turboesm {shlex.join(words)}: {reason}"


def test_what_does_not_exist_is_found() -> None:
    assert wrong(["decode", "--no-such-option"]) and wrong(["nothing"])
    assert wrong(["--log", "run.log", "decode", "b.tqz", "-", "--prompt=0.5", "--json", "-o", "x"]) is None
