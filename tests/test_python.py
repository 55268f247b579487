"""`import turboesm`, and the example on its page."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import turboesm

from turboesm_cli import __version__
from turboesm_cli.cache.packed import PackedCodec
from turboesm_cli.evaluation.accuracy import Entry, accuracy, memory
from turboesm_cli.evaluation.teacher_forced import compare_decoding
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.reporting.results import write_csv
from turboesm_cli.sequences.fasta import Protein

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "turboesm_cli" / "guides" / "python.md"


def test_every_name_is_there() -> None:
    for name in turboesm.__all__:
        assert getattr(turboesm, name) is not None
    assert set(turboesm.__all__) <= set(dir(turboesm)) and turboesm.__version__ == __version__
    with pytest.raises(AttributeError, match="no attribute 'decode'"):
        turboesm.decode  # noqa: B018


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, turboesm; print({'torch', 'pandas', 'esm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_it_is_the_command_line_too() -> None:
    done = subprocess.run([sys.executable, "-m", "turboesm", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"turboesm {__version__}\n")


def test_a_bundle_is_learned_saved_and_decoded_from(
    tiny: EsmModel, calibration_proteins: list[Protein], peptides: list[Protein], tmp_path: Path
) -> None:
    bundle = turboesm.calibrate(tiny, calibration_proteins[:12], recipe="flat@3")
    bundle.save(tmp_path / "tiny.tqz")
    with pytest.raises(turboesm.OutputError, match="exists"):
        bundle.save(tmp_path / "tiny.tqz")
    bundle.save(tmp_path / "tiny.tqz", overwrite=True)
    bundle = turboesm.load_bundle(tmp_path / "tiny.tqz")
    tokens = turboesm.tokenize(tiny, peptides[:2])
    assert tokens.dtype == torch.int64 and tokens.shape[0] == 2
    cache = turboesm.PackedCache(tiny, bundle, batch=2, capacity=tokens.shape[1])
    hidden = turboesm.prefill(tiny, tokens[:, :5], cache)
    assert hidden.shape == (2, 5, tiny.shape.width)
    assert turboesm.step(tiny, tokens[:, 5], cache).shape == (2, tiny.shape.width)
    assert not hidden.requires_grad and cache.nbytes > 0
    for other in (cache, turboesm.PackedCache(tiny, bundle, batch=3, capacity=9)):
        with pytest.raises(turboesm.InputError, match="empty cache of 2 sequences"):
            turboesm.prefill(tiny, tokens[:, :5], other)
    with pytest.raises(turboesm.InputError, match="random weights"):
        turboesm.evaluate(replace(tiny, is_random=True), bundle, peptides[:3])
    rows = turboesm.evaluate(tiny, bundle, peptides[:3])
    assert {"error", "cosine_mean"} <= set(rows.metric) and set(rows.family) == {"proteins"}
    with pytest.raises(turboesm.InputError, match="were in the calibration set"):
        turboesm.evaluate(tiny, bundle, calibration_proteins[:1])


def test_a_bundle_of_another_model_is_refused(
    tiny: EsmModel, embedded: EsmModel, calibration_proteins: list[Protein]
) -> None:
    bundle = turboesm.calibrate(tiny, calibration_proteins[:12], recipe="flat")
    with pytest.raises(turboesm.BundleError):
        turboesm.PackedCache(embedded, bundle, batch=1, capacity=8)


def test_what_is_mended_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "p.fasta").write_text(">a\nMKTAYIAKQRJ\n>b\nMKT AYI KQR\n")
    with pytest.warns(UserWarning) as told:
        found = turboesm.read_fasta(tmp_path / "p.fasta")
    assert [protein.sequence for protein in found] == ["MKTAYIAKQRX"]
    assert any("skipped record 2 (b)" in str(warning.message) for warning in told)
    with pytest.raises(turboesm.InputError):
        turboesm.read_fasta(tmp_path / "p.fasta", strict=True)


def test_results_come_as_a_frame(tmp_path: Path) -> None:
    path = sorted((ROOT / "data" / "results" / "0.1.0").glob("*-families.csv"))[0]
    every = turboesm.read_figures(path)
    few = turboesm.read_figures(path, metric="error", family="all")
    assert 0 < len(few) < len(every) and set(few.metric) == {"error"} and few.index[0] == 0
    with pytest.raises(turboesm.InputError, match="no column 'metrics'"):
        turboesm.read_figures(path, metrics="error")


def test_results_have_a_row_for_each_protein_and_recipe(
    tiny: EsmModel, peptides: list[Protein], calibration_proteins: list[Protein], tmp_path: Path
) -> None:
    """What the tables show of a protein is in the file, and comes back under the names that the file has."""
    bundle = turboesm.calibrate(tiny, calibration_proteins[:12], recipe="flat")
    entries, families = [Entry("flat", bundle)], {"a": peptides[:3], "b": peptides[3:5]}
    rows = [*accuracy(tiny, entries, families, formats=["int8"]), *memory(tiny, entries, ["int8"])]
    write_csv(tmp_path / "r.csv", rows)
    frame = turboesm.read_results(tmp_path / "r.csv")
    assert sorted(zip(frame.protein, frame.recipe, strict=True)) == sorted(
        (protein.accession, recipe) for protein in peptides[:5] for recipe in ("flat@3", "int8")
    )
    assert not frame.isna().any(axis=None)
    one = frame[(frame.protein == peptides[0].accession) & (frame.recipe == "flat@3")].iloc[0]
    codecs = {"flat": PackedCodec(bundle.spec, tiny.device)}
    drift, coded = (found for _, found in compare_decoding(tiny, peptides[:1], codecs))
    assert one.error == pytest.approx(float((1 - coded.cosines).mean()), rel=1e-6)
    assert one.drift == pytest.approx(float((1 - drift.cosines).mean()), rel=1e-6)
    assert coded.predictions is not None and one.tokens == peptides[0].residues + 2
    assert one.residue_kl_mean == pytest.approx(float(coded.predictions.kl.mean()), rel=1e-6)
    assert one.cosine_mean == 1 - one.error and one.family == "a" and one.bits_per_value < 4.5
    write_csv(tmp_path / "m.csv", memory(tiny, entries))
    with pytest.raises(turboesm.InputError, match="no figures of single proteins"):
        turboesm.read_results(tmp_path / "m.csv")


def test_results_are_read_without_torch(tmp_path: Path) -> None:
    path = sorted((ROOT / "data" / "results" / "0.1.0").glob("*-families.csv"))[0]
    code = f"import sys, turboesm; print(len(turboesm.read_results({str(path)!r})), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows, torch_loaded = done.stdout.split()
    assert int(rows) > 361 and torch_loaded == "False"


def test_the_example_on_the_page_runs(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    assert "import turboesm" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
