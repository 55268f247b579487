"""Calibration statistics of a shard on disk, and the bundle that those of all shards make.

manifest: model {name, fingerprint, given: how the command named it}; recipe (every field, adapted to the model);
calibration {sha256, proteins, tokens, sequences} of all shards together, as in a bundle.
A part, as safetensors, for each of PARTS; see `statistics.accumulators.Gathered`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from turboesm_cli.codec.bundle import Bundle, described_calibration
from turboesm_cli.codec.calibration import fitted
from turboesm_cli.codec.header import Calibration, parse_calibration, parse_recipe_fields
from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.errors import BundleError, InputError
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.archive import Archive, new_archive, printable, to_bytes
from turboesm_cli.outputs.shard_records import Part, Seal, check_bytes
from turboesm_cli.statistics.accumulators import Gathered, Sample

KIND = "turboesm-statistics"
VERSION = 1
PARTS = ("fitted", "sample", "held", "held_sample")


def write_statistics(
    path: Path,
    model: Model,
    given: str,
    calibration: Calibration,
    recipe: Recipe,
    gathered: Gathered,
    seal: Seal | None = None,
) -> None:
    """Write what a shard gathered, whole or not at all. Raises OutputError.

    given  what the command calls the model
    """
    tensors = (gathered.fitted, gathered.sample.tensors, gathered.held, gathered.held_sample.tensors)
    with new_archive(path, KIND, VERSION, seal) as archive:
        archive.manifest = {
            "model": {"name": model.name, "fingerprint": model.fingerprint, "given": given},
            "recipe": recipe.as_dict(),
            "calibration": described_calibration(calibration),
        }
        for name, part in zip(PARTS, tensors, strict=True):
            archive.add(name, map(to_bytes, [part]))


def model_given(path: Path) -> str:
    """How the command that wrote the statistics called the model."""
    with Archive(path, KIND, VERSION) as archive:
        try:
            return printable(archive.manifest["model"]["given"])
        except (LookupError, TypeError, ValueError) as error:
            raise archive.broken(repr(error)) from error


def merged_bundle(parts: Sequence[Part], model: Model) -> Bundle:
    """The bundle of the statistics of all shards, one in memory at a time.

    Raises InputError or BundleError where a part is not what its shard wrote, or is of another model.
    """
    head: dict[str, Any] = {}
    total: Gathered | None = None
    for part in parts:
        check_bytes(part)
        with Archive(part.path, KIND, VERSION) as archive:
            own = {name: value for name, value in archive.manifest.items() if name != "parts"}
            head = head or own
            if own != head:
                raise InputError(f"{part.path} has statistics of another set of proteins than {parts[0].path}")
            found = _read(archive, model)
        total = found if total is None else total.plus(found, model.shape.head_dim)
    if total is None or not total.fitted or not total.held:
        raise InputError("the shards hold no statistics; run them again")
    try:
        calibration, recipe = parse_calibration(head["calibration"]), parse_recipe_fields(head["recipe"])
        return fitted(model, calibration, total.statistics(calibration.proteins, calibration.tokens), recipe)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BundleError(f"{parts[0].path} is damaged: {error!r}; run that shard again") from error


def _read(archive: Archive, model: Model) -> Gathered:
    try:
        theirs = archive.manifest["model"]
        if theirs["fingerprint"] != model.fingerprint:
            raise BundleError(
                f"the statistics are of {printable(theirs['name'])}, not of {model.name} (their weights differ); "
                "name their model with --model"
            )
        fitted_sums, sample, held, held_sample = map(archive.read, PARTS)
        of = partial(Sample.of, layers=model.shape.layers)
        return Gathered(fitted_sums, of(sample), held, of(held_sample))
    except (LookupError, TypeError, ValueError) as error:
        raise archive.broken(repr(error)) from error
