"""Proteins + a recipe -> a bundle: what `calibrate` does, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from turboesm_cli.codec.bundle import Bundle, check_storable
from turboesm_cli.codec.fit import MOST_TOKENS, fit, require_tokens
from turboesm_cli.codec.header import Calibration, sequence_key
from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.console import Phases, counted, quiet
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.archive import TEXT_LIMIT
from turboesm_cli.outputs.work import NOTHING_KEPT, Work
from turboesm_cli.sequences.fasta import Protein, digest
from turboesm_cli.statistics.accumulators import Statistics
from turboesm_cli.statistics.collect import collect
from turboesm_cli.statistics.sinks import choose_sinks


def calibrate(
    model: Model,
    proteins: Sequence[Protein],
    recipe: Recipe,
    phase: Phases = quiet,
    work: Work = NOTHING_KEPT,
) -> Bundle:
    """Statistics of `proteins` and the codec that `recipe` makes of them. Raises InputError: too few, too many."""
    check(model, proteins, recipe)
    statistics = collect(model, proteins, phase=phase, work=work)
    with phase("fitting", 1) as tick:
        bundle = bundle_of(model, proteins, statistics, recipe)
        tick()
    return bundle


def tokens_of(model: Model, proteins: Sequence[Protein]) -> int:
    """How many tokens the proteins are, control tokens included."""
    return sum(model.alphabet.length(protein) for protein in proteins)


def check(model: Model, proteins: Sequence[Protein], recipe: Recipe) -> None:
    """Raise InputError, before any pass, where proteins are too few to calibrate on, or too many for a bundle."""
    check_storable(model.name, len(proteins), recipe)
    require_enough(model, proteins)


def require_enough(model: Model, proteins: Sequence[Protein]) -> None:
    """Raise InputError, before any pass, where proteins have too few tokens to calibrate on."""
    if proteins:
        require_tokens(model, tokens_of(model, proteins))


FEW_PROTEINS, FEW_TOKENS = 32, 256
"""Under so many proteins, or tokens for each axis of a head, codecs are unsteady: of the embedded 8M the error on
other proteins at 3 bits was 0.0016 with 8 or 16 proteins, 0.0007 with 32 or 64 and 0.0006 with 128."""


def few(model: Model, proteins: Sequence[Protein]) -> str:
    """A warning where proteins are so few that the codec will be unsteady; "" where they are not."""
    tokens, wanted = tokens_of(model, proteins), FEW_TOKENS * model.shape.head_dim
    if len(proteins) >= FEW_PROTEINS and tokens >= wanted:
        return ""
    lacking = [f"{FEW_PROTEINS} proteins"] if len(proteins) < FEW_PROTEINS else []
    lacking += [f"{wanted:,} tokens"] if tokens < wanted else []
    return (
        f"{counted(len(proteins), 'protein')} and {tokens:,} tokens are few for a steady codec: the error may be "
        f"twice what it could be; give {' and '.join(lacking)} at least, better some hundred proteins"
    )


def adapted(model: Model, proteins: Sequence[Protein], recipe: Recipe) -> Recipe:
    """The recipe with what depends on the model: sinks of an autoregressive one, and whether layer 0 keeps tokens.

    A vocabulary may be too large for that: then layer 0 is coded, as it is without.
    """
    if len(model.alphabet) > MOST_TOKENS:
        recipe = replace(recipe, exact_first=False)
    if model.causal and recipe.metric == "sensitivity":
        recipe = replace(recipe, sinks=choose_sinks(model, proteins, recipe.sinks))
    return recipe


def bundle_of(model: Model, proteins: Sequence[Protein], statistics: Statistics, recipe: Recipe) -> Bundle:
    """The bundle of statistics that were collected over `proteins`."""
    return fitted(model, described(model, proteins), statistics, adapted(model, proteins, recipe))


def described(model: Model, proteins: Sequence[Protein]) -> Calibration:
    """What a bundle says of the proteins that it was made from."""
    return Calibration(
        digest(proteins),
        len(proteins),
        sum(model.alphabet.length(protein) for protein in proteins),
        frozenset(sequence_key(protein) for protein in proteins),
        source_of(proteins),
    )


def source_of(proteins: Sequence[Protein]) -> str:
    """The name of the file that proteins came from, or of several; "" where it is too long, or unknown."""
    names = ", ".join(sorted({Path(protein.source).name for protein in proteins}))
    return names if names.isprintable() and len(names) <= TEXT_LIMIT else ""


def fitted(model: Model, calibration: Calibration, statistics: Statistics, recipe: Recipe) -> Bundle:
    """The bundle of a recipe that is `adapted` already."""
    return Bundle(
        model.name,
        model.fingerprint,
        model.shape,
        calibration,
        fit(model, statistics, recipe),
        model.family,
        model.alphabet,
    )
