"""The only printer: results go to stdout, talk to stderr and to the log file."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from turboesm_cli import whereabouts

SECONDS_BETWEEN_LOG_LINES = 10

err = Console(stderr=True, highlight=False, soft_wrap=True)


class Tick(Protocol):
    """Progress callback: `tick(done)` reports that `done` more units of work are finished.

    With `again` they were finished by an earlier run, and are no part of what is left for this one. `cost`: what
    they took, where units differ, in the measure of the phase's; else 1 each.
    """

    def __call__(self, done: int = 1, again: bool = False, cost: float | None = None) -> None: ...


class Phases(Protocol):
    """Progress of work that has several stages: `phase(name, total)` is open while one of `total` units goes on.

    `cost`: what all of them will take, in any measure, where units differ: estimates of time follow it.
    """

    def __call__(self, label: str, total: int, cost: float | None = None) -> AbstractContextManager[Tick]: ...


@contextmanager
def quiet(label: str, total: int, cost: float | None = None) -> Iterator[Tick]:
    """A phase that nobody looks at."""
    yield _unheard


def _unheard(done: int = 1, again: bool = False, cost: float | None = None) -> None:
    """Progress that is not shown."""


files: list[Path] = []
"""Files that hold the results of this command, whole."""
_logs: list[BinaryIO] = []
_LOCK_TRIES, _LOCK_PAUSE = 40, 0.005


def log_to(path: Path) -> None:
    """Append all that is said on stderr from now on to a file, each line with its time. Raises OSError."""
    _logs.append(path.open("ab", buffering=0))


def log(message: str) -> None:
    """Write a line to the log file alone, if there is one. A disk that is full stops the log, not the work."""
    now, where = datetime.datetime.now().astimezone().isoformat(" ", "seconds"), whereabouts.described()
    lines = "".join(f"{now} [{where}] {line}\n" for line in message.splitlines())
    with contextlib.suppress(OSError, ValueError):
        for stream in _logs:
            _append(stream, lines.encode(errors="backslashreplace"))


def _append(stream: BinaryIO, lines: bytes) -> None:
    """Add lines in one write, under a lock where one is had soon: other hosts append to the file, too."""
    locked = False
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # who has it is writing; were it stopped there, waiting would have no end
            time.sleep(_LOCK_PAUSE)
            continue
        except OSError:
            break
        locked = True
        break
    try:
        stream.write(lines)
    finally:
        if locked:
            fcntl.flock(stream, fcntl.LOCK_UN)


def counted(number: int, what: str) -> str:
    """`1 record`, `2,000 records`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def _shown(text: str) -> str:
    """Text from files may hold anything, but not steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else UNPRINTABLE for letter in text)


def say(message: str) -> None:
    """Print a line of talk to stderr."""
    message = _shown(message)
    log(message)
    err.print(message, markup=False, emoji=False)


def warn(message: str) -> None:
    """Print a warning to stderr."""
    message = _shown(message)
    log(f"warning: {message}")
    err.print("[yellow]warning:[/yellow]", end=" ")
    err.print(message, markup=False, emoji=False)


def fail(message: str) -> None:
    """Print an error to stderr, on one line."""
    line = _shown(" ".join(message.split()))
    log(f"error: {line}")
    try:
        err.print("[red]error:[/red]", end=" ", emoji=False)
        err.print(line, markup=False, emoji=False)
    except MemoryError:  # which may be what there is to tell
        sys.stderr.write(f"error: {line}\n")


def print_line(text: str) -> None:
    """Print a line of results on stdout, as it is."""
    sys.stdout.write(f"{text}\n")


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def print_json_rows(rows: Iterable[Any], name: str = "", rest: Mapping[str, Any] | None = None) -> None:
    """As `print_json` of a list, or of an object with `rest` beside a list called `name`; a row as it comes."""
    sys.stdout.write(f'{{"{name}": [' if name else "[")
    separator = "\n"
    for row in rows:
        sys.stdout.write(separator + json.dumps(row, allow_nan=False))
        separator = ",\n"
    ends = "".join(f', "{key}": {json.dumps(value, allow_nan=False)}' for key, value in (rest or {}).items())
    sys.stdout.write(f"\n]{ends}}}\n" if name else "\n]\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is left-aligned, the rest right-aligned."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(_table(title, columns, rows))


def say_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stderr, as `print_table` does on stdout."""
    for row in (columns, *rows):
        log("  ".join(row))
    width = None if err.is_terminal else 160
    Console(stderr=True, highlight=False, width=width).print(_table(title, columns, rows))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=Text(_shown(title)), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shown(cell)) for cell in row))  # a cell is text, whatever brackets it holds
    return table


@contextmanager
def progress(label: str, total: int, cost: float | None = None) -> Iterator[Tick]:
    """Show on stderr how far work is, with an estimate of the time left: a bar, or in a log a line at times.

    Yields the callback that advances it; see `Phases` for `cost`.
    """
    told = Pace(label, total, log if err.is_terminal else say, cost)
    if not err.is_terminal:
        yield told
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(label, total=total, left="")

        def tick(done: int = 1, again: bool = False, cost: float | None = None) -> None:
            told(done, again, cost)
            seconds = told.left(time.monotonic())
            left = "" if seconds is None else f"about {datetime.timedelta(seconds=round(seconds))} left"
            bar.update(task, total=told.total, advance=0 if again else done, left=left)

        yield tick


@contextmanager
def busy(label: str) -> Iterator[None]:
    """Show on stderr what is going on where nobody knows how long it takes; in a log only where that was long."""
    start = time.monotonic()
    log(f"{label} ...")
    with err.status(_shown(label)) if err.is_terminal else contextlib.nullcontext():
        yield
    took = time.monotonic() - start
    if took >= SECONDS_BETWEEN_LOG_LINES and not err.is_terminal:
        say(f"{label}: {took:.0f} s, done")


class Pace:
    """Tells now and then how far work is, and how long it will take at the pace since its first step.

    What comes before that, such as compiling kernels, says nothing of the pace; nor does what an earlier run did,
    which is taken off the total. `cost` as in `Phases`; without it all units are alike.
    """

    def __init__(self, label: str, total: int, tell: Callable[[str], None], cost: float | None = None) -> None:
        self.total = total
        self._ahead, self._weighed, self._spent = float(total if cost is None else cost), cost is not None, 0.0
        self._label, self._tell = label, tell
        self._start = self._last = time.monotonic()
        self._finished = self._earlier = 0
        self._ended = False
        self._first: tuple[float, float] | None = None

    def __call__(self, done: int = 1, again: bool = False, cost: float | None = None) -> None:
        now, took = time.monotonic(), cost if self._weighed and cost is not None else float(done)
        self._ahead -= took
        if again:
            self.total -= done
            self._earlier += done
        else:
            self._finished += done
            self._spent += took
            if took > 0:
                self._first = self._first or (now, self._spent)
        ended, self._ended = self._ended, self._finished >= self.total
        if self._ended > ended or (now - self._last >= SECONDS_BETWEEN_LOG_LINES and not ended):
            self._last = now
            self._tell(self._line(now))

    @staticmethod
    def read(line: str) -> tuple[str, int, int, int | None] | None:
        """Label, what is finished, the total, and seconds left where known, of a line that another process told;
        None for other lines."""
        if not (found := _TOLD(line)):
            return None
        left = 0 if found["left"] == "done" else None if found["seconds"] is None else int(found["seconds"])
        return found["label"], int(found["done"]), int(found["total"]), left

    def left(self, now: float) -> float | None:
        """Seconds that are left, where that can be told yet."""
        since, spent = (now - self._first[0], self._spent - self._first[1]) if self._first else (0.0, 0.0)
        return max(0.0, since / spent * self._ahead) if spent > 0 else None

    def _line(self, now: float) -> str:
        rest, seconds = self.total - self._finished, self.left(now)
        left = "no estimate yet" if seconds is None else f"about {seconds:.0f} s left"
        earlier = f" left by an earlier run, which did {self._earlier}" if self._earlier else ""
        took = f"{now - self._start:.0f} s, {left if rest > 0 else 'done'}"
        return f"{self._label}: {self._finished} of {self.total}{earlier}, {took}"


_TOLD = re.compile(
    r"(?P<label>[^:]+): (?P<done>-?\d+) of (?P<total>-?\d+)( left by an earlier run, which did -?\d+)?, \d+ s, "
    r"(?P<left>about (?P<seconds>\d+) s left|done|no estimate yet)"
).match
"""What `Pace` tells."""
