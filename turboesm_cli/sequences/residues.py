"""Letters of a sequence, and what counts as one: the literal `<mask>` may stand for a residue."""

from __future__ import annotations

import re
from collections.abc import Iterator

MASK_TEXT = "<mask>"
SPELLED = re.compile(r"<[a-z_0-9]+>|.", re.DOTALL)
"""A residue as it is spelled: a letter, or a word in angle brackets."""


def count(sequence: str) -> int:
    """Length in residues; a `<mask>` counts one."""
    return len(sequence) - (len(MASK_TEXT) - 1) * sequence.count(MASK_TEXT)


def slices(sequence: str, size: int) -> Iterator[str]:
    """Cut `sequence` into parts of `size` residues, the last one shorter; never within a `<mask>`."""
    residues = SPELLED.findall(sequence) if MASK_TEXT in sequence else sequence
    for start in range(0, len(residues), size):
        yield "".join(residues[start : start + size])
