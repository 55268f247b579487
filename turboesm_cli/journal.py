"""A file of named records that only grows, and that a process may die over at any moment.

A record is a head of 46 bytes (`b"TQJ1"`, the name's length uint16, the data's length uint64, both little-endian,
and the sha256 of name and data), the name in UTF-8, and the data. What follows the last whole record was cut off
when a process died, and is dropped on opening.

A record is in the kernel's hands when `append` returns, which outlives kill -9, and on the disk with the first
append SYNC_SECONDS later, or `close`, which outlives a power cut.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SYNC_SECONDS = 1.0

_HEAD = struct.Struct("<4sHQ32s")
_MAGIC = b"TQJ1"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Place:
    """Where a record's data are: offset and length in bytes."""

    name: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Journal:
    """The records of a file, which is made where there is none. One process at a time; raises OSError."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._synced = 0.0
        self._places: dict[str, _Place] = {}
        self._end = 0
        size = self._stream.seek(0, os.SEEK_END)
        while place := self._record_at(self._end, size):
            self._places[place.name] = place
            self._end = place.end
        self._stream.truncate(self._end)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, name: str) -> bytes:
        """A record's data. Raises KeyError where there is none of that name."""
        place = self._places[name]
        return b"".join(self._chunks(place.offset, place.end))

    def append(self, name: str, data: bytes) -> None:
        """Add a record. Where that fails, on a full disk, the file is cut back to its last whole record."""
        key = name.encode()
        head = _HEAD.pack(_MAGIC, len(key), len(data), _digest((key, data)))
        try:
            self._write(head + key)
            self._write(data)
        except BaseException:
            self._stream.truncate(self._end)
            raise
        self._places[name] = place = _Place(name, self._end + len(head) + len(key), len(data))
        self._end = place.end
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def clear(self) -> None:
        """Drop all records."""
        self._places.clear()
        self._end = 0
        self._stream.truncate(0)

    def sync(self) -> None:
        """Have all records on the disk."""
        os.fsync(self._stream.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close the file."""
        with self._stream:
            self.sync()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        self._stream.seek(0, os.SEEK_END)
        while rest:
            rest = rest[self._stream.write(rest) :]

    def _record_at(self, start: int, size: int) -> _Place | None:
        """The record at `start` of a file of `size` bytes, if it is whole."""
        head = b"".join(self._chunks(start, min(start + _HEAD.size, size)))
        if len(head) < _HEAD.size:
            return None
        magic, name_length, length, digest = _HEAD.unpack(head)
        offset = start + _HEAD.size + name_length
        if magic != _MAGIC or offset + length > size:
            return None
        if _digest(self._chunks(start + _HEAD.size, offset + length)) != digest:
            return None
        key = b"".join(self._chunks(start + _HEAD.size, offset))
        return _Place(key.decode(errors="replace"), offset, length)

    def _chunks(self, start: int, stop: int) -> Iterable[bytes]:
        while start < stop:
            chunk = os.pread(self._stream.fileno(), min(_CHUNK, stop - start), start)
            if not chunk:
                return
            start += len(chunk)
            yield chunk


def _digest(parts: Iterable[bytes]) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.digest()
