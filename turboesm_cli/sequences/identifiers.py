"""Which texts were met before, in some 12 to 24 bytes each, however long they are."""

from __future__ import annotations

import hashlib
from array import array


class Seen:
    """A set of texts that keeps 64 bits of each one's hash.

    A text that was never added may pass for one that was: among 10 million with a chance of 3 in a million.
    """

    def __init__(self) -> None:
        self._slots = array("Q", [0]) * 1024  # open addressing; 0 is a free slot
        self._count = 0

    def __contains__(self, text: str) -> bool:
        return self._slots[self._find(_key(text))] != 0

    def add(self, text: str) -> None:
        """Remember a text."""
        key = _key(text)
        slot = self._find(key)
        self._count += self._slots[slot] == 0
        self._slots[slot] = key
        if self._count * 3 > len(self._slots) * 2:
            self._grow()

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", [0]) * (2 * len(old))
        for key in old:
            if key:
                self._slots[self._find(key)] = key

    def _find(self, key: int) -> int:
        """The slot that holds `key`, or the one that it would get."""
        slots, mask = self._slots, len(self._slots) - 1
        slot = key & mask
        while slots[slot] not in (0, key):
            slot = (slot + 1) & mask
        return slot


def _key(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
