"""Pieces of a file that grows to be an output, as the journal of its work notes them."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

_PIECE = struct.Struct("<QQ32s")
_STAMP = struct.Struct("<QQQ")


@dataclass(frozen=True)
class Piece:
    """`size` bytes from `at` on of a file, and their sha256."""

    at: int
    size: int
    sha256: bytes

    @staticmethod
    def parsed(described: bytes) -> Piece:
        """The piece that `described` describes. Raises ValueError."""
        if len(described) != _PIECE.size:
            raise ValueError(f"{len(described)} bytes describe no piece")
        return Piece(*_PIECE.unpack(described))

    @property
    def described(self) -> bytes:
        """What is noted of it."""
        return _PIECE.pack(self.at, self.size, self.sha256)

    def read(self, path: Path) -> bytes | None:
        """Its bytes, or None where the file was cut off before their end, or they changed."""
        if self.at + self.size > path.stat().st_size:  # before memory is taken
            return None
        with path.open("rb") as stream:
            stream.seek(self.at)
            data = stream.read(self.size)
        return data if hashlib.sha256(data).digest() == self.sha256 else None


def stamp(path: Path) -> bytes:
    """What stays the same of a finished file when it is renamed, and of no other file: size, time, number."""
    found = path.stat()
    return _STAMP.pack(found.st_size, found.st_mtime_ns, found.st_ino)
