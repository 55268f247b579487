"""Standard streams that are closed, full or broken: results are not lost in silence, messages may be."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO, TypeVar, cast

from turboesm_cli.errors import OutputError

Returned = TypeVar("Returned")


class ReaderGone(Exception):
    """Whoever read standard output has enough, such as `head`: no failure."""


class ResultsLost(OutputError):
    """Standard output is on a disk that is full, or was closed from the start."""


class NoResultsWanted(ResultsLost):
    """Standard output was closed from the start."""


class _Results:
    """Standard output: raises ReaderGone or ResultsLost where a text stream raises OSError.

    rich and click would take a BrokenPipeError for a reason to end with exit code 1.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._tried(lambda stream: stream.write(text))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._stream is not None:  # nothing is held back of what was never taken
            self._tried(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def _tried(self, do: Callable[[TextIO], Returned]) -> Returned:
        if self._stream is None:
            raise NoResultsWanted(
                "standard output is closed, and results go there: open it, or name a file with -o"
            )
        try:
            return do(self._stream)
        except BrokenPipeError as error:
            _abandon(self._stream)
            raise ReaderGone from error
        except OSError as error:
            _abandon(self._stream)
            raise ResultsLost(
                f"cannot write results to standard output: {error.strerror or error}; make room, or redirect it"
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Messages:
    """Standard error, whose failures are no reason to stop."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Put the standard streams of this process behind ones that say what is wrong with them. Call it first."""
    _reserve()
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = cast(TextIO, _Results(sys.stdout))
    messages = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - as long as we live
    sys.stderr = cast(TextIO, _Messages(messages))


def _reserve() -> None:
    """Take the numbers of closed streams, or the next files that are opened would pass for them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _abandon(stream: TextIO) -> None:
    """Send what is still held back to nowhere: the interpreter would fail over it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
