"""Result files from Python, as pandas frames: a row a protein and recipe, or a row a figure. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboesm_cli.cache.formats import PEERS
from turboesm_cli.errors import InputError
from turboesm_cli.reporting import results
from turboesm_cli.reporting.metric_names import BY_NAME
from turboesm_cli.reporting.recipe_names import typed

if TYPE_CHECKING:
    import pandas as pd

COMPARED = ("decode", "prompted")
"""Protocols of which a recipe has figures of each protein."""

WHERE = ["model", "family", "protocol", "prompt", "device", "dtype", "commit", "accession"]
"""What a protein's figures have in common, whatever the recipe."""


def read_figures(*paths: str | Path, **only: Any) -> pd.DataFrame:
    """Result files of `bench` and `decode` (.csv, or .json of `--json`) as one tidy frame, a row per figure.

    `read_figures("bench.csv", metric="error", recipe="auto")` keeps the rows whose columns have these values.
    Raises InputError for a file that holds something else, or a column that does not exist.
    """
    found = results.read_csv([Path(path) for path in paths])
    for column, value in only.items():
        if column not in found:
            raise InputError(f"no column {column!r}; there are {', '.join(results.COLUMNS)}")
        found = found[found[column] == value]
    return found.reset_index(drop=True)


def read_results(*paths: str | Path) -> pd.DataFrame:
    """Result files of `bench` and `decode` (.csv, or .json of `--json`), one row for each protein and recipe.

    Columns: `protein`; `recipe` as it is typed (`auto@2.5`, `int8`); what `WHERE` names; `tokens`, those decoded;
    a column for each metric (see `metric_names`); `drift`, 1 - mean cosine of the fp32 decode against the encoder
    on the whole protein, NaN where there is none; `bits_per_value` where a file says it, everything counted. Of
    figures that were measured again the last counts. Raises InputError for a file that holds something else, or no
    figures of single proteins.
    """
    figures = results.read_csv([Path(path) for path in paths])
    own = figures[(figures.accession != "") & figures.metric.isin(list(BY_NAME))]
    coded = own[own.protocol.isin(COMPARED)]
    if coded.empty:
        raise InputError(
            f"{', '.join(map(str, paths))}: no figures of single proteins; `bench` and `decode` write them"
        )
    keys = [*WHERE, "recipe", "bits_k", "bits_v"]
    wide = coded.pivot_table(index=keys, columns="metric", values="value", aggfunc="last", sort=False)
    tokens = coded[coded.metric == "cosine_mean"].drop_duplicates(keys, keep="last").set_index(keys).n
    wide = wide.assign(tokens=tokens).reset_index()
    wide = wide.merge(_drift(own), how="left", on=[name for name in WHERE if name != "protocol"])
    wide = wide.merge(_bits(figures), how="left", on=["model", "recipe", "bits_k", "bits_v"])
    wide["recipe"] = [_name(*row) for row in wide[["recipe", "bits_k", "bits_v"]].itertuples(index=False)]
    wide = wide.rename(columns={"accession": "protein"}).rename_axis(columns=None)
    first = ["protein", "recipe", *[name for name in WHERE if name != "accession"], "tokens"]
    metrics = [name for name in BY_NAME if name in wide]
    return wide[[*first, *metrics, "drift", "bits_per_value"]]


def _drift(own: pd.DataFrame) -> pd.DataFrame:
    """Each protein's drift."""
    chosen = own[(own.protocol == "drift") & (own.metric == "error")]
    keys = [name for name in WHERE if name != "protocol"]
    return chosen[[*keys, "value"]].rename(columns={"value": "drift"}).drop_duplicates(keys, keep="last")


def _bits(figures: pd.DataFrame) -> pd.DataFrame:
    """Each recipe's bits per value, at the longest context that was told."""
    held = figures[figures.metric == "bits_per_value"].sort_values("tokens", kind="stable")
    named = held[["model", "recipe", "bits_k", "bits_v", "value"]].rename(columns={"value": "bits_per_value"})
    return named.drop_duplicates(["model", "recipe", "bits_k", "bits_v"], keep="last")


def _name(recipe: str, bits_k: float, bits_v: float) -> str:
    """A recipe as it is typed; a peer or a dense format by its name."""
    return recipe if recipe in (*PEERS, "fp32") else typed(recipe, bits_k, bits_v)
