"""How commands read FASTA: as their options say, telling what was mended and what was skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from turboesm_cli import console
from turboesm_cli.errors import InputError
from turboesm_cli.rejects import Reject, check_rejects, write_rejects
from turboesm_cli.sequences import (
    MAX_RESIDUES,
    LongPolicy,
    Protein,
    ReadPolicy,
    ReadReport,
    read_fasta,
)

SHOWN = 20


@dataclass(frozen=True)
class Reading:
    """What the options say.

    limit    use the first so many proteins
    rejects  write a row for each skipped record of all files here
    """

    strict: bool = False
    long: LongPolicy = LongPolicy.ERROR
    limit: int | None = None
    rejects: Path | None = None
    max_residues: int = MAX_RESIDUES
    _rejected: list[Reject] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rejects is not None:
            check_rejects(self.rejects)

    def proteins(self, source: str) -> list[Protein]:
        """All proteins of a file, or the first `limit`. Raises InputError."""
        with self._told(source) as found:
            return list(self._read(source, found))

    def stream(self, source: str) -> Callable[[], Iterator[Protein]]:
        """As `proteins`, but read anew at each call; what cannot be read twice is held in memory."""
        path = Path(source)
        if source == "-" or not path.is_file():
            proteins = self.proteins(source)
            return lambda: iter(proteins)
        stamps: list[tuple[int, int]] = []

        def read() -> Iterator[Protein]:
            stamps.append(_stamp(path))
            if stamps[0] != stamps[-1]:
                raise InputError(f"{source} changed while it was read; run the command again")
            if len(stamps) > 1:
                yield from self._read(source, ReadReport())
            else:
                with self._told(source) as found:
                    yield from self._read(source, found)

        return read

    def _read(self, source: str, found: ReadReport) -> Iterator[Protein]:
        policy = ReadPolicy(strict=self.strict, long=self.long, max_residues=self.max_residues)
        return islice(read_fasta(source, policy, found), self.limit)

    @contextmanager
    def _told(self, source: str) -> Iterator[ReadReport]:
        """A report to fill; then, also where reading was stopped, what was mended and skipped is told."""
        found = ReadReport()
        try:
            yield found
        finally:
            self._rejected.extend(found.rejects)
            if self.rejects is not None:
                write_rejects(self.rejects, self._rejected)
            _say(source, found)


def _say(source: str, found: ReadReport) -> None:
    for what, count in sorted(found.mended.items()):
        console.warn(f"{source}: {what}: {count} records")
    for reject in found.rejects[:SHOWN]:
        console.warn(
            f"{source}: skipped record {reject.record} ({reject.accession}), line {reject.line}: {reject.reason}"
        )
    if len(found.rejects) > SHOWN:
        console.warn(f"{source}: skipped {len(found.rejects) - SHOWN} more records; --rejects FILE lists all")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    return found.st_size, found.st_mtime_ns
