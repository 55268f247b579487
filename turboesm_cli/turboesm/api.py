"""The functions of `import turboesm`. They print nothing: what was mended in an input is a Python warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from turboesm_cli.cache import packed
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.codec.bundle import Bundle, read_bundle
from turboesm_cli.codec.calibration import calibrate as _calibrate
from turboesm_cli.codec.calibration import check
from turboesm_cli.codec.recipes import parse_recipe
from turboesm_cli.console import counted
from turboesm_cli.errors import InputError
from turboesm_cli.evaluation import accuracy, frontier
from turboesm_cli.models import forward
from turboesm_cli.models.loading import load_model as _load_model
from turboesm_cli.models.protocol import Model
from turboesm_cli.reporting import results
from turboesm_cli.sequences import fasta
from turboesm_cli.sequences.fasta import LongPolicy, Protein, ReadPolicy, ReadReport
from turboesm_cli.statistics.batching import to_tokens

if TYPE_CHECKING:
    import pandas as pd


def load_model(name: str, device: str = "auto", dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> Model:
    """A model by official name (`esm2_t33_650M`), file, folder, OWNER/MODEL or "embedded".

    device  "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1"
    dtype   of the weights

    Raises ModelError where it cannot be found or read, DeviceError where the device is not there.
    """
    return _load_model(name, device, FORMATS[dtype].dtype)


def read_fasta(
    path: str | Path, *, strict: bool = False, long: Literal["error", "truncate", "window"] = "error"
) -> list[Protein]:
    """The proteins of a file, compressed or not: FASTA, GenBank, EMBL, UniProt, PDB, mmCIF or an alignment.

    What is mended or skipped is a warning, or with `strict` an InputError; `long` says what becomes of proteins of
    more than 1022 residues. Raises InputError where the file cannot be read or holds no proteins.
    """
    report = ReadReport()
    found = list(fasta.read_fasta(path, ReadPolicy(strict=strict, long=LongPolicy(long)), report))
    for what, times in sorted(report.mended.items()):
        warnings.warn(f"{path}: {what}: {counted(times, 'record')}", stacklevel=2)
    for reject in report.rejects:
        where = f"record {reject.record} ({reject.accession}), line {reject.line}"
        warnings.warn(f"{path}: skipped {where}: {reject.reason}", stacklevel=2)
    return found


def calibrate(
    model: Model,
    proteins: Sequence[Protein],
    recipe: str = "auto",
    *,
    max_error: float | None = None,
    max_kl: float | None = None,
) -> Bundle:
    """Learn how to code a model's keys and values from proteins; `recipe` as in `turboesm calibrate --recipe`.

    With `max_error` (1 - mean cosine of final hidden states) or `max_kl` (of the next residue or token, nat) it is
    the smallest budget of the recipe that is predicted to hold them, by decoding the proteins held back.

    Raises InputError for too few proteins, a recipe that does not exist, or where no budget holds the bounds.
    """
    wanted = parse_recipe(recipe)
    if max_error is None and max_kl is None:
        return _calibrate(model, proteins, wanted)
    if "@" in recipe:
        raise InputError(f"max_error and max_kl choose the budget of bits: name {wanted.name} without one")
    check(model, proteins, wanted)
    return frontier.learned(model, proteins, wanted, max_error=max_error, max_kl=max_kl).chosen.bundle


def load_bundle(path: str | Path) -> Bundle:
    """A bundle that `calibrate` or `Bundle.save` wrote, with everything in it checked. Raises BundleError."""
    return read_bundle(Path(path))


def tokenize(model: Model, proteins: Iterable[Protein | str]) -> Tensor:
    """Token ids int64 [B, T] of proteins, or of their sequences, on the model's device, padded on the right.

    Control tokens are included. Raises InputError for a letter that is no residue.
    """
    named = [item if isinstance(item, Protein) else Protein("", "", item) for item in proteins]
    if not named:
        raise InputError("no proteins to tokenize")
    return to_tokens(named, model)


class PackedCache(packed.PackedCache):
    """Keys and values of up to `batch` sequences of `capacity` tokens each, packed as a bundle says.

    All memory is taken at once; `nbytes` counts it. Raises BundleError where the bundle is of another model.
    """

    def __init__(self, model: Model, bundle: Bundle, batch: int, capacity: int) -> None:
        bundle.check_model(model, "the bundle")
        super().__init__(model, bundle.spec, batch, capacity)


@torch.no_grad()
def prefill(model: Model, tokens: Tensor, cache: packed.PackedCache) -> Tensor:
    """Encode prompts int64 [B, P], padded on the right, into an empty cache of as many sequences.

    Returns their final hidden states [B, P, E], which are exact. Raises InputError where the cache is not empty,
    or is for another number of sequences.
    """
    if len(tokens) != cache.batch or bool(cache.lengths.any()):
        raise InputError(f"prefill takes an empty cache of {len(tokens)} sequences; make one, or call truncate(0)")
    return forward.prefill(model, tokens, cache)


@torch.no_grad()
def step(model: Model, tokens: Tensor, cache: packed.PackedCache) -> Tensor:
    """Decode one token of each sequence, int64 [B], from the cache, which grows by it: hidden states [B, E]."""
    return forward.step(model, tokens, cache)


def evaluate(
    model: Model, bundle: Bundle, proteins: Sequence[Protein], *, allow_seen: bool = False
) -> pd.DataFrame:
    """What a bundle costs in accuracy on proteins: the rows of `turboesm bench`, see `read_figures`.

    Every token is decoded from the cache, all layers quantized, against the same decode with an fp32 cache. Raises
    InputError where a protein was in the bundle's calibration set, unless `allow_seen`, or for random weights.
    """
    if model.is_random:
        raise InputError(f"{model.name} has random weights, which accuracy cannot be measured on")
    if not proteins:
        raise InputError("no proteins to evaluate on")
    entries, families = [accuracy.Entry("the bundle", bundle)], {"proteins": proteins}
    bundle.check_model(model, "the bundle")
    if not allow_seen:
        accuracy.refuse_seen(entries, families)
    return results.frame(accuracy.accuracy(model, entries, families))
