"""What a report says in words, what it counts and links, and the data inside."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from turboesm_cli.reporting import glossary, overview, plots, proteins, sources
from turboesm_cli.reporting.accessions import uniprot_address
from turboesm_cli.reporting.drawing import styles
from turboesm_cli.reporting.grouping import Rows, variant_of
from turboesm_cli.reporting.pages import html_page
from turboesm_cli.reporting.results import ResultRow, frame, write_csv
from turboesm_cli.reporting.sections import sections
from turboesm_cli.reporting.sources import Sources
from turboesm_cli.reporting.tables import worst_table

BASE = ResultRow(
    "m", "auto", 3, 3, "all", "decode", "error", 0.01, "1", 30, "cpu", "float32", 0, "0.1.0", "abc", torch="2.13.0"
)


def families(recipe: str, *errors: float) -> Rows:
    """Rows of families tm and idr, and of all; those of proteins P00001, P00002 (tm) and x (idr), of 10 tokens."""
    coded = replace(BASE, recipe=recipe)
    each = [
        replace(coded, metric="cosine_mean", value=1 - error, n=10, family=family, accession=name)
        for error, family, name in zip(errors, ("tm", "tm", "idr"), ("P00001", "P00002", "x"), strict=True)
    ]
    tm, idr = (errors[0] + errors[1]) / 2, errors[2]
    together = [
        replace(coded, value=value, n=n, family=family)
        for value, n, family in ((tm, 20, "tm"), (idr, 10, "idr"), (sum(errors) / 3, 30, "all"))
    ]
    bits = replace(coded, protocol="memory", metric="bits_per_value", value=3.25, tokens=1024, family="")
    return [*together, *each, bits]


ROWS = [*families("auto", 0.01, 0.02, 0.03), *families("paper", 0.1, 0.2, 0.6)]


def test_three_sentences() -> None:
    assert overview.sentences(ROWS) == (
        "m decoded 3 proteins (30 tokens) of 2 families with its key/value cache held as auto and paper, and its "
        "last hidden states were compared with those of the same decode over an fp32 cache.",
        "The error, 1 minus the mean cosine, goes from 0.02000 (auto@3 at 3.250 bits per value) to 0.3000 "
        "(paper@3 at 3.250 bits per value).",
        "It ran on cpu in float32 with turboesm 0.1.0 and torch 2.13.0.",
    )


def test_sentences_claim_no_more_than_the_rows() -> None:
    alone = [replace(row, family="tm") for row in ROWS if row.family == "all" and row.recipe == "auto"]
    first, second, _ = overview.sentences(alone)
    assert first.startswith("m decoded 30 tokens of 1 family with") and "is 0.02000 (auto@3)" in second
    parts = [row for row in ROWS if row.family in ("tm", "idr")]
    first, second, _ = overview.sentences(parts)
    assert "(30 tokens)" in first and "goes in the family idr from 0.03000" in second
    speed, where = overview.sentences([replace(BASE, protocol="throughput", metric="tokens_per_second")])
    assert speed == "Of m these results tell the throughput, for auto." and where.startswith("It ran on cpu")


def test_what_the_figures_are_not() -> None:
    assert len(overview.caveats(ROWS)) == 3 and "disorder predicted" in overview.caveats(ROWS)[-1]
    assert not overview.caveats([replace(BASE, protocol="throughput")])
    assert "the calibration set and the command" in overview.caveats([BASE])[1]
    known = replace(
        BASE, calibration="0123456789abcdef", calibration_source="train.fasta", calibration_proteins=1,
        calibration_tokens=2000, command="turboesm bench",
    )  # fmt: skip
    assert len(overview.caveats([known])) == 1
    (section,) = sections(frame([known, replace(known, metric="cosine_mean", calibration="", command="")]))
    facts = dict(section.facts)
    fitted = "train.fasta: 1 protein, 2,000 tokens, sha256 0123456789abcdef..."
    assert facts["Calibration set"] == f"{fitted}; of the proteins measured none took part"
    first, *_ = overview.caveats([replace(known, calibration_seen=2)])
    assert first == "NOT AN HONEST EVALUATION: 2 proteins had been in a codec's calibration set."
    of_memory = replace(known, protocol="memory", metric="bytes")
    assert overview.calibrations([of_memory, replace(known, calibration_seen=2)]) == [
        f"{fitted}; of the proteins measured 2 took part"
    ]
    assert facts["Command"] == "turboesm bench"
    (random,) = overview.caveats([replace(BASE, protocol="throughput", model="random_650M")])
    assert "random weights" in random


def test_kernels_of_all_shapes_have_one_section() -> None:
    kernel = replace(BASE, protocol="kernel", family="", metric="us", unit="us", tokens=1024)
    rows = [
        replace(kernel, model=shape, recipe=name, value=value, metric=metric)
        for shape in ("B1xH20xd64", "B8xH20xd64")
        for name, metric, value in (("ptx", "us", 10.0), ("cudnn", "us", 40.0), ("cudnn", "ratio_cudnn", 4.0))
    ]
    (section,) = sections(frame(rows))
    first, second = section.tables
    assert first.columns == ("shape", "tokens", "bits", "ptx", "cudnn") and not first.folded
    assert first.rows[1] == ("B8xH20xd64", "1,024", "3", "10.00", "40.00")
    assert second.columns[3:] == ("cudnn",) and second.folded


def test_proteins_and_tokens_are_counted() -> None:
    table = overview.counts_table(ROWS)
    assert table is not None and table.rows == (("tm", "2", "20"), ("idr", "1", "10"), ("all", "3", "30"))
    table = overview.counts_table([BASE])
    assert table is not None and [line[0::2] for line in table.rows] == [("all", "30")]
    assert table.rows[0][1] not in ("0", "1") and overview.counts_table([replace(BASE, protocol="time")]) is None


def test_a_proteins_own_error_is_preferred_to_its_cosine() -> None:
    cosine = replace(BASE, metric="cosine_mean", value=0.9, accession="P00001", protocol="prompted", family="")
    (found,) = proteins.protein_errors([cosine]).values()
    assert found[0].error == pytest.approx(0.1) and found[0].tokens == 30
    (found,) = proteins.protein_errors([replace(cosine, metric="error", value=0.125), cosine]).values()
    assert [one.error for one in found] == [0.125]


@pytest.mark.parametrize(("share", "value"), [(0, 1.0), (1, 5.0), (0.5, 2.0), (0.75, 3.5)])
def test_quantiles(share: float, value: float) -> None:
    assert proteins.quantile([5.0, 1.0, 2.0], share) == value


def test_the_worst_come_first_and_lead_to_uniprot() -> None:
    table = worst_table(ROWS)
    assert table is not None and [line[3] for line in table.rows] == ["x", "P00002", "P00001"] * 2
    text = html_page("t", sections(frame(ROWS)), Sources((), "")).text
    assert set(re.findall(r'<a href="([^"]*)"', text)) == {
        f"https://www.uniprot.org/uniprotkb/{name}/entry" for name in ("P00001", "P00002")
    }
    assert "<td>x</td>" in text


@pytest.mark.parametrize(
    ("accession", "known"),
    [
        ("P84864", "P84864"),
        ("A0A023GPI8", "A0A023GPI8"),
        ("P12345-2", "P12345"),
        *((text, "") for text in ("oas-e066", "P1234", "p12345", "P12345/../x", "P12345\n", "WP_012345678")),
    ],
)
def test_accessions_of_uniprot(accession: str, known: str) -> None:
    assert uniprot_address(accession) == (f"https://www.uniprot.org/uniprotkb/{known}/entry" if known else "")


def test_a_recipe_has_one_colour_on_the_whole_page() -> None:
    recipes = proteins.recipes_of(ROWS)
    budgets = [
        variant_of(replace(BASE, recipe="paper", bits_k=bits, device=device)) for bits in (2, 4) for device in "ab"
    ]
    assert len({style.colour for style in styles(recipes, budgets).values()}) == 1
    drawn = [plot(ROWS, recipes) for plot in (plots.frontier_plot, plots.family_plot)]
    (colour,) = {style.colour for style in styles(recipes, budgets).values()}
    assert all(plot is not None and colour in plot.svg for plot in drawn)
    (other,) = styles(["new", *recipes], budgets[:1]).values()
    assert other.colour != colour


def test_the_glossary_explains_what_is_there() -> None:
    words = {term.word for term in glossary.terms(ROWS)}
    assert {"error", "paper", "bits per value"} <= words and not {"drift", "KL", "step"} & words


def test_sources_are_named_by_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "a.csv", ROWS)
    found = sources.sources([tmp_path / "a.csv"], frame(ROWS))
    assert found.csv == (tmp_path / "a.csv").read_text() and re.fullmatch(
        r"a\.csv, sha256 [0-9a-f]{64}", found.lines[0]
    )
    monkeypatch.setattr(sources, "DATA_LIMIT", len(ROWS) - 1)
    found = sources.sources([tmp_path / "a.csv"], frame(ROWS))
    assert found.csv == "" and "Keep the files" in found.lines[1]
    assert "Save the data" not in html_page("t", [], found).text


def test_many_proteins_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = plots.length_plot([replace(row, n=10 + i) for i, row in enumerate(ROWS)], ["auto", "paper"])
    monkeypatch.setattr(plots, "DOTS", 1)
    fewer = plots.length_plot([replace(row, n=10 + i) for i, row in enumerate(ROWS)], ["auto", "paper"])
    assert drawn is not None and fewer is not None and len(fewer.svg) < len(drawn.svg)
