"""What is kept of a protein's decode: figures of every token, for `metrics` to summarise; they can be saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from turboesm_cli.evaluation import metrics
from turboesm_cli.outputs.work import Tensors
from turboesm_cli.sequences.fasta import Protein


@dataclass(frozen=True)
class ProteinResult:
    """One protein's decoded tokens against a reference.

    cosines      float64 [n] of the final hidden states
    predictions  with an LM head
    layers       float64 [L, 2], squared error and norm of each layer's attention output, where it was traced
    """

    protein: Protein
    cosines: Tensor
    predictions: metrics.Predictions | None = None
    layers: Tensor | None = None


def to_tensors(results: Sequence[ProteinResult]) -> Tensors:
    """What the results hold besides their proteins, by name, to be saved."""
    held: Tensors = {}
    for row, result in enumerate(results):
        held[f"{row}.cosines"] = result.cosines
        if result.layers is not None:
            held[f"{row}.layers"] = result.layers
        if result.predictions is not None:
            held |= {f"{row}.predictions.{name}": x for name, x in vars(result.predictions).items()}
    return held


def from_tensors(held: Tensors, proteins: Sequence[Protein]) -> list[ProteinResult]:
    """The results that gave `held`, of these proteins."""
    return [
        ProteinResult(protein, held[f"{row}.cosines"], _predictions(held, row), held.get(f"{row}.layers"))
        for row, protein in enumerate(proteins)
    ]


def _predictions(held: Tensors, row: int) -> metrics.Predictions | None:
    names = [field.name for field in fields(metrics.Predictions)]
    if f"{row}.predictions.{names[0]}" not in held:
        return None
    return metrics.Predictions(**{name: held[f"{row}.predictions.{name}"] for name in names})
