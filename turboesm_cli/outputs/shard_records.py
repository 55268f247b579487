"""What the output of a shard is a part of: a record beside it, by which parts are known to make up a whole.

    OUT.shard   JSON: format, format_version; kind: how such outputs are joined; shard: I/N; first: the number of
                its first item among all; count: its items; total: those of the whole; sha256: of OUT; run: all
                that the output of the whole follows from; extra: what joining needs beside the output, by kind

It is written when OUT is complete, before OUT appears; so an output that is there has its record, and a record
without its output says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from turboesm_cli.errors import InputError, OutputError
from turboesm_cli.outputs.files import file_sha256, write_text
from turboesm_cli.outputs.shards import Shard, parse_shard

FORMAT = "turboesm-shard"
VERSION = 1
LIMIT = 256 << 20
"""Bytes of a record that are read at most."""
RUN_SHARD = "shard"
"""What a shard's run says beside that of the whole."""

Seal = Callable[[Path], None]
"""Is given a finished output before it appears under its name."""


@dataclass(frozen=True)
class Part:
    """What a shard's output is; see this module. `path` is that of the output; `extra` is read by `extra_of`."""

    run: Mapping[str, str]
    shard: Shard
    first: int
    count: int
    total: int
    kind: str
    path: Path
    sha256: str = ""


def record_of(path: Path) -> Path:
    """The record beside output `path`."""
    return path.with_name(f"{path.name}.shard")


def is_record(path: Path) -> bool:
    """Whether a file begins as our records do."""
    try:
        with path.open("rb") as stream:
            return FORMAT.encode() in stream.read(200)
    except OSError:
        return False


def check_record(path: Path) -> None:
    """Raise OutputError where the record of output `path` would replace a file that is none."""
    record = record_of(path)
    if record.exists() and not is_record(record):
        raise OutputError(f"{record} is no record of a shard, as --shard writes there; move it")


def sealed(part: Part, extra: Callable[[], Mapping[str, Any]] = dict) -> Seal:
    """Writes the record of output `part.path`; `extra` is asked when the output is complete."""

    def seal(finished: Path) -> None:
        described = {
            "format": FORMAT,
            "format_version": VERSION,
            "kind": part.kind,
            "shard": str(part.shard),
            "first": part.first,
            "count": part.count,
            "total": part.total,
            "sha256": file_sha256(finished),
            "run": dict(part.run),
            "extra": dict(extra()),
        }
        write_text(record_of(part.path), json.dumps(described, separators=(",", ":"), allow_nan=False) + "\n")

    return seal


def read_part(path: Path) -> Part:
    """What the record beside output `path` says. Raises InputError where there is none, or another file."""
    found = _read(path)
    try:
        return _parsed(found, path)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from error


def extra_of(part: Part) -> Mapping[str, Any]:
    """What joining needs beside a shard's output."""
    found = _read(part.path)
    if (
        not isinstance(found, dict)
        or found.get("sha256") != part.sha256
        or not isinstance(found.get("extra"), dict)
    ):
        raise damaged(part.path, "it changed")
    return dict(found["extra"])


def damaged(path: Path, reason: object) -> InputError:
    """The error to raise where the record of output `path` is not what it should be."""
    words = reason if isinstance(reason, str) else repr(reason)
    return InputError(f"{record_of(path)} is damaged ({words}); run that shard again")


def check_bytes(part: Part) -> None:
    """Raise InputError where an output is not the one that its record was written for."""
    require_same(part, file_sha256(part.path))


def require_same(part: Part, sha256: str) -> None:
    """The same, of an output whose bytes have this sha256."""
    if sha256 != part.sha256:
        raise InputError(f"{part.path} is not what the run of shard {part.shard} wrote; run that shard again")


def _read(path: Path) -> Any:
    record = record_of(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name the outputs of all shards")
    try:
        if record.stat().st_size > LIMIT:
            raise InputError(f"{record} has over {LIMIT:,} bytes: no record of a shard; run that shard again")
        return json.loads(record.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no {record.name} beside it says which part it is; name outputs of runs with --shard, and "
            "keep their records beside them"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {record}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _parsed(found: Any, path: Path) -> Part:
    if found["format"] != FORMAT or type(found["format_version"]) is not int:
        raise ValueError("another format")
    if found["format_version"] > VERSION:
        raise InputError(f"{record_of(path)} is of a later version; upgrade turboesm")
    numbers = [found[name] for name in ("first", "count", "total")]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a count is no number")
    run = {str(name): str(value) for name, value in found["run"].items()}
    kind, sha256 = str(found["kind"]), str(found["sha256"])
    return Part(run, parse_shard(found["shard"], {}), numbers[0], numbers[1], numbers[2], kind, path, sha256)


def joined(parts: Sequence[Part], differing: frozenset[str] = frozenset()) -> list[Part]:
    """The parts in the order of their shards, where they make up one whole. Raises InputError where they do not.

    differing  what of their runs may differ
    """
    first = parts[0]
    for part in parts:
        _require_alike(first, part, differing)
    ordered = sorted(parts, key=lambda part: part.shard.index)
    for one, other in pairwise(ordered):
        if one.shard == other.shard:
            raise InputError(f"{one.path} and {other.path} are both shard {one.shard}; name each shard once")
    missing = sorted({*range(first.shard.of)} - {part.shard.index for part in parts})
    if missing:
        named = ", ".join(f"{index}/{first.shard.of}" for index in missing[:5]) + (", ..." if missing[5:] else "")
        raise InputError(f"shards that are missing: {named}; run them, and name the outputs of all shards")
    at = 0
    for part in ordered:
        if part.first != at:
            raise InputError(
                f"{part.path}: shard {part.shard} begins at item {part.first}, and those before it end at {at}; "
                "run the shards again"
            )
        at += part.count
    if at != first.total:
        raise InputError(f"the shards have {at} items, and the whole {first.total}; run the shards again")
    return ordered


def _require_alike(first: Part, part: Part, differing: frozenset[str]) -> None:
    names = sorted({*first.run, *part.run} - differing)
    other = [name for name in names if first.run.get(name) != part.run.get(name)]
    if first.kind != part.kind:
        raise InputError(f"{part.path} is {part.kind}, and {first.path} is {first.kind}: parts of no one output")
    if other:
        words = "; ".join(
            f"{name}: {_short(part.run.get(name))}, not {_short(first.run.get(name))}" for name in other
        )
        raise InputError(f"{part.path} is of another run than {first.path} ({words}); merge outputs of one run")
    if (part.shard.of, part.total) != (first.shard.of, first.total):
        raise InputError(
            f"{part.path} is shard {part.shard} of {part.total} items, and {first.path} {first.shard} of "
            f"{first.total}; run the shards again, all with the same N"
        )


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 60 else f"{words[:57]}..."
