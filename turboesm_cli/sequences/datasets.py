"""The protein sets that come with turboesm, by name; see data/README.md."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from turboesm_cli.errors import InputError

FAMILIES = ("tm", "idr", "enzyme", "globular", "peptide")
HELDOUT, ANTIBODIES = "heldout", "antibodies"
"""Sets that are measured where they are named, and not by default."""
SUFFIXES = {
    *(".fasta", ".fa", ".faa", ".fas", ".fsa", ".pep", ".seq", ".txt"),
    *(".gb", ".gbk", ".gp", ".genpept", ".embl", ".dat", ".xml", ".pdb", ".ent", ".cif"),
    *(".sto", ".sth", ".stk", ".a2m", ".a3m", ".aln", ".phy", ".phylip"),
    *(".gz", ".bz2", ".xz", ".zst"),
}
"""Endings that say how a file is written, and no part of its name."""


def calibration_path() -> Path:
    """The bundled calibration set."""
    return _folder() / "calibration" / "calibration.fasta"


def family_path(name: str) -> Path:
    """The FASTA file of a bundled family or of another bundled set, or `name` itself if it is a file or a pipe.

    Raises InputError.
    """
    if name in FAMILIES:
        return _folder() / "evaluation" / f"{name}.fasta"
    if name == HELDOUT:
        return _folder() / "heldout" / "bacteria.fasta"
    if name == ANTIBODIES:
        return _folder() / "antibodies" / "evaluation.fasta"
    path = Path(name)
    if not path.exists() or path.is_dir():
        known = ", ".join((*FAMILIES, HELDOUT, ANTIBODIES))
        raise InputError(f"no family {name!r}: choose from {known}, or name a file of proteins")
    return path


def family_label(name: str) -> str:
    """What results call a family: its name, or a file's name without the suffixes of FASTA and of compression."""
    path = Path(name)
    while path.suffix.lower() in SUFFIXES:
        path = path.with_suffix("")
    return path.name


def _folder() -> Path:
    return Path(str(files("turboesm_data")))
