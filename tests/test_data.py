"""The bundled proteins are what data/README.md says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from turboesm_cli.codec.header import sequence_key
from turboesm_cli.errors import InputError
from turboesm_cli.sequences.datasets import (
    ANTIBODIES,
    FAMILIES,
    HELDOUT,
    calibration_path,
    family_label,
    family_path,
)
from turboesm_cli.sequences.fasta import Protein, ReadPolicy, ReadReport, read_fasta

DATA = Path(__file__).resolve().parents[1] / "data"
ANTIBODY_CALIBRATION = DATA / "antibodies" / "calibration.fasta"
COUNTS = {"tm": 80, "idr": 80, "enzyme": 100, "globular": 100, "peptide": 56}


def read(path: Path) -> list[Protein]:
    report = ReadReport()
    proteins = list(read_fasta(path, ReadPolicy(strict=True), report))
    assert not report.rejects and not report.mended
    return proteins


def test_counts_and_lengths() -> None:
    assert {family: len(read(family_path(family))) for family in FAMILIES} == COUNTS
    assert len(read(family_path(HELDOUT))) == 112
    calibration = read(calibration_path())
    assert len(calibration) == 900
    lengths = [protein.residues for protein in calibration]
    assert (min(lengths), max(lengths)) == (54, 1019)
    assert all(10 <= protein.residues <= 50 for protein in read(family_path("peptide")))


def test_antibodies_say_which_chain_they_are() -> None:
    chains = [protein.description for protein in read(ANTIBODY_CALIBRATION)]
    assert (chains.count("chain=HEAVY"), chains.count("chain=LIGHT"), len(chains)) == (180, 140, 320)
    chains = [protein.description for protein in read(family_path(ANTIBODIES))]
    assert (chains.count("chain=HEAVY"), chains.count("chain=LIGHT"), len(chains)) == (50, 50, 100)


def test_no_evaluation_protein_is_in_the_calibration_set() -> None:
    paths = (calibration_path(), ANTIBODY_CALIBRATION)
    known = {sequence_key(protein) for path in paths for protein in read(path)}
    for family in (*FAMILIES, HELDOUT, ANTIBODIES):
        assert not known & {sequence_key(protein) for protein in read(family_path(family))}


def test_every_protein_has_its_source() -> None:
    with (DATA / "SOURCES.tsv").open(encoding="utf-8") as stream:
        listed = {(row["file"], row["accession"]) for row in csv.DictReader(stream, delimiter="\t")}
    for path in [calibration_path(), ANTIBODY_CALIBRATION, *map(family_path, (*FAMILIES, HELDOUT, ANTIBODIES))]:
        name = str(path.resolve().relative_to(DATA))
        assert {(name, protein.accession) for protein in read(path)} <= listed


def test_families_are_names_or_files(tmp_path: Path) -> None:
    (tmp_path / "mine.faa.gz").write_bytes(b"")
    assert family_path(str(tmp_path / "mine.faa.gz")) == tmp_path / "mine.faa.gz"
    assert family_label(str(tmp_path / "mine.faa.gz")) == "mine"
    with pytest.raises(InputError, match="choose from tm, idr"):
        family_path("fish")
