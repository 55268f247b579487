"""Work saved while it is done, in a folder beside the output, so that a command that was stopped goes on.

    OUT.partial/lock        held by the one process that works on OUT; the kernel frees it when the process ends
    OUT.partial/journal     the units of work that are done (see `journal`); the first record says of which run
    OUT.partial/NAME.total  a running total, replaced as a whole
    OUT.partial/*.part      what is being written; worthless once its process is gone

A unit is computed once, under a name, from nothing but what the first record lists; so a run that goes on ends
with the bytes of one that was never stopped. No pickle: units and totals are safetensors, the first record JSON.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from turboesm_cli.errors import BundleError, InputError, ModelError, OutputError
from turboesm_cli.files import atomic_output, check_output, locked, work_folder
from turboesm_cli.journal import Journal

Tensors = dict[str, Tensor]

TOTALS_SHARE = 0.2
"""About how much of the time may go into saving totals: where they are large, not every unit saves them."""

RUN = "run"
_PARTS = ".turboesm-*.part"


_HOPELESS = (InputError, ModelError, BundleError)
"""Errors that follow from the inputs."""


class Work:
    """Where units of work are kept; this one keeps nothing and computes all."""

    def unit(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """The tensors saved as `name`, or else those that `compute` gives, saved."""
        return compute()

    def __contains__(self, name: str) -> bool:
        """Whether there are tensors saved as `name`."""
        return False

    def total(self, name: str) -> Tensors:
        """The running total saved as `name`; empty where there is none."""
        return {}

    def save_total(self, name: str, tensors: Tensors, last: bool = False) -> None:
        """Replace a running total; where that would cost too much, leave it for later unless it is the last."""

    def under(self, prefix: str) -> Work:
        """The same, with `prefix` before every name."""
        return self


NOTHING_KEPT = Work()


class SavedWork(Work):
    """The work on one output, kept beside it; see `saved_work`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = Journal(folder / "journal")
        self._saved_at = self._cost = 0.0

    @property
    def units(self) -> int:
        """How many units are saved."""
        return len(self._journal) - (RUN in self._journal)

    def unit(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        if name in self._journal:
            return _load(self._journal.read(name))
        tensors = compute()
        with _disk(self._folder):
            self._journal.append(name, safetensors.torch.save(_plain(tensors)))
        return tensors

    def __contains__(self, name: str) -> bool:
        return name in self._journal

    def total(self, name: str) -> Tensors:
        path = self._folder / f"{name}.total"
        return _load(path.read_bytes()) if path.exists() else {}

    def save_total(self, name: str, tensors: Tensors, last: bool = False) -> None:
        start = time.monotonic()
        if not last and (start - self._saved_at) * TOTALS_SHARE < self._cost:
            return
        with _disk(self._folder):
            self._journal.sync()  # a total may not outlive the units that it counts
        with atomic_output(self._folder / f"{name}.total") as partial:
            safetensors.torch.save_file(_plain(tensors), partial)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - start

    def under(self, prefix: str) -> Work:
        return _Under(self, prefix)

    def other_run(self, run: Mapping[str, str]) -> str:
        """What of `run` differs from the run that these units belong to; "" where nothing does."""
        try:
            found = dict(json.loads(self._journal.read(RUN)))
        except (KeyError, ValueError, TypeError, RecursionError):
            return "its kind" if len(self._journal) else ""
        names = sorted({name for name in {*found, *run} if found.get(name) != run.get(name)})
        return "; ".join(f"{name}: {_short(found.get(name))}, not {_short(run.get(name))}" for name in names)

    def begin(self, run: Mapping[str, str]) -> None:
        """Forget everything, and start on `run`."""
        self._journal.clear()
        for path in self._folder.glob("*.total"):
            path.unlink()
        self._journal.append(RUN, json.dumps(dict(run), sort_keys=True).encode())

    def close(self) -> None:
        """Close the journal, its last units synced."""
        self._journal.close()


class _Under(Work):
    """Another work's units, under a prefix."""

    def __init__(self, whole: Work, prefix: str) -> None:
        self._whole, self._prefix = whole, prefix

    def unit(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        return self._whole.unit(f"{self._prefix}-{name}", compute)

    def __contains__(self, name: str) -> bool:
        return f"{self._prefix}-{name}" in self._whole

    def total(self, name: str) -> Tensors:
        return self._whole.total(f"{self._prefix}-{name}")

    def save_total(self, name: str, tensors: Tensors, last: bool = False) -> None:
        self._whole.save_total(f"{self._prefix}-{name}", tensors, last)

    def under(self, prefix: str) -> Work:
        return _Under(self._whole, f"{self._prefix}-{prefix}")


@contextmanager
def saved_work(path: Path, run: Mapping[str, str], force: bool = False) -> Iterator[SavedWork]:
    """The work on output `path`, locked; `run` is all that the output follows from, in words.

    Left without an exception (the output is published by then) the folder goes. Left with one, it stays if a
    unit is saved, and the exception gets a note that says how to go on; except where the same command would only
    fail again. Raises OutputError where `path` may not
    be written, where another process works on it, or where another run's work is there and `force` is not set.
    """
    folder = work_folder(path)
    with locked(folder / "lock", path):
        check_output(path, force)  # another process may have finished it since the last look
        with _disk(folder):
            work = _opened(folder, run, force)
        kept = False
        try:
            yield work
        except BaseException as error:
            kept = work.units > 0 and not isinstance(error, _HOPELESS)
            if kept:
                error.add_note(f"finished work is kept in {folder}; run the same command again to go on")
            raise
        finally:
            with contextlib.suppress(OSError):
                work.close()
            if not kept:
                _clear(folder)


def _clear(folder: Path) -> None:
    """Remove what is ours, and the folder unless something else is in it."""
    with contextlib.suppress(OSError):
        for path in (folder / "journal", *folder.glob("*.total"), *folder.glob(_PARTS), folder / "lock"):
            path.unlink(missing_ok=True)
        folder.rmdir()


def _opened(folder: Path, run: Mapping[str, str], force: bool) -> SavedWork:
    for stale in folder.glob(_PARTS):
        stale.unlink()
    work = SavedWork(folder)
    try:
        difference = work.other_run(run)
        if difference and work.units and not force:
            raise OutputError(
                f"{folder} holds unfinished work of another run ({difference}); give the same options to go on, "
                "--force to start anew, or another output path"
            )
        if difference or not work.units:
            work.begin(run)
    except BaseException:
        work.close()
        raise
    return work


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot save work in {folder}: {reason}; make room there, or choose another output path"
        ) from error


def _plain(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _load(data: bytes) -> Tensors:
    """Tensors that are checked by their record's sha256, or were renamed into place whole."""
    try:
        return dict(safetensors.torch.load(data))
    except safetensors.SafetensorError as error:
        raise OutputError(f"saved work is damaged ({error}); start anew with --force") from error


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 60 else f"{words[:57]}..."
