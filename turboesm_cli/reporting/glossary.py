"""Words of a report, each explained once, in the order in which a newcomer needs them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from turboesm_cli.reporting.results import ResultRow


@dataclass(frozen=True)
class Term:
    """A word and its meaning; `of` are the protocols, metrics and recipes that bring it onto a page."""

    word: str
    meaning: str
    of: tuple[str, ...]


TERMS = (
    Term(
        "error",
        "1 minus the mean cosine between the last hidden states of two decodes, over all tokens.",
        ("error",),
    ),
    Term(
        "cosine",
        "The cosine between two hidden states of a token; 1 where they point the same way.",
        ("cosine_mean", "cosine_p05", "cosine_min"),
    ),
    Term(
        "bits per value",
        (
            "Everything that a cache holds for a sequence, scales and padding included, over the number of "
            "entries of its keys and values."
        ),
        ("bits_per_value",),
    ),
    Term(
        "K bits, V bits",
        "Bits asked for of each entry of keys and of values, before scales and padding.",
        ("error", "bytes", "throughput", "kernel"),
    ),
    Term(
        "recipe",
        (
            "How keys and values are coded; or the format of a cache that is not coded by turboesm (fp32, "
            "fp16, int8, ...)."
        ),
        ("error", "bytes", "throughput", "kernel", "ablation"),
    ),
    Term(
        "paper",
        "The recipe of TurboESM, arXiv 2603.26110.",
        ("paper",),
    ),
    Term(
        "layer 0 alone",
        (
            "The first layer's attention output, as in the public code of TurboESM: no error of other layers"
            " is in it."
        ),
        ("paper_heads",),
    ),
    Term(
        "drift",
        (
            "How far the fp32 decode is from the model run on the whole protein at once: the price of any "
            "cache, since earlier tokens never see later ones, and no error of compression."
        ),
        ("drift",),
    ),
    Term(
        "KL",
        "Divergence between the distributions over the next residue or token with both caches, in nat.",
        ("residue_kl_mean", "token_kl_mean"),
    ),
    Term(
        "top-1 agreement",
        "Share of places where the same residue or token is the likeliest with both caches.",
        ("residue_top1_agreement", "token_top1_agreement"),
    ),
    Term(
        "perplexity",
        "The exponential of the mean surprise at the true residue or token; lower is better.",
        ("residue_perplexity", "token_perplexity"),
    ),
    Term(
        "model tables",
        "What all sequences of a model share, held once.",
        ("bytes_model_tables",),
    ),
    Term(
        "step",
        "The decoding of one token of each sequence of a batch.",
        ("us_per_step", "us_per_token"),
    ),
)


def terms(rows: Iterable[ResultRow]) -> tuple[Term, ...]:
    """The terms that rows bring onto a page."""
    present = {name for row in rows for name in (row.protocol, row.metric, row.recipe)}
    return tuple(term for term in TERMS if present.intersection(term.of))
