"""A file of named records that only grows, and that a process may die over at any moment.

A record is a head of 46 bytes (`b"TQJ1"`, the name's length uint16, the data's length uint64, both little-endian,
and the sha256 of name and data), the name in UTF-8, and the data. What follows the last whole record was cut off
when a process died, and is dropped on opening.

A record is in the kernel's hands when `append` returns, which outlives kill -9, and on the disk with the first
append SYNC_SECONDS later, or `close`, which outlives a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import time
from array import array
from collections.abc import Iterable
from pathlib import Path

from turboesm_cli.outputs.files import sync

SYNC_SECONDS = 1.0

_HEAD = struct.Struct("<4sHQ32s")
_MAGIC = b"TQJ1"
_CHUNK = 1 << 20
_GAP = 1 << 16
"""How far a number may be beyond those before it: batches end out of order, a damaged name may be anything."""


class _Places:
    """Where each record starts, by its name; 8 bytes for each of the names "0", "1", ..., which most have."""

    def __init__(self) -> None:
        self._numbered = array("Q")  # 1 + the start of the record of that number, or 0
        self._named: dict[str, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, name: str) -> int | None:
        """Where the record starts, or None where there is none."""
        number = _number(name)
        if number is not None and number < len(self._numbered) and self._numbered[number]:
            return self._numbered[number] - 1
        return self._named.get(name)

    def put(self, name: str, start: int) -> None:
        """Note a record; it takes the place of an earlier one of its name."""
        self._count += self.get(name) is None
        number = _number(name)
        if number is None or number > len(self._numbered) + _GAP:
            self._named[name] = start
            return
        self._numbered.extend([0] * (number + 1 - len(self._numbered)))
        self._numbered[number] = start + 1


def _number(name: str) -> int | None:
    """The number that `name` is, written as `str` writes it."""
    short = len(name) < 19 and name.isascii() and name.isdigit()
    return int(name) if short and str(int(name)) == name else None


class Journal:
    """The records of a file, which is made where there is none. One process at a time; raises OSError.

    Memory holds where they are, not what they are.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._synced = 0.0
        self._places = _Places()
        self._end = 0
        size = self._stream.seek(0, os.SEEK_END)
        while found := self._record_at(self._end, size):
            name, end = found
            self._places.put(name, self._end)
            self._end = end
        self._found = self._end
        self._stream.truncate(self._end)

    def __contains__(self, name: str) -> bool:
        return self._places.get(name) is not None

    def __len__(self) -> int:
        return len(self._places)

    def found(self, name: str) -> bool:
        """Whether the record was there when the file was opened."""
        start = self._places.get(name)
        return start is not None and start < self._found

    def read(self, name: str) -> bytes:
        """A record's data. Raises KeyError where there is none of that name, OSError where it was changed."""
        start = self._places.get(name)
        if start is None:
            raise KeyError(name)
        head = b"".join(self._chunks(start, start + _HEAD.size))
        if len(head) == _HEAD.size:
            _, name_length, length, digest = _HEAD.unpack(head)
            offset = start + _HEAD.size + name_length
            key, data = (
                b"".join(self._chunks(start + _HEAD.size, offset)),
                b"".join(self._chunks(offset, offset + length)),
            )
            if key == name.encode() and _digest((key, data)) == digest:
                return data
        raise OSError(errno.EIO, f"the record {name!r} changed; is another process writing there?")

    def append(self, name: str, data: bytes) -> None:
        """Add a record. Where that fails, on a full disk, the file is cut back to its last whole record."""
        key = name.encode()
        head = _HEAD.pack(_MAGIC, len(key), len(data), _digest((key, data)))
        try:
            self._stream.seek(self._end)
            self._write(head + key)
            self._write(data)
        except BaseException:
            self._stream.truncate(self._end)
            raise
        self._places.put(name, self._end)
        self._end += len(head) + len(key) + len(data)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def clear(self) -> None:
        """Drop all records."""
        self._places = _Places()
        self._end = self._found = 0
        self._stream.truncate(0)

    def sync(self) -> None:
        """Have all records on the disk."""
        sync(self._stream.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close the file."""
        with self._stream:
            self.sync()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._stream.write(rest) :]

    def _record_at(self, start: int, size: int) -> tuple[str, int] | None:
        """Name and end of the record at `start` of a file of `size` bytes, if it is whole."""
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
        return key.decode(errors="replace"), int(offset + length)

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
