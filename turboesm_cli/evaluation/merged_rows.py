"""Results of `decode` on shards → the rows of all proteins together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from turboesm_cli.evaluation.rows import Context, Summary
from turboesm_cli.reporting.results import ResultRow


@dataclass(frozen=True)
class Named:
    """What rows say of a recipe."""

    name: str
    bits_k: float
    bits_v: float


def merged_rows(states: Iterable[Mapping[str, Any]], device: str) -> list[ResultRow]:
    """What `Summary.rows` gives of all proteins of shards with these `Summary.state`; counts and sums are exact.

    device  that they were decoded on, or several

    Rows have the latest date of the shards'. Raises LookupError, TypeError or ValueError for what is no state.
    """
    summary, dates = None, list[str]()
    for state in states:
        dates.append(str(state["context"]["date"]))
        summary = summary or _empty(state, device)
        summary.results.add_state(state["results"])
        summary.drift.add_state(state["drift"])
    if summary is None:
        raise ValueError("no shard")
    return replace(summary, context=replace(summary.context, date=max(dates))).rows()


def _empty(state: Mapping[str, Any], device: str) -> Summary:
    """The summary of no proteins yet, in the circumstances of a state."""
    name, bits_k, bits_v = state["recipe"]
    context = Context(**(dict(state["context"]) | {"device": device}))
    return Summary(context, Named(str(name), float(bits_k), float(bits_v)))
