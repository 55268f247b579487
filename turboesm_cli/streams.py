"""Standard streams that are closed, full or broken: results must not be lost in silence, messages may be."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from rich.console import Console

from turboesm_cli.errors import OutputError


class _Closed(io.TextIOBase):
    """A standard output that was closed from the start."""

    def write(self, _text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


class _Forgiving:
    """A text stream whose failures are no reason to stop: for messages."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write what can be written."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Make the standard streams ones that say what is wrong with them. Call it first of all."""
    _reserve()
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - for the life of the process
    sys.stderr = cast(TextIO, _Forgiving(sys.stderr))
    Console.on_broken_pipe = _pass_on  # type: ignore[method-assign,assignment]


def _pass_on(_console: Console) -> None:
    """Tell a broken pipe as what it is: rich ends the process with exit code 1, also where typer prints help."""
    raise BrokenPipeError


def _reserve() -> None:
    """Take the numbers of closed streams, or the next files that are opened would pass for them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


@contextlib.contextmanager
def results() -> Iterator[None]:
    """What is done in it writes results to standard output. Raises OutputError where they cannot be written.

    BrokenPipeError passes: whoever reads the results has enough.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        _abandon()
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(
            f"cannot write results to standard output: {error.strerror or error}; what has a file is complete"
        ) from error


def _abandon() -> None:
    """Send what is still buffered to nowhere, or the interpreter would fail over it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
