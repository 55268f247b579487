"""What a shard of `bench` measured, on disk, and the rows of all shards.

manifest: context, recipes [[name, [name, bits_k, bits_v]], ...] and inputs, as in `accuracy_rows.Circumstances`;
measured: whether accuracy is (not of random weights); rows: those that are of no protein, from shard 0 alone;
accessions {family: [...]} of the shard's proteins.
A part, as safetensors, of each family and recipe: decoded-FAMILY-RECIPE, see `protein_results`, and of encoders
first-RECIPE-FAMILY, layer 0's cosines; both by number, 0 of the former being drift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from turboesm_cli.errors import InputError
from turboesm_cli.evaluation.accuracy_rows import (
    Circumstances,
    Measured,
    decoded_rows,
    first_layer_rows,
)
from turboesm_cli.evaluation.merged_rows import Named
from turboesm_cli.evaluation.protein_results import from_tensors, to_tensors
from turboesm_cli.evaluation.rows import Context, identity_of
from turboesm_cli.evaluation.teacher_forced import DRIFT, FirstLayer
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.archive import Archive, new_archive, to_bytes
from turboesm_cli.outputs.shard_records import Part, Seal, check_bytes
from turboesm_cli.outputs.shards import Shard, part_of
from turboesm_cli.reporting.results import ResultRow
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import batches

KIND = "turboesm-bench"
VERSION = 1
TOKENS_PER_BATCH = 4096


def own_batches(
    model: Model, families: Mapping[str, Sequence[Protein]], shard: Shard
) -> tuple[dict[str, range], tuple[int, int, int]]:
    """The numbers of a shard's batches in each family; its first batch, how many it has, how many there are."""
    sizes = {
        family: [
            sum(protein.residues for protein in batch)
            for batch in batches(proteins, TOKENS_PER_BATCH, model.alphabet)
        ]
        for family, proteins in families.items()
    }
    own, own_by_family, before = part_of([size for each in sizes.values() for size in each], shard), {}, 0
    for family, each in sizes.items():
        own_by_family[family] = range(max(0, own.start - before), max(0, min(own.stop - before, len(each))))
        before += len(each)
    return own_by_family, (own.start, len(own), before)


def own_proteins(model: Model, families: Mapping[str, Sequence[Protein]], own: Mapping[str, range]) -> int:
    """How many proteins are in batches of these numbers."""
    each = {family: list(batches(few, TOKENS_PER_BATCH, model.alphabet)) for family, few in families.items()}
    return sum(len(each[family][number]) for family, numbers in own.items() for number in numbers)


def write_part(
    path: Path, about: Circumstances, measured: Measured | None, rows: Iterable[ResultRow], seal: Seal | None
) -> None:
    """Write what a shard measured, None where accuracy is not, and `rows` of no protein. Raises OutputError."""
    with new_archive(path, KIND, VERSION, seal) as archive:
        archive.manifest = {
            "context": asdict(about.context.dated()),
            "recipes": [[name, [*identity_of(recipe)]] for name, recipe in about.recipes.items()],
            "inputs": dict(about.inputs),
            "measured": measured is not None,
            "rows": [asdict(row) for row in rows],
            "accessions": {},
        }
        if measured is None:
            return
        for number, (family, by_name) in enumerate(measured.decoded.items()):
            results = next((each for each in by_name.values() if each), [])
            archive.manifest["accessions"][family] = [result.protein.accession for result in results]
            for index, each in enumerate(by_name.values()):
                archive.add(f"decoded-{number}-{index}", map(to_bytes, [to_tensors(each)]))
        for index, by_family in enumerate(measured.first.values()):
            for number, parts in enumerate(by_family.values()):
                tensors = {f"{row}.{name}": x for row, part in enumerate(parts) for name, x in vars(part).items()}
                archive.add(f"first-{index}-{number}", map(to_bytes, [tensors]))


def merged_bench(parts: Sequence[Part], device: str) -> list[ResultRow]:
    """The rows of all shards. Raises InputError or BundleError where a part is not what its shard wrote.

    device  that they were measured on, or several
    """
    about: Circumstances | None = None
    measured, rows, dates, known = Measured(), list[ResultRow](), list[str](), True
    for part in parts:
        check_bytes(part)
        with Archive(part.path, KIND, VERSION) as archive:
            try:
                own = _circumstances(archive.manifest, device)
                dates.append(str(archive.manifest["context"]["date"]))
                about = about or own
                if own != about:
                    raise InputError(f"{part.path} was measured in other circumstances than {parts[0].path}")
                known = bool(archive.manifest["measured"])
                rows += [ResultRow(**row) for row in archive.manifest["rows"]]
                if known:
                    _read(archive, about, measured)
            except (LookupError, TypeError, ValueError) as error:
                raise archive.broken(repr(error)) from error
    if about is None:
        raise InputError("no shards to merge")
    about = replace(about, context=replace(about.context, date=max(dates)))
    if known:
        rows += [*decoded_rows(about, measured), *first_layer_rows(about, measured)]
    return rows


def _circumstances(manifest: Mapping[str, Any], device: str) -> Circumstances:
    recipes = {str(name): Named(*identity) for name, identity in manifest["recipes"]}
    context = Context(**(manifest["context"] | {"device": device, "date": ""}))
    return Circumstances(context, recipes, dict(manifest["inputs"]))


def _read(archive: Archive, about: Circumstances, measured: Measured) -> None:
    """Put the results of a shard behind those of the shards before it."""
    names = (DRIFT, *about.recipes)
    for number, family in enumerate(about.families):
        proteins = [Protein(str(name), "", "") for name in archive.manifest["accessions"][family]]
        own = measured.decoded.setdefault(family, {name: [] for name in names})
        for index, name in enumerate(names):
            tensors = archive.read(f"decoded-{number}-{index}")
            own[name] += from_tensors(tensors, proteins) if tensors else []
    for index, name in enumerate(about.recipes):
        for number, family in enumerate(about.families):
            part = f"first-{index}-{number}"
            if part in archive.parts:
                tensors = archive.read(part)
                rows = range(len(tensors) // 2)
                each = (FirstLayer(tensors[f"{row}.joined"], tensors[f"{row}.heads"]) for row in rows)
                measured.first.setdefault(name, {}).setdefault(family, []).extend(each)
