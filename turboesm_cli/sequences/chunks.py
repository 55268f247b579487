"""Lines of a format with records of many lines -> the text of one record at a time, of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.sources import Piece

MOST_TEXT = 64 << 20
"""Characters of a record, or of an alignment, that are held: Biopython's objects take a few times that."""


class Line(NamedTuple):
    """A line of any length, and its number, counted from 1."""

    number: int
    text: str


class Chunk:
    """The text of a record while it is read. Raises InputError for more than `MOST_TEXT`."""

    def __init__(self, label: str, line: int) -> None:
        self.line = line
        self._label, self._size = label, 0
        self._lines: list[str] = []

    def add(self, text: str) -> None:
        """Take a line."""
        self._size += len(text) + 1
        if self._size > MOST_TEXT:
            raise InputError(
                f"{self._label}: what begins at line {self.line} is over {MOST_TEXT >> 20} MiB of text; "
                "convert it to FASTA, which is read as a stream"
            )
        self._lines.append(text)

    @property
    def text(self) -> str:
        """All lines so far."""
        return "\n".join([*self._lines, ""])

    @property
    def lines(self) -> list[Line]:
        """The same, one by one."""
        return [Line(self.line + index, text) for index, text in enumerate(self._lines)]


def lines(pieces: Iterable[Piece], label: str) -> Iterator[Line]:
    """The lines of a text, the parts of long ones joined. Raises InputError for one of more than `MOST_TEXT`."""
    number, parts, size = 0, list[str](), 0
    for piece in pieces:
        if piece.line != number:
            if parts:
                yield Line(number, "".join(parts))
            number, parts, size = piece.line, [], 0
        parts.append(piece.text)
        size += len(piece.text)
        if size > MOST_TEXT:
            raise InputError(f"{label}: line {number} is over {MOST_TEXT >> 20} MiB long; convert it to FASTA")
    if parts:
        yield Line(number, "".join(parts))
