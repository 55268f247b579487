"""The values of a JSON list, read one by one, however long the list is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

VALUE_LIMIT = 1 << 20
"""Characters of one value."""

_CHUNK = 1 << 16
_DECODER = json.JSONDecoder()


def list_values(stream: TextIO) -> Iterator[Any]:
    """The values of the list that a stream holds, one in memory at a time.

    Raises ValueError for what is no JSON, TypeError for JSON that is no list.
    """
    text = _Text(stream)
    if text.next() != "[":
        text.value()
        raise TypeError
    text.skip()
    while text.next() != "]":
        yield text.value()
        if text.next() == ",":
            text.skip()
            if text.next() == "]":
                raise ValueError("a comma without a value after it")
        elif text.next() != "]":
            raise ValueError("no comma and no end of the list after a value")
    text.skip()
    if text.next():
        raise ValueError("more after the end of the list")


class _Text:
    """A stream of JSON, of which a chunk and the value that is being read are in memory."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._held, self._at = stream, "", 0

    def next(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            while self._at < len(self._held) and self._held[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._held) or not self._more():
                return self._held[self._at : self._at + 1]

    def skip(self) -> None:
        """Go beyond the character that `next` gave."""
        self._at += 1

    def value(self) -> Any:
        """The value that begins here. Raises ValueError, RecursionError where it is too deep."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                if len(self._held) - self._at <= VALUE_LIMIT and self._more():
                    continue
                raise ValueError(error.msg) from error  # where it was in the chunk says nothing
            if end < len(self._held) or not self._more():  # a number at the end of a chunk may go on
                self._at = end
                return value

    def _more(self) -> bool:
        chunk = self._stream.read(_CHUNK)
        self._held, self._at = self._held[self._at :] + chunk, 0
        return bool(chunk)
