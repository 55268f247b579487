"""Result rows → tables of text, ready to show. A table whose rows were not measured is left out.

Each function takes the rows of one model, no figure twice (`grouping.gathered`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from turboesm_cli.reporting.grouping import (
    DASH,
    Rows,
    Variant,
    bits_held,
    code_of,
    families_of,
    labels,
    memory_curves,
    seen,
    variant_of,
)
from turboesm_cli.reporting.metric_names import ACCURACY, BY_NAME, LANGUAGE, LANGUAGE_OF_TOKENS
from turboesm_cli.reporting.numbers import cosine, number
from turboesm_cli.reporting.proteins import COMPARED, protein_errors
from turboesm_cli.reporting.results import ResultRow

TIMES = "\N{MULTIPLICATION SIGN}"
MIB = 2**20
WORST = 10
_SHOWN_FIRST = ("error", *(metric.name for metric in ACCURACY if metric.name != "error"))
LANGUAGES = (
    (
        "residue",
        LANGUAGE,
        "At a mask in the residue's place, over the 20 amino acids: the model has not seen the residue.",
    ),
    ("token", LANGUAGE_OF_TOKENS, "Over all tokens of the model."),
)
"""What is predicted, its metrics, and how it is measured."""

ACCESSION = "accession"
"""The column whose cells a page may link to UniProt."""

FURTHER = {
    "throughput": "Throughput of whole models, by batch and context",
    "ablation": "Recipes with one part changed",
    "layer": "Relative error of each layer's attention output",
}
"""Protocols with one table of their own, and its title."""

OUTPUTS = {
    "decode": "final hidden state, whole model decoded",
    "paper": "attention output of layer 0 alone",
    "prompted": "final hidden state, decoded after a prompt",
}


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: bool = False  # long, so shown only when asked for


def error_tables(rows: Rows, protocol: str) -> tuple[list[Table], list[Table]]:
    """Tables of the error under the protocol that a page is about, and all other tables of accuracy, folded."""
    first = accuracy_tables(rows, protocol) if protocol else []
    others = [table for other in OUTPUTS if other != protocol for table in accuracy_tables(rows, other)]
    return first[:1], [replace(table, folded=True) for table in (*first[1:], *others)]


def cost_tables(rows: Rows) -> list[Table | None]:
    """Memory and time."""
    return [memory_table(rows), *time_tables(rows)]


def accuracy_tables(rows: Rows, protocol: str) -> list[Table]:
    """A table a metric, families across; the error table also says how many times less than the paper's."""
    chosen = [row for row in rows if row.protocol == protocol and not row.accession]
    made = [_accuracy_table(rows, chosen, metric, protocol) for metric in _SHOWN_FIRST]
    return [table for table in made if table is not None]


def memory_table(rows: Rows) -> Table | None:
    """Bytes held at each context length, and the ratios to fp32 and fp16 at the longest."""
    curves = memory_curves(rows)
    if not curves:
        return None
    lengths = sorted({length for curve in curves.values() for length in curve})
    held, names, shared = bits_held(rows), labels(curves), _model_tables(rows)
    body = []
    for variant, curve in curves.items():
        sizes = [_mib(curve.get(length)) for length in lengths]
        ratios = [_ratio(rows, curves, variant, fp) for fp in ("fp32", "fp16")]
        body.append((*_lead(variant, names, held), *sizes, *ratios, _mib(shared.get(code_of(variant)))))
    columns = (*LEAD, *(f"{length:,} tokens" for length in lengths))
    columns = (*columns, "fp32 / this", "fp16 / this", "model tables")
    note = "Ratios are at the longest context. Model tables are held once, whatever is decoded."
    return Table("Memory held for decoding (MiB)", columns, tuple(body), note)


def time_tables(rows: Rows) -> list[Table]:
    """A table a metric of protocol `time`: median, and 20th to 80th percentile, at each context length."""
    chosen = [row for row in rows if row.protocol == "time" and not row.accession]
    metrics = seen(row.metric for row in chosen)
    return [_time_table([row for row in chosen if row.metric == metric]) for metric in metrics]


def language_tables(rows: Rows) -> list[Table | None]:
    """How far the language model's predictions move: of residues, and of an autoregressive model's tokens."""
    chosen = [row for row in rows if row.protocol in COMPARED and not row.accession]
    found = []
    for of, metrics, note in LANGUAGES:
        names = [metric.name for metric in metrics]
        mine = [row for row in chosen if row.metric in names]
        folded = len({row.family for row in mine}) > 1
        title = f"Predictions of the next {of}, against an fp32 cache"
        found.append(_metric_table(title, mine, names, note, folded))
    return found


def drift_table(rows: Rows) -> Table | None:
    """What cached decoding itself changes, before any compression."""
    chosen = [row for row in rows if row.protocol == "drift" and not row.accession]
    note = "Not an error of compression: in a cache, earlier tokens never see the later ones."
    title = "Drift: fp32 cached decode against encoding the whole sequence again"
    return _metric_table(title, chosen, sorted(seen(row.metric for row in chosen), key=_place), note)


def _place(metric: str) -> int:
    """Where a metric is shown: the error first, which is drift itself."""
    return _SHOWN_FIRST.index(metric) if metric in _SHOWN_FIRST else len(_SHOWN_FIRST)


def worst_table(rows: Rows) -> Table | None:
    """The proteins with the largest error, ten per recipe."""
    proteins = protein_errors(rows)
    names = labels(proteins)
    body = [
        (*_lead(variant, names), one.accession, one.family or DASH, number(one.error), f"{one.tokens:,}")
        for variant, mine in proteins.items()
        for one in heapq.nsmallest(WORST, mine, key=lambda one: (-one.error, one.accession))
    ]
    columns = (*LEAD[:3], ACCESSION, "family", "error", "tokens")
    title = f"Worst proteins: the {WORST} of the largest error, a recipe"
    return Table(title, columns, tuple(body)) if body else None


def further_tables(rows: Rows) -> list[Table | None]:
    """A table for each protocol of `FURTHER`, a column a metric; of kernels one a metric, a column a kernel."""
    return [
        *_kernel_tables([row for row in rows if row.protocol == "kernel"]),
        *(
            _metric_table(
                title, chosen, seen(row.metric for row in chosen), folded=protocol == "layer",
                group="batch" if protocol == "throughput" else "family",
            )
            for protocol, title in FURTHER.items()
            for chosen in [[row for row in rows if row.protocol == protocol and not row.accession]]
        ),
    ]  # fmt: skip


def _kernel_tables(rows: Rows) -> list[Table]:
    """A line a shape, context and bits; times first, which are not folded. A row's family is its shape."""
    found = []
    for metric in sorted(seen(row.metric for row in rows), key=lambda name: name != "us"):
        chosen = [row for row in rows if row.metric == metric]
        names = labels(map(variant_of, chosen))
        kernels = seen(names.values())
        cells = {(row.family, row.tokens, row.bits_k, names[variant_of(row)]): row.value for row in chosen}
        lines = seen((row.family, row.tokens, row.bits_k) for row in chosen)
        body = tuple(
            (
                shape,
                f"{tokens:,}" if tokens else DASH,
                _bits(bits),
                *(number(cells.get((shape, tokens, bits, kernel))) for kernel in kernels),
            )
            for shape, tokens, bits in lines
        )
        title = f"Kernels of one attention layer: {_headed(metric.replace('_', ' '), chosen[0].unit)}"
        found.append(Table(title, ("shape", "tokens", "bits", *kernels), body, folded=metric != "us"))
    return found


LEAD = ("recipe", "K bits", "V bits", "bits per value")


def _lead(
    variant: Variant, names: Mapping[Variant, str], held: Mapping[Hashable, float] | None = None
) -> tuple[str, ...]:
    lead = (names[variant], _bits(variant.bits_k), _bits(variant.bits_v))
    return lead if held is None else (*lead, number(held.get(code_of(variant))))


def _bits(value: float) -> str:
    return f"{value:g}" if value else DASH


def _accuracy_table(rows: Rows, chosen: Rows, metric: str, protocol: str) -> Table | None:
    cells = {(variant_of(row), row.family or "all"): row.value for row in chosen if row.metric == metric}
    if not cells:
        return None
    names, held = labels(variant for variant, _ in cells), bits_held(rows)
    families = families_of([row for row in chosen if row.metric == metric])
    show: Callable[[float | None], str] = number if metric == "error" else cosine
    body = [(*_lead(v, names, held), *(show(cells.get((v, family))) for family in families)) for v in names]
    title, columns, note = f"{BY_NAME[metric].title}: {OUTPUTS[protocol]}", (*LEAD, *families), ""
    gains = _gains_on_paper(cells, families[-1]) if metric == "error" else {}
    if gains:
        columns = (*columns, "paper / this")
        body = [(*line, _times(gains.get(variant))) for line, variant in zip(body, names, strict=True)]
        note = f"paper / this: the error of the paper's recipe over this one's, family {families[-1]}."
    return Table(title, columns, tuple(body), note)


def _gains_on_paper(cells: Mapping[tuple[Variant, str], float], family: str) -> dict[Variant, float]:
    """Error of the paper's recipe (at its most bits) over each variant's, same device and arithmetic."""
    papers = sorted(
        (v for v, f in cells if f == family and v.recipe == "paper"), key=lambda v: (v.bits_k, v.bits_v)
    )
    by_place = {(paper.device, paper.dtype): cells[paper, family] for paper in papers}
    return {
        variant: by_place[variant.device, variant.dtype] / error
        for (variant, of), error in cells.items()
        if of == family and error > 0 and (variant.device, variant.dtype) in by_place
    }


def _metric_table(
    title: str,
    chosen: Rows,
    metrics: Sequence[str],
    note: str = "",
    folded: bool = False,
    group: str = "family",
) -> Table | None:
    """A line a variant, family and context; a column a metric."""
    if not chosen:
        return None
    present = [metric for metric in metrics if any(row.metric == metric for row in chosen)]
    cells = {(variant_of(row), row.family, row.tokens, row.metric): row.value for row in chosen}
    names = labels(variant_of(row) for row in chosen)
    units = {row.metric: row.unit for row in chosen}
    lines = seen((variant_of(row), row.family, row.tokens) for row in chosen)
    # A column of dashes would say nothing.
    with_family, with_tokens = any(family for _, family, _ in lines), any(tokens for _, _, tokens in lines)
    body = tuple(
        (
            *_lead(variant, names),
            *([family or DASH] if with_family else []),
            *([f"{tokens:,}" if tokens else DASH] if with_tokens else []),
            *(_show(metric)(cells.get((variant, family, tokens, metric))) for metric in present),
        )
        for variant, family, tokens in lines
    )
    heads = tuple(_headed(metric.replace("_", " "), units[metric]) for metric in present)
    about = [name for name, shown in ((group, with_family), ("tokens", with_tokens)) if shown]
    return Table(title, (*LEAD[:3], *about, *heads), body, note, folded)


def _show(metric: str) -> Callable[[float | None], str]:
    return cosine if metric.startswith("cosine") else number


def _headed(name: str, unit: str) -> str:
    said = unit in ("", "1") or f"{name} ".startswith(f"{unit} ")  # us_per_token says its unit already
    return name if said else f"{name} ({unit})"


def _time_table(chosen: Rows) -> Table:
    cells = {(variant_of(row), row.tokens): row for row in chosen}
    lengths = sorted({row.tokens for row in chosen})
    names = {variant: variant.recipe for variant, _ in cells}
    body = tuple(
        (
            *_lead(variant, names),
            variant.device,
            variant.dtype,
            *(_timing(cells.get((variant, at))) for at in lengths),
        )
        for variant in names
    )
    heads = tuple(f"{length:,} tokens" if length else "any length" for length in lengths)
    name, unit = chosen[0].metric.replace("_", " "), chosen[0].unit
    title = f"Time: {_headed(name, unit)}"
    note = f"Median (20th{DASH}80th percentile)." if any(row.p20 is not None for row in chosen) else ""
    return Table(title, (*LEAD[:3], "device", "dtype", *heads), body, note)


def _timing(row: ResultRow | None) -> str:
    if row is None:
        return DASH
    spread = "" if row.p20 is None or row.p80 is None else f" ({number(row.p20)}{DASH}{number(row.p80)})"
    return number(row.value) + spread


def _mib(size: float | None) -> str:
    return DASH if size is None else number(size / MIB)


def _times(ratio: float | None) -> str:
    return DASH if ratio is None else f"{number(ratio)}{TIMES}"


def _model_tables(rows: Rows) -> dict[Hashable, float]:
    return {code_of(variant_of(row)): row.value for row in rows if row.metric == "bytes_model_tables"}


def _ratio(rows: Rows, curves: Mapping[Variant, Mapping[int, float]], variant: Variant, name: str) -> str:
    """The stored ratio at the variant's longest context, else the one that the bytes give."""
    longest = max(curves[variant])
    for row in rows:
        if row.metric == f"ratio_{name}" and row.tokens == longest and variant_of(row) == variant:
            return _times(row.value)
    full = next((curve.get(longest) for of, curve in curves.items() if of.recipe == name), None)
    held = curves[variant][longest]
    return _times(full / held if full and held else None)
