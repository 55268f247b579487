"""Work saved while it is done, in a folder beside the output, so that a command that was stopped goes on.

    OUT.partial/lock        held by the one process that works on OUT; see `locks`
    OUT.partial/journal     the units of work that are done (see `journal`); the first record says of which run
    OUT.partial/NAME.total  a running total, replaced as a whole
    OUT.partial/overwrites  says that the work was begun with leave to overwrite OUT
    OUT.partial/body        of a file of caches: it grows to be the output, and is renamed; the journal notes the
                            pieces that are whole
    OUT.partial/*.part      what is being written; worthless once its process is gone

A unit is computed once, under a name, from nothing but what the first record lists; so a run that goes on ends
with the bytes of one that was never stopped. No pickle: units and totals are safetensors, the first record JSON.

    OUT.done                beside a finished OUT, where that was asked for: JSON of its run and its sha256
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from turboesm_cli.errors import BundleError, InputError, ModelError, OutputError
from turboesm_cli.outputs.files import (
    OVERWRITES,
    atomic_output,
    check_output,
    file_sha256,
    overwrites,
    work_folder,
    write_text,
)
from turboesm_cli.outputs.journal import Journal
from turboesm_cli.outputs.locks import is_held, is_lock, locked, remove_folder
from turboesm_cli.outputs.pieces import Piece, stamp
from turboesm_cli.outputs.shard_records import RUN_SHARD, is_record, record_of

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "dict[str, Tensor]"

TOTALS_SHARE = 0.2
"""About how much of the time may go into saving totals: where they are large, not every unit saves them."""

Run = Mapping[str, str]
"""All that an output follows from, by name, in words."""
RUN = "run"
DEVICE = "device"
"""The one part of a run that its work may go on without."""
THEN = ", then "
_PARTS = ".turboesm-*.part"
_BODY = "body"
_LOCK = "lock"
_FINISHED = "finished"


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

    def resumed(self, name: str) -> bool:
        """Whether the tensors saved as `name` are of an earlier run."""
        return False

    @property
    def devices(self) -> str:
        """The devices that the work was done on, where they are more than one, else ""."""
        return ""

    @property
    def body(self) -> Path | None:
        """The file that grows to be the output, if one does."""
        return None

    def piece(self, name: str) -> bytes | None:
        """The piece of the body that is saved as `name`, or None where there is none, or it changed."""
        return None

    def save_piece(self, name: str, piece: Piece) -> None:
        """Note that a piece is in the body, its bytes in the kernel's hands."""

    def save_finished(self, body: Path) -> None:
        """Note that the body is all of the output, and is about to be renamed."""

    def is_finished(self, path: Path) -> bool:
        """Whether `path` is the body that an earlier run renamed, and died before it cleared up."""
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
        return len(self._journal) - (RUN in self._journal) - (_FINISHED in self._journal)

    def unit(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        if name in self._journal:
            with _disk(self._folder):
                data = self._journal.read(name)
            return _load(data)
        import safetensors.torch

        tensors = compute()
        with _disk(self._folder):
            self._journal.append(name, safetensors.torch.save(_plain(tensors)))
        return tensors

    def __contains__(self, name: str) -> bool:
        return name in self._journal

    def resumed(self, name: str) -> bool:
        return self._journal.found(name)

    @property
    def devices(self) -> str:
        found = self._run().get(DEVICE, "")
        return found if THEN in found else ""

    @property
    def body(self) -> Path:
        return self._folder / _BODY

    def piece(self, name: str) -> bytes | None:
        if name not in self._journal or not self.body.exists():
            return None
        with _disk(self._folder):
            try:
                return Piece.parsed(self._journal.read(name)).read(self.body)
            except ValueError as error:
                raise _damaged(error) from error

    def save_piece(self, name: str, piece: Piece) -> None:
        with _disk(self._folder):
            if name not in self._journal or self._journal.read(name) != piece.described:
                self._journal.append(name, piece.described)

    def save_finished(self, body: Path) -> None:
        with _disk(self._folder):
            self._journal.append(_FINISHED, stamp(body))

    def is_finished(self, path: Path) -> bool:
        if _FINISHED not in self._journal or self.body.exists() or not path.exists():
            return False
        return self._journal.read(_FINISHED) == stamp(path)

    def total(self, name: str) -> Tensors:
        path = self._folder / f"{name}.total"
        return _load(path.read_bytes()) if path.exists() else {}

    def save_total(self, name: str, tensors: Tensors, last: bool = False) -> None:
        import safetensors.torch

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

    def other_run(self, run: Run) -> dict[str, str]:
        """What of `run` differs from the run that these units belong to, as in `differences`."""
        try:
            return differences(self._run(), run)
        except OutputError:
            return {"kind": "its kind"}

    def begin(self, run: Run, overwrites: bool = False) -> None:
        """Forget everything, and start on `run`."""
        self._journal.clear()
        for path in (*self._folder.glob("*.total"), self.body, self._folder / OVERWRITES):
            path.unlink(missing_ok=True)
        if overwrites:
            (self._folder / OVERWRITES).touch()
        self._journal.append(RUN, json.dumps(dict(run), sort_keys=True).encode())

    def go_on_at(self, device: str) -> None:
        """Record that the work, which other devices began, goes on with `device`."""
        run = self._run()
        if device not in run[DEVICE].split(THEN):
            self._journal.append(
                RUN, json.dumps(run | {DEVICE: run[DEVICE] + THEN + device}, sort_keys=True).encode()
            )

    def _run(self) -> dict[str, str]:
        try:
            return {str(name): str(value) for name, value in json.loads(self._journal.read(RUN)).items()}
        except (KeyError, ValueError, AttributeError, RecursionError) as error:
            raise OutputError(
                f"{self._folder} does not say of which run it is; start anew with --force"
            ) from error

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

    def resumed(self, name: str) -> bool:
        return self._whole.resumed(f"{self._prefix}-{name}")

    @property
    def devices(self) -> str:
        return self._whole.devices

    def total(self, name: str) -> Tensors:
        return self._whole.total(f"{self._prefix}-{name}")

    def save_total(self, name: str, tensors: Tensors, last: bool = False) -> None:
        self._whole.save_total(f"{self._prefix}-{name}", tensors, last)

    def under(self, prefix: str) -> Work:
        return _Under(self._whole, f"{self._prefix}-{prefix}")


@dataclass(frozen=True)
class Policy:
    """What becomes of an output that is there already, and of unfinished work on it.

    force     overwrite the output, and start anew
    skip      leave an output alone that is of the same run, and record of which run a new one is
    anywhere  go on with work that was begun on another device
    """

    force: bool = False
    skip: bool = False
    anywhere: bool = False


NO_LEAVE = Policy()


def differences(found: Run, run: Run) -> dict[str, str]:
    """What of two runs differs, by name, in words."""
    names = sorted(name for name in {*found, *run} if found.get(name) != run.get(name))
    return {name: f"{name}: {_short(found.get(name))}, not {_short(run.get(name))}" for name in names}


def is_done(path: Path, run: Run, anywhere: bool = False) -> bool:
    """Whether output `path` is there, finished by this very `run` (`anywhere`: on any device), and unchanged.

    False where there is none, or where unfinished work would go on to it. Raises OutputError where it is another
    run's, or nothing says whose it is.
    """
    if not path.exists() or work_folder(path).exists():
        return False
    done = _recorded(path)
    if done is None:
        raise OutputError(f"{path} exists, and no {done_record(path).name} says of which run it is; {_INSTEAD}")
    other = differences(done["run"], run)
    if other and not (anywhere and {*other} == {DEVICE}):
        raise OutputError(f"{path} exists, of another run ({'; '.join(other.values())}); {_INSTEAD}")
    if done["sha256"] != file_sha256(path):
        raise OutputError(f"{path} was changed since the run that wrote it; {_INSTEAD}")
    if RUN_SHARD in run and not is_record(record_of(path)):
        raise OutputError(f"{record_of(path)}, which says which part {path} is, is gone; {_INSTEAD}")
    return True


_INSTEAD = "pass --force to overwrite it, or choose another output path"


def done_record(path: Path) -> Path:
    """The file that says of which run a finished output is."""
    return path.with_name(f"{path.name}.done")


def _recorded(path: Path) -> dict[str, Any] | None:
    """What the record of output `path` says; None where there is none, or a file that is no such record."""
    try:
        found = json.loads(done_record(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(found, dict) and set(found) == {"run", "sha256"} and isinstance(found["run"], dict)
    return found if ours else None


@contextmanager
def saved_work(path: Path, run: Run, policy: Policy = NO_LEAVE) -> Iterator[SavedWork]:
    """The work on output `path`, locked; `run` is all that the output follows from, in words.

    Left without an exception (the output is published by then) the folder goes. Left with one, it stays if a
    unit is saved, and the exception gets a note that says how to go on; except where the same command would only
    fail again. Raises OutputError where `path` may not be written, where another process works on it, or where
    another run's work is there and `policy` does not say what to do.
    """
    folder = work_folder(path)
    with locked(folder / _LOCK, path):
        with _disk(folder):
            work = _opened(folder, path, run, policy)
        kept = False
        try:
            yield work
            if policy.skip:
                done = {"run": dict(run), "sha256": file_sha256(path)}
                write_text(done_record(path), json.dumps(done, indent=1, sort_keys=True) + "\n")
            elif _recorded(path) is not None:  # of an earlier output
                done_record(path).unlink()
            if RUN_SHARD not in run and is_record(record_of(path)):  # likewise
                record_of(path).unlink()
        except BaseException as error:
            kept = work.units > 0 and not isinstance(error, _HOPELESS)
            if kept:
                error.add_note(f"finished work is kept in {folder}; run the same command again to go on")
            raise
        finally:
            with contextlib.suppress(OSError):
                work.close()
            if not kept and is_held(path):
                _clear(folder)


def _clear(folder: Path) -> None:
    """Remove what is ours, and the folder unless something else is in it."""
    lock = folder / _LOCK
    ours = (folder / "journal", folder / _BODY, folder / OVERWRITES, *folder.glob("*.total"), *folder.glob(_PARTS))
    with contextlib.suppress(OSError):
        for path in ours:
            path.unlink(missing_ok=True)
        if all(is_lock(path, lock) for path in folder.iterdir()):
            remove_folder(folder, lock)
        else:
            lock.unlink(missing_ok=True)


def _opened(folder: Path, path: Path, run: Run, policy: Policy) -> SavedWork:
    for stale in folder.glob(_PARTS):
        stale.unlink()
    work = SavedWork(folder)
    try:
        other = work.other_run(run) if work.units else {}
        going_on = work.units > 0 and not policy.force
        # another process may have finished the output since the last look; a run that was killed between that and
        # clearing up goes on, and writes it again
        own = going_on and not other and (policy.skip or overwrites(path))
        check_output(path, policy.force or own)
        if policy.skip and done_record(path).exists() and _recorded(path) is None:
            raise OutputError(
                f"{done_record(path)} is no record of turboesm, as --if-done skip writes there; move it"
            )
        if going_on and policy.anywhere and {*other} == {DEVICE}:
            work.go_on_at(run[DEVICE])
        elif going_on and other:
            mending = "--resume-anywhere to go on all the same, " if {*other} == {DEVICE} else ""
            raise OutputError(
                f"{folder} holds unfinished work of another run ({'; '.join(other.values())}); give the same "
                f"options to go on, {mending}--force to start anew, or another output path"
            )
        elif not going_on:
            work.begin(run, overwrites=policy.force and path.exists())
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
    import safetensors.torch

    try:
        return dict(safetensors.torch.load(data))
    except safetensors.SafetensorError as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> OutputError:
    return OutputError(f"saved work is damaged ({error}); start anew with --force")


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 60 else f"{words[:57]}..."
