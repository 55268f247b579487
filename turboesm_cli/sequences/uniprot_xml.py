"""UniProt XML -> records, read by Biopython as a stream; a text with a document type is not recognised as such."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

from turboesm_cli.errors import InputError, TurboESMError
from turboesm_cli.sequences.biopython import reason_of, record_of
from turboesm_cli.sequences.chunks import MOST_TEXT
from turboesm_cli.sequences.records import Record
from turboesm_cli.sequences.sources import Piece

_ENTRY = re.compile(r"<entry[\s>]").finditer
_TAG = len("<entry ")


def records(pieces: Iterable[Piece], label: str) -> Iterator[Record]:
    """The entries of a file. Raises InputError for what is no such XML, also after entries that were good."""
    from Bio import SeqIO

    fed = _Fed(pieces, label)
    number = 0
    found: Iterator[Any] = iter(())
    while True:
        try:
            if not number:
                found = SeqIO.parse(cast(BinaryIO, io.BufferedReader(fed)), "uniprot-xml")
            entry = next(found)
        except StopIteration:
            return
        except (MemoryError, TurboESMError):
            raise
        except Exception as error:  # as in `biopython.parse`
            raise InputError(
                f"{label}: cannot be read as UniProt XML, near line {fed.line}: {reason_of(error)}; fetch it again"
            ) from error
        number += 1
        record = record_of(entry, label, number, fed.next_entry())
        length = int(entry.annotations.get("sequence_length", len(entry)))
        if not record.reason and length != len(entry):
            record.reason = f"{len(entry)} residues, where its entry says {length}: damaged"
        yield record


class _Fed(io.RawIOBase):
    """The text as bytes, watched: in which lines entries begin, and how much comes before one is finished."""

    def __init__(self, pieces: Iterable[Piece], label: str) -> None:
        self._pieces, self._label = iter(pieces), label
        self._data, self._tail = b"", ""
        self._entries: deque[int] = deque()
        self._since = 0
        self.line = 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data and (piece := next(self._pieces, None)) is not None:
            self._data = self._watched(piece)
        part, self._data = self._data[: len(buffer)], self._data[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def next_entry(self) -> int:
        """The line in which the next entry that was parsed begins."""
        self._since = 0
        return self._entries.popleft() if self._entries else 0

    def _watched(self, piece: Piece) -> bytes:
        text = ("\n" if piece.column == 1 and piece.line > 1 else "") + piece.text
        seen = self._tail + text  # a long line comes in parts, and a tag may be cut in two
        self._entries.extend(piece.line for match in _ENTRY(seen) if match.end() > len(self._tail))
        self._tail, self.line = seen[-_TAG:], piece.line
        self._since += len(text)
        if self._since > MOST_TEXT:
            raise InputError(
                f"{self._label}: an entry of over {MOST_TEXT >> 20} MiB, near line {piece.line}; remove it"
            )
        return text.encode("utf-8", "surrogatepass")
