"""Outputs of shards that are text, put one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from turboesm_cli.errors import InputError
from turboesm_cli.outputs.files import atomic_output
from turboesm_cli.outputs.shard_records import Part, require_same

_CHUNK = 1 << 20


def join_text(path: Path, parts: Iterable[Part], head: bytes = b"", tail: bytes = b"") -> None:
    """Write `head`, what follows it in each part, and `tail`; whole or not at all.

    Raises OutputError; InputError where a part begins otherwise, or is not what its shard wrote.
    """
    with atomic_output(path) as partial, partial.open("wb") as stream:
        stream.write(head)
        for part in parts:
            stream.writelines(_body(part, head))
        stream.write(tail)


def first_line(part: Part) -> bytes:
    """The first line of an output, its end included."""
    with part.path.open("rb") as stream:
        return stream.readline(_CHUNK)


def _body(part: Part, head: bytes) -> Iterator[bytes]:
    """What follows `head` in an output, whose bytes are checked by the time that they end."""
    try:
        with part.path.open("rb") as stream:
            found = stream.read(len(head))
            digest = hashlib.sha256(found)
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                yield chunk
    except OSError as error:
        raise InputError(f"cannot read {part.path}: {error.strerror}; check the path") from error
    require_same(part, digest.hexdigest())
    if found != head:
        raise InputError(f"{part.path} begins otherwise than the outputs of other shards; run that shard again")
