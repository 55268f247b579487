"""`turboesm bench`: recipes side by side on evaluation proteins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turboesm_cli import console
from turboesm_cli.cache.formats import PEERS
from turboesm_cli.commands import completion, options
from turboesm_cli.commands.ablation import ablation
from turboesm_cli.commands.checks import Command, Group, check_room, is_given, listed, refuse_options
from turboesm_cli.commands.kernels import kernels
from turboesm_cli.commands.reading import Reading, digest_of, families_of
from turboesm_cli.commands.sharding import ShardOption, check_shard, of_shard, say_shard, seal_of
from turboesm_cli.commands.throughput import throughput
from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import MAX_RESIDUES
from turboesm_cli.sequences.records import RECORD_CAP

if TYPE_CHECKING:
    from turboesm_cli.codec.bundle import Bundle
    from turboesm_cli.codec.recipes import Recipe
    from turboesm_cli.evaluation.accuracy import Entry
    from turboesm_cli.models.protocol import Model
    from turboesm_cli.outputs.shards import Shard
    from turboesm_cli.outputs.work import SavedWork, Work
    from turboesm_cli.reporting.results import ResultRow
    from turboesm_cli.sequences.fasta import Protein


Shown = tuple[str, list[str], list[list[str]]]
"""A table's title, columns and rows."""


class _Bench(Group):
    """`bench` with its subcommands, by their old names as well: flags, as they were in version 0.1.0."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for flag, name in OLD_FLAGS.items():
            if flag in args:
                console.warn(f"`bench {flag}` is now `bench {name}`; the flag goes with the next release")
                rest = [argument for argument in args if argument != flag]
                named = any(argument.startswith(("-o", "--output")) for argument in rest)
                args = [name, *rest, *([] if named else ["-o", "bench.csv"])]
                break
        return super().parse_args(ctx, args)


OLD_FLAGS = {"--throughput": "throughput", "--kernels": "kernels", "--ablate": "ablation"}

bench = typer.Typer(cls=_Bench, invoke_without_command=True)
for command in (kernels, throughput, ablation):
    bench.command(cls=Command)(command)


@bench.callback()
def accuracy(
    ctx: typer.Context,
    families: options.Families = options.EVERY_FAMILY,
    recipes: Annotated[
        str,
        typer.Option(
            help="Recipes by comma; NAME@BITS or NAME@BITS_K/BITS_V sets a budget. With --bits: auto.",
            autocompletion=completion.recipes,
        ),
    ] = "paper,flat,auto@2,auto",
    bits: Annotated[
        str,
        typer.Option(help="Measure each recipe at these budgets, by comma: 2,2.5,3,3.5,4.", show_default=False),
    ] = "",
    max_error: Annotated[
        float | None,
        typer.Option(min=0, help="Say which recipe is the smallest to hold this error.", show_default=False),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help=f"What others do, by comma, or all: {', '.join(PEERS)}; for accuracy and memory. Names the "
            "smallest recipe that does as well as each.",
            show_default=False,
            autocompletion=completion.peers,
        ),
    ] = "",
    bundle: options.BundleFiles = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Figures, as CSV.")] = Path("bench.csv"),
    calibration: options.Calibration = None,
    max_calibration: options.MaxCalibration = None,
    max_proteins: options.MaxEvaluated = None,
    max_residues: options.MaxResidues = 500,
    shard: ShardOption = None,
    allow_seen: Annotated[bool, typer.Option(help="Only warn of proteins seen in calibration.")] = False,
    rejects: options.Rejects = None,
    tags: options.Tags = "",
    model: options.ModelName = None,
    device: options.Device = "auto",
    json: options.Json = False,
    force: options.Force = False,
    if_done: options.IfDone = "refuse",
    resume_anywhere: options.ResumeAnywhere = False,
) -> None:
    """Measure what recipes cost in accuracy and save in memory, on proteins that took no part in calibration.

    Every token is decoded from the cache, all layers quantized, against the same decode with an fp32 cache.
    Each recipe is calibrated on the same proteins; its bundle is kept for the next run. The subcommands measure
    other things, with options of their own.

    Example: turboesm bench --families tm,idr,peptide --recipes paper,auto -o results.csv

    Example: turboesm bench --bits 2,2.5,3,3.5,4 --peers fp16,int8,fp8 -o sweep.csv

    With --shard the output holds results of some of the proteins, and `turboesm merge` makes the figures of all.

    Example: turboesm bench --model ./progen2-small --recipes auto,turboquant --peers int4,quanto4 -o peers.csv
    """
    if ctx.invoked_subcommand is not None:
        what = f"it applies to `bench` alone; see `bench {ctx.invoked_subcommand} --help` for what that takes"
        refuse_options(ctx, list(ctx.params), what)
        return
    named, formats = _split_recipes(recipes, peers)
    if bundle and named:
        why = "--bundle takes the place of recipes: name others with --peers"
        refuse_options(ctx, ("recipes", "bits"), why)
    if bits:
        named = _at_budgets("auto" if not is_given(ctx, "recipes") else named, bits)
    check_shard(shard, output if is_given(ctx, "output") else None)
    check_room()
    from turboesm_cli.evaluation.recommendation import recommended
    from turboesm_cli.reporting.results import to_records, write_csv

    kept = options.Kept(output, force, if_done, resume_anywhere)
    reading = Reading(rejects=rejects, max_residues=RECORD_CAP, tags=tags)
    sets = families_of(reading, families, max_proteins, max_residues)
    loaded = options.open_model(model, device, _first_of(bundle) if model is None else None)
    sets = {family: reading.known(family, proteins, loaded.alphabet) for family, proteins in sets.items()}
    few = replace(reading, limit=max_calibration, max_residues=MAX_RESIDUES, alphabet=loaded.alphabet)
    learned = _calibration(few, calibration)
    described = {
        "families": ", ".join(f"{len(few)} of {family}" for family, few in sets.items()),
        "measured": ", ".join([*_sources(named, bundle), *formats]),
    }
    inputs = digest_of([learned, *sets.values()])
    run = options.run_of("bench", loaded, inputs, **described)
    if kept.is_done(of_shard(run, shard)):
        return
    with kept.work(of_shard(run, shard)) as work:
        entries = _entries(loaded, named, bundle, learned, work)
        _check_seen(entries, sets, allow_seen)
        if shard is not None:
            _measure_part(output, loaded, entries, sets, formats, work, run, shard)
            return
        rows, tables = _measure(loaded, entries, sets, formats, work)
        write_csv(output, rows)
    recipes_measured = [entry.spec.recipe for entry in entries]
    if json:
        console.print_json(to_records(rows))
    else:
        for title, columns, cells in tables:
            console.print_table(title, columns, cells)
    overall = "all" if len(sets) > 1 else next(iter(sets))
    for sentence in recommended(rows, recipes_measured, formats, overall, max_error):
        console.say(sentence)
    console.say(f"{len(rows)} figures in {output}; `turboesm report {output}` shows them")


def _first_of(bundles: list[Path] | None) -> Bundle | None:
    """The bundle whose model is measured where none is named."""
    from turboesm_cli.codec.bundle import read_bundle

    return read_bundle(bundles[0]) if bundles else None


def _sources(recipes: str, bundles: list[Path] | None) -> list[str]:
    """What the codecs come from: recipes, or bundles by their start of sha256."""
    from turboesm_cli.outputs.files import file_sha256

    return [f"{path} {file_sha256(path)[:16]}" for path in bundles] if bundles else [recipes]


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
    entries = calibrated(model, proteins, chosen, console.progress, work.under("calibration"))
    _refuse_twins(entries)
    return entries


def _refuse_twins(entries: list[Entry]) -> None:
    """Results tell codecs apart by recipe and bits."""
    recipes = [entry.spec.recipe for entry in entries]
    names = [recipe.typed for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"recipe {name} is there twice; measure one at a time")


def _split_recipes(names: str, peers: str) -> tuple[str, list[str]]:
    """Recipes, and peers: those named as such, and among the recipes."""
    parts = list(dict.fromkeys(listed(names)))
    others = list(PEERS) if peers == "all" else listed(peers)
    unknown = [name for name in others if name not in PEERS]
    if unknown:
        raise InputError(f"--peers {unknown[0]}: name some of {', '.join(PEERS)}, or all")
    found = dict.fromkeys([*(name for name in parts if name in PEERS), *others])
    return ",".join(name for name in parts if name not in PEERS), list(found)


def _at_budgets(names: str, bits: str) -> str:
    """Each recipe at each budget, by comma. Raises InputError for a recipe that has one already."""
    recipes, budgets = (listed(text) for text in (names, bits))
    fixed = [name for name in recipes if "@" in name]
    if fixed:
        raise InputError(
            f"--bits {bits}: {fixed[0]} has its own budget; name the recipe alone, or leave --bits out"
        )
    return ",".join(f"{name}@{budget}" for name in recipes for budget in budgets)


def _recipes(names: str) -> dict[str, Recipe]:
    from turboesm_cli.codec.recipes import parse_recipe

    chosen = {name: parse_recipe(name) for name in listed(names)}
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
        console.warn(f"NOT AN HONEST EVALUATION: {str(error).split(';')[0]}")


def _measure_part(
    output: Path,
    model: Model,
    entries: list[Entry],
    sets: dict[str, list[Protein]],
    formats: list[str],
    work: SavedWork,
    run: dict[str, str],
    shard: Shard,
) -> None:
    """Write the results of a shard's batches; what is of no protein is measured by the first one."""
    from turboesm_cli.evaluation import accuracy
    from turboesm_cli.evaluation.accuracy_rows import Measured
    from turboesm_cli.evaluation.bench_shards import own_batches, own_proteins, write_part
    from turboesm_cli.evaluation.teacher_forced import decoding_cost, first_layer_cost

    own, place = own_batches(model, sets, shard)
    results = len(entries) + len(formats) + (0 if model.causal else 1)
    rows = [] if shard.index else _of_no_protein(model, entries, formats, work)
    measured = None
    if not model.is_random:
        codecs = len(entries) + len(formats)
        cost = sum(decoding_cost(model, sets[family], codecs, own=few) for family, few in own.items())
        with console.progress("decoding", results * own_proteins(model, sets, own), cost) as tick:
            decoded = accuracy.decoded(model, entries, sets, tick, formats, work.under("decode"), own)
        cost = len(entries) * sum(first_layer_cost(model, sets[family], few) for family, few in own.items())
        with console.progress("first layer", len(entries) * len(sets), cost) as tick:
            first = accuracy.first_layers(model, entries, sets, tick, work.under("layer0"), own)
        measured = Measured(decoded, first)
    about = accuracy.circumstances(model, entries, sets, formats, work.devices)
    write_part(output, about, measured, rows, seal_of(output, run, shard, "bench", place, work.devices))
    console.say(f"results of {place[1]} of {place[2]} batches of proteins in {output}")
    say_shard(shard)


def _measure(
    model: Model, entries: list[Entry], sets: dict[str, list[Protein]], formats: list[str], work: Work
) -> tuple[list[ResultRow], list[Shown]]:
    from turboesm_cli.evaluation import accuracy
    from turboesm_cli.evaluation.bench_tables import bench_tables

    rows = _of_no_protein(model, entries, formats, work)
    if model.is_random:
        console.warn(f"{model.name} has random weights: time and memory are measured, accuracy is not")
    else:
        rows += accuracy.accuracy(model, entries, sets, console.progress, formats, work.under("decode"))
        rows += accuracy.first_layer(model, entries, sets, console.progress, work.under("layer0"))
    return rows, bench_tables(rows, [*(entry.spec.recipe for entry in entries), *formats], list(sets))


def _of_no_protein(model: Model, entries: list[Entry], formats: list[str], work: Work) -> list[ResultRow]:
    """Rows of memory and time."""
    from turboesm_cli.evaluation import accuracy

    rows = list(accuracy.memory(model, entries, formats))
    return rows + list(accuracy.times(model, entries, phase=console.progress, work=work.under("time")))
