"""The metrics of accuracy, each once: name in results, where the value comes from, unit, title, how sets join."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A figure of proteins, as results call it.

    name   in results, under `metric`
    field  of `evaluation.metrics.Agreement` or `Divergence`, whose value it is
    unit   of the value, "1" for a plain number
    title  in words
    joins  what makes the figure of several sets of proteins out of theirs: their mean by `n`, their geometric
           mean, their minimum, or "" where nothing does, as for a percentile
    """

    name: str
    field: str
    unit: str
    title: str
    joins: Literal["mean", "geometric mean", "minimum", ""]


ACCURACY = (
    Metric("cosine_mean", "mean", "1", "Mean cosine", "mean"),
    Metric("cosine_p05", "p05", "1", "5th percentile of the cosine", ""),
    Metric("cosine_min", "minimum", "1", "Lowest cosine", "minimum"),
    Metric("error", "error", "1", "Error (1 minus mean cosine)", "mean"),
)
"""Of hidden states against their reference."""

LANGUAGE = (
    Metric("residue_kl_mean", "kl_mean", "nat", "Mean KL", "mean"),
    Metric("residue_kl_p95", "kl_p95", "nat", "95th percentile of the KL", ""),
    Metric("residue_top1_agreement", "top1_agreement", "1", "Share of equal likeliest residues", "mean"),
    Metric("residue_perplexity", "perplexity", "1", "Perplexity", "geometric mean"),
    Metric("residue_perplexity_fp32", "reference_perplexity", "1", "Perplexity, fp32 cache", "geometric mean"),
    Metric("residue_perplexity_ratio", "perplexity_ratio", "1", "Ratio of perplexities", "geometric mean"),
)
"""Of the distribution over the next residue, the 20 amino acids."""

LANGUAGE_OF_TOKENS = tuple(
    replace(metric, name=metric.name.replace("residue", "token"), title=metric.title.replace("residues", "tokens"))
    for metric in LANGUAGE
)
"""Of the distribution of an autoregressive model over the next token, all of its tokens."""

BY_NAME = {metric.name: metric for metric in (*ACCURACY, *LANGUAGE, *LANGUAGE_OF_TOKENS)}
