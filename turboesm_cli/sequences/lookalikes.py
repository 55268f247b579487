"""What is written in the letters of proteins, and is none: nucleotides, and annotation in place of residues."""

from __future__ import annotations

import re
from itertools import groupby

OLIGO = 30  # from here on a peptide does not by chance consist of A, C, G and T
GENE = 60  # from here on neither of three of them, or of 90% of such letters
BASES = ("A", "C", "G", "TU")
IUPAC = "ACGTUNRYKMSWBDHV"
_KNOWN, _AMBIGUOUS, _TRACE = 0.9, 0.98, 0.02  # shares of a sequence
_FEW_LETTERS = 5

_NAMES = {
    "a record of secondary structure or confidence": re.compile(
        r"(?:ss|sa|aa)_(?:pred|conf|dssp|dist)\b|\S*:(?:secstr|disorder)\b", re.IGNORECASE
    ).match,
    "a PIR (NBRF) record, whose second line is a title; convert it to FASTA": re.compile(
        "(?:P1|F1|D[LC]|R[LC]|N[13]|XX);"
    ).match,
}
_PYRROLYSINES = re.compile("O{5}").search  # one is rare
_HELIX_STRAND = re.compile("[HEC]{12,}").fullmatch
_DSSP = re.compile("[HBEGITSCP]{30,}").fullmatch
_TOPOLOGY = re.compile("[IMO]{12,}").fullmatch
_STATES = re.compile("[SIMOTLPBUHECDXG]{12,}").fullmatch


def no_protein(header: str) -> str:
    """What a header says that its record holds in place of a protein; "" where it says no such thing."""
    return next((what for what, matches in _NAMES.items() if matches(header)), "")


def no_residues(lines: list[str], widths: list[int]) -> str:
    """Why the lines of a record, or the latter half of them, are annotation; "" where they are not."""
    sequence = "".join(lines)
    if _PYRROLYSINES(sequence):
        return "OOOOO, which no protein has: a line of topology or disorder in place of residues"
    several = len(set(sequence)) > 1  # a tag of histidines is none
    if (several and _HELIX_STRAND(sequence)) or _is_dssp(sequence):
        return "looks like secondary structure in place of residues"
    if several and _TOPOLOGY(sequence):
        return "looks like topology in place of residues"
    half = len(lines) // 2
    doubled = half > 0 and len(widths) == len(lines) and widths[:half] == widths[half:]
    if doubled and _annotates("".join(lines[half:]), "".join(lines[:half])):
        return "its latter lines, as long as the former, look like structure or topology in place of residues"
    return ""


def _is_dssp(sequence: str) -> bool:
    """Eight states. A helix or strand in a third of them tells them from linkers of G and S."""
    if not _DSSP(sequence) or len(set(sequence)) < 3 or "HHHH" not in sequence:
        return False
    return 3 * (sequence.count("H") + sequence.count("E")) >= len(sequence) and bool({*sequence} & {*"CT"})


def _annotates(states: str, sequence: str) -> bool:
    if not _STATES(states) or len(set(states)) > _FEW_LETTERS + 3:
        return False
    helices = _HELIX_STRAND(states) or _TOPOLOGY(states)
    return _mean_run(sequence) < 2 and bool(helices or _mean_run(states) >= 2.8)


def _mean_run(text: str) -> float:
    return len(text) / max(1, sum(1 for _ in groupby(text)))


def nearly_bases(sequence: str) -> bool:
    """Whether nine letters of ten are A, C, G, T, U or N: of short sequences a hint, no proof."""
    return _count(sequence, "ACGTUN") >= _KNOWN * len(sequence) > 0


def is_nucleotides(sequence: str) -> bool:
    """Whether a sequence is so long, and so much of A, C, G and T alike, that it is no protein's."""
    if len(sequence) < OLIGO or not nearly_bases(sequence):
        return False
    bases = _count(sequence, "ACGTU")
    found = sum(_count(sequence, base) >= _TRACE * bases for base in BASES) if bases else 0
    if bases + sequence.count("N") == len(sequence):
        return found == 4 or (len(sequence) >= GENE and (found == 3 or not bases))
    return len(sequence) >= GENE and found == 4 and _count(sequence, IUPAC) >= _AMBIGUOUS * len(sequence)


def _count(sequence: str, letters: str) -> int:
    return sum(map(sequence.count, letters))
