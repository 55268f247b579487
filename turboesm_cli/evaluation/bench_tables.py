"""What `bench` shows on the screen of the rows that it writes."""

from __future__ import annotations

from collections.abc import Sequence

from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.evaluation.rows import identity_of, number
from turboesm_cli.reporting.results import ResultRow


def bench_tables(
    rows: Sequence[ResultRow], recipes: Sequence[Recipe | str], families: Sequence[str]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of the tables that `bench` shows: accuracy by family, then memory and time."""
    found = {
        (r.recipe, r.bits_k, r.bits_v, r.family, r.protocol, r.metric, r.tokens): r
        for r in rows
        if not r.accession
    }

    def value(recipe: Recipe | str, family: str, protocol: str, metric: str, tokens: int = 0) -> float | None:
        row = found.get((*identity_of(recipe), family, protocol, metric, tokens))
        return None if row is None else row.value

    overall = [*families, "all"] if len(families) > 1 else list(families)
    tables = []
    if any(row.protocol == "decode" for row in rows):
        shown = {(row.protocol, row.metric) for row in rows}
        further = [column for column in _FURTHER if column[:2] in shown]
        accuracy = [
            [_label(recipe)]
            + [number(value(recipe, family, "decode", "error")) for family in overall]
            + [number(value(recipe, overall[-1], "decode", f"cosine_{m}")) for m in ("mean", "p05", "min")]
            + [number(value(recipe, overall[-1], protocol, metric)) for protocol, metric, _ in further]
            for recipe in recipes
        ]
        drift = ["drift of fp32"] + [number(value("fp32", family, "drift", "error")) for family in overall]
        drift += [number(value("fp32", overall[-1], "drift", f"cosine_{m}")) for m in ("mean", "p05", "min")]
        columns = ["recipe", *(f"error {name}" for name in overall), "cosine", "p5", "min"]
        title = "Decoded hidden states against an fp32 cache: error = 1 - mean cosine"
        has_drift = any(row.protocol == "drift" for row in rows)
        lines = [*accuracy, [*drift, *[""] * len(further)]] if has_drift else accuracy
        tables.append((title, [*columns, *(name for _, _, name in further)], lines))
    cost = []
    caches: list[Recipe | str] = list(dict.fromkeys(["fp32", "fp16", *recipes]))
    longest = max((row.tokens for row in rows if row.protocol == "memory"), default=0)
    for cache in caches:
        figures = [value(cache, "", "memory", name, longest) for name in _MEMORY_METRICS]
        figures += [
            value(cache, "", "memory", "bytes_model_tables"),
            value(cache, "", "time", "us_per_token", 256),
        ]
        cost.append([_label(cache), *map(number, figures)])
    columns = [
        "cache",
        f"bytes at {longest} tokens",
        "bits per value",
        "x fp32",
        "x fp16",
        "tables",
        "us per token at 256",
    ]
    return [*tables, ("Memory of a sequence, everything counted, and time", columns, cost)]


_FURTHER = (
    ("decode", "residue_kl_mean", "residue KL (nat)"),
    ("decode", "residue_top1_agreement", "residue top-1"),
    ("decode", "token_kl_mean", "token KL (nat)"),
    ("decode", "token_top1_agreement", "token top-1"),
    ("paper", "cosine_mean", "layer 0 cosine"),
)
"""Protocol, metric and column of what is shown where there is a language-model head, or an encoder."""

_MEMORY_METRICS = ("bytes", "bits_per_value", "ratio_fp32", "ratio_fp16")


def _label(recipe: Recipe | str) -> str:
    return recipe if isinstance(recipe, str) else recipe.typed
