"""What headers tell models beside the sequence, as `name=value`: an antibody's chain, an enzyme's number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import Protein

NAMES = ("chain", "species", "EC")


def tag(protein: Protein, name: str) -> str | None:
    """The value of `name=value` in a header, whatever the case of the name; None without one.

    Raises InputError where there are two that differ.
    """
    found = re.findall(rf"(?:^|\s){name}\s*[=:]\s*(\S+)", protein.description, re.IGNORECASE)
    values = list(dict.fromkeys(value.strip(";,") for value in found))
    if len(values) > 1:
        raise InputError(f"{where(protein)}{name} is {values[0]} and {values[1]} in its header; say it once")
    return values[0] if values else None


def parse_tags(text: str) -> dict[str, str]:
    """Names and values of "chain=HEAVY species=HUMAN". Raises InputError for anything else."""
    found: dict[str, str] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        known = next((each for each in NAMES if each.lower() == name.lower()), None)
        if known is None or not value or known in found:
            usual = ", ".join(f"{each}=..." for each in NAMES)
            raise InputError(f"--tags {word}: give words such as {usual}, each once")
        found[known] = value
    return found


def with_tags(protein: Protein, tags: Mapping[str, str]) -> Protein:
    """The protein with those tags that its header does not have."""
    more = [f"{name}={value}" for name, value in tags.items() if tag(protein, name) is None]
    return replace(protein, description=" ".join(filter(None, (protein.description, *more))))


def where(protein: Protein) -> str:
    """The start of a message about a protein: where it was read."""
    if not protein.record:
        return f"{protein.accession}: "
    return f"{protein.source}: record {protein.record} ({protein.accession}), line {protein.line}: "
