"""`turboesm bench`: recipes side by side on evaluation proteins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboesm_cli import console
from turboesm_cli.commands import options
from turboesm_cli.commands.reading import Reading
from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import MAX_RESIDUES
from turboesm_cli.sequences.records import RECORD_CAP

if TYPE_CHECKING:
    from turboesm_cli.codec.recipes import Recipe
    from turboesm_cli.evaluation.accuracy import Entry
    from turboesm_cli.models.protocol import Model
    from turboesm_cli.outputs.work import Work
    from turboesm_cli.reporting.results import ResultRow
    from turboesm_cli.sequences.fasta import Protein


Shown = tuple[str, list[str], list[list[str]]]
"""A table's title, columns and rows."""


def bench(
    families: Annotated[
        str, typer.Option(help="Families (tm, idr, enzyme, globular, peptide) or FASTA files, by comma.")
    ] = "tm,idr,enzyme,globular,peptide",
    recipes: Annotated[
        str | None,
        typer.Option(
            help="Recipes by comma; NAME@BITS or NAME@BITS_K/BITS_V sets a budget. "
            "Dense caches too: fp16, bf16, int8, fp8. Default: paper,flat,auto@2,auto; --throughput: auto.",
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[
        list[Path] | None,
        typer.Option("--bundle", help="A ready bundle, in place of --recipes; repeatable.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Figures, as CSV.")] = Path("bench.csv"),
    calibration: Annotated[
        Path | None,
        typer.Option(help="Proteins to calibrate on. Default: the bundled 900.", show_default=False),
    ] = None,
    max_calibration: Annotated[
        int | None, typer.Option(min=1, help="Calibrate on the first N proteins.", show_default=False)
    ] = None,
    max_proteins: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on the first N of each family.", show_default=False)
    ] = None,
    max_residues: Annotated[int, typer.Option(min=1, help="Leave out longer evaluation proteins.")] = 500,
    ablate: Annotated[
        bool,
        typer.Option("--ablate", help="Measure what each part of the recipes is worth, in place of --recipes."),
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Time the GPU kernels on synthetic caches against fp16 SDPA instead."),
    ] = False,
    throughput: Annotated[
        bool,
        typer.Option("--throughput", help="Measure tokens a second and memory of whole models, cache by cache."),
    ] = False,
    batch: Annotated[str, typer.Option(help="--throughput: sequences at once, by comma.")] = "1,8",
    context: Annotated[str, typer.Option(help="--throughput: tokens of a sequence, by comma.")] = "256,1024",
    kinds: Annotated[
        str, typer.Option(help="--throughput: caches by comma; packed ones are of --recipes or --bundle.")
    ] = "fp16,bf16,int8,fp8,packed",
    memory: Annotated[
        str | None,
        typer.Option(help="--throughput: find the largest batch in so much, such as 24GiB.", show_default=False),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="--throughput: say what memory it would take; stop.")
    ] = False,
    dtype: options.Dtype = "fp32",
    allow_seen: Annotated[bool, typer.Option(help="Flag, do not refuse, proteins seen in calibration.")] = False,
    rejects: options.Rejects = None,
    model: options.ModelName = None,
    device: options.Device = "auto",
    json: options.Json = False,
    force: options.Force = False,
    if_done: options.IfDone = "refuse",
    resume_anywhere: options.ResumeAnywhere = False,
) -> None:
    """Measure what recipes cost in accuracy and save in memory, on proteins that took no part in calibration.

    Every token is decoded from the cache, all layers quantized, against the same decode with an fp32 cache.
    Each recipe is calibrated on the same proteins; its bundle is kept for the next run.

    Example: turboesm bench --families tm,idr,peptide --recipes paper,auto -o results.csv

    Example: turboesm bench --throughput --model random:esm2_t33_650M --dtype bf16 --batch 1,64 --context 1024
    """
    from turboesm_cli.reporting.results import to_records, write_csv

    kept = options.Kept(output, force, if_done, resume_anywhere, writes=not (throughput and plan))
    if (throughput or kernels) and (if_done == "skip" or resume_anywhere):
        raise typer.BadParameter(
            "timings are not resumed: leave out --if-done and --resume-anywhere",
            param_hint="--throughput, --kernels",
        )
    if throughput:
        from turboesm_cli.commands.throughput import Wanted, bench_throughput

        bench_throughput(
            Wanted(
                batch, context, kinds, memory, recipes or "auto", bundle or [], dtype, plan, model, device, json,
                output,
            )
        )  # fmt: skip
        return
    if kernels:
        _bench_kernels(output)
        return
    reading = Reading(rejects=rejects, max_residues=RECORD_CAP)
    sets = _families(reading, families, max_proteins, max_residues)
    if dtype != "fp32":
        raise InputError("--dtype is for --throughput; codecs are fitted and compared in fp32")
    loaded = options.open_model(model, device)
    learned = _calibration(replace(reading, limit=max_calibration, max_residues=MAX_RESIDUES), calibration)
    chosen = recipes or "paper,flat,auto@2,auto"
    described = {
        "families": ", ".join(f"{len(few)} of {family}" for family, few in sets.items()),
        "measured": "ablation" if ablate else ", ".join(_sources(chosen, bundle)),
    }
    inputs = _digest([learned, *sets.values()])
    run = options.run_of("bench", loaded, inputs, **described)
    if kept.is_done(run):
        return
    with kept.work(run) as work:
        if ablate:
            rows, tables = _ablate(loaded, learned, sets, work)
        else:
            named, formats = _split_recipes(chosen)
            entries = _entries(loaded, named, bundle, learned, work)
            _check_seen(entries, sets, allow_seen)
            rows, tables = _measure(loaded, entries, sets, formats, work)
        write_csv(output, rows)
    if json:
        console.print_json(to_records(rows))
    else:
        for title, columns, cells in tables:
            console.print_table(title, columns, cells)
    console.say(f"{len(rows)} figures in {output}; `turboesm report {output}` shows them")


def _bench_kernels(output: Path) -> None:
    import torch

    from turboesm_cli import __version__
    from turboesm_cli.errors import DeviceError
    from turboesm_cli.reporting.results import commit_of_source, write_csv

    if not torch.cuda.is_available():
        raise DeviceError("--kernels times CUDA kernels, and there is no CUDA device here")
    from turboesm_cli.evaluation import kernel_speed

    rows = []
    for row in kernel_speed.bench(version=__version__, commit=commit_of_source()):
        rows.append(row)
        console.say(f"{row.model} {row.tokens} {row.recipe} {row.metric} {row.value:.4g} {row.unit}")
    write_csv(output, rows)
    console.files.append(output)
    cells = [[row.model, str(row.tokens), row.recipe, row.metric, f"{row.value:.4g} {row.unit}"] for row in rows]
    console.print_table("Kernels", ["shape", "tokens", "what", "figure", "value"], cells)
    title = "Fastest fp16 attention's time over ours, 3 bits: above 1, packed is faster"
    console.print_table(title, *kernel_speed.map_cells(rows))


def _sources(recipes: str, bundles: list[Path] | None) -> list[str]:
    """What the codecs come from: recipes, or bundles by their start of sha256."""
    from turboesm_cli.cache.cache_file import file_sha256

    return [f"{path} {file_sha256(path)[:16]}" for path in bundles] if bundles else [recipes]


def _digest(sets: list[list[Protein]]) -> str:
    from turboesm_cli.sequences.fasta import digest_in_order

    return digest_in_order(protein for proteins in sets for protein in proteins)


def _families(reading: Reading, names: str, limit: int | None, max_residues: int) -> dict[str, list[Protein]]:
    from turboesm_cli.sequences.datasets import family_label, family_path

    sets = {}
    for name in filter(None, names.split(",")):
        label = family_label(name)
        if label in sets or label == "all":
            raise InputError(f"two families are called {label!r}, or one 'all'; rename a file")
        proteins = reading.proteins(str(family_path(name)))
        short = [protein for protein in proteins if protein.residues <= min(max_residues, MAX_RESIDUES)]
        console.say(f"{label}: {len(short)} of {len(proteins)} proteins, up to {max_residues} residues")
        sets[label] = short[:limit]
    if not sets or not all(sets.values()):
        raise InputError("no proteins to evaluate on; name families with --families, or raise --max-residues")
    return sets


def _calibration(reading: Reading, path: Path | None) -> list[Protein]:
    from turboesm_cli.sequences.datasets import calibration_path

    return reading.proteins(str(path or calibration_path()))


def _entries(
    model: Model, recipes: str, bundles: list[Path] | None, proteins: list[Protein], work: Work
) -> list[Entry]:
    from turboesm_cli.codec.bundle import read_bundle
    from turboesm_cli.evaluation.accuracy import Entry, calibrated

    if bundles:
        ready = [Entry(str(path), read_bundle(path)) for path in bundles]
        for entry in ready:
            entry.bundle.check_model(model, entry.name)
        _refuse_twins(ready)
        return ready
    chosen = _recipes(recipes)
    with console.progress("calibrating", len(proteins)) as tick:
        entries = calibrated(model, proteins, chosen, tick, work.under("calibration"))
    _refuse_twins(entries)
    return entries


def _refuse_twins(entries: list[Entry]) -> None:
    """Results tell codecs apart by recipe and bits."""
    recipes = [entry.spec.recipe for entry in entries]
    keys = [(recipe.name, recipe.bits_k, recipe.bits_v) for recipe in recipes]
    for name, bits_k, bits_v in keys:
        if keys.count((name, bits_k, bits_v)) > 1:
            raise InputError(f"recipe {name} K{bits_k:g} V{bits_v:g} is there twice; measure one at a time")


def _split_recipes(names: str) -> tuple[str, list[str]]:
    """Recipes, and the dense formats named among them."""
    from turboesm_cli.cache.formats import FORMATS

    parts = list(dict.fromkeys(filter(None, names.split(","))))
    dense = [name for name in parts if name in FORMATS]
    return ",".join(name for name in parts if name not in dense), dense


def _recipes(names: str) -> dict[str, Recipe]:
    from turboesm_cli.codec.recipes import parse_recipe

    chosen = {name: parse_recipe(name) for name in filter(None, names.split(","))}
    if not chosen:
        raise InputError("no recipe to measure; name some with --recipes")
    return chosen


def _check_seen(entries: list[Entry], sets: dict[str, list[Protein]], allow: bool) -> None:
    from turboesm_cli.evaluation.accuracy import refuse_seen

    try:
        refuse_seen(entries, sets)
    except InputError as error:
        if not allow:
            raise
        console.warn(f"NOT AN HONEST EVALUATION: {error}")


def _measure(
    model: Model, entries: list[Entry], sets: dict[str, list[Protein]], formats: list[str], work: Work
) -> tuple[list[ResultRow], list[Shown]]:
    from turboesm_cli.evaluation import accuracy
    from turboesm_cli.evaluation.rows import bench_tables

    rows = [*accuracy.memory(model, entries, formats), *accuracy.times(model, entries, work=work.under("time"))]
    if model.is_random:
        console.warn(f"{model.name} has random weights: time and memory are measured, accuracy is not")
    else:
        total = sum(map(len, sets.values())) * (len(entries) + len(formats) + 1)
        with console.progress("decoding", total) as tick:
            rows += accuracy.accuracy(model, entries, sets, tick, formats, work.under("decode"))
        rows += accuracy.first_layer(model, entries, sets, work.under("layer0"))
    return rows, bench_tables(rows, [*(entry.spec.recipe for entry in entries), *formats], list(sets))


def _ablate(
    model: Model, proteins: list[Protein], sets: dict[str, list[Protein]], work: Work
) -> tuple[list[ResultRow], list[Shown]]:
    from turboesm_cli.evaluation.ablation import SUBSETS, ablate, ablation_table, variants

    if model.is_random:
        raise InputError(
            f"{model.name} has random weights, which accuracy cannot be measured on; name a real model"
        )
    recipes = {variant.recipe for variant in variants(model.shape.head_dim)}
    total = len(proteins) + sum(map(len, sets.values())) * (len(recipes) + 1) * SUBSETS
    with console.progress("calibrating and decoding", total) as tick:
        rows = list(ablate(model, proteins, sets, tick, work))
    title = "Error (1 - mean cosine, all families) with one part changed; range over three calibration subsets"
    return rows, [(title, *ablation_table(rows))]
