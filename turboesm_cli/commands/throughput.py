"""`turboesm bench throughput`: tokens per second and memory of whole models, for each kind of cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboesm_cli import console
from turboesm_cli.cache.formats import FORMATS, KINDS
from turboesm_cli.commands import options
from turboesm_cli.commands.checks import listed, refuse_options
from turboesm_cli.commands.reading import Reading
from turboesm_cli.errors import InputError
from turboesm_cli.outputs.files import check_output

if TYPE_CHECKING:
    from turboesm_cli.codec.fit import CodecSpec
    from turboesm_cli.codec.sizes import CodecSize
    from turboesm_cli.evaluation.throughput import Kind, Load, Throughput
    from turboesm_cli.models.protocol import Model
    from turboesm_cli.models.shapes import Shape

_ALL_BUT_FP32 = ",".join(name for name in KINDS if name != "fp32")
CALIBRATION_PROTEINS = 8
"""Enough for a codec that only time and memory are measured with."""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    batches: str
    contexts: str
    kinds: str
    memory: str | None
    recipes: str
    bundles: list[Path]
    dtype: options.DtypeName
    plan: bool
    model: str | None
    device: str
    json: bool
    output: Path
    peers: bool


def throughput(
    ctx: typer.Context,
    batch: Annotated[str, typer.Option(help="Sequences at once, by comma.")] = "1,8",
    context: Annotated[str, typer.Option(help="Tokens per sequence, by comma.")] = "256,1024",
    kinds: Annotated[
        str, typer.Option(help="Cache formats by comma; packed caches use --recipes or --bundle.")
    ] = _ALL_BUT_FP32,
    recipes: Annotated[
        str, typer.Option(help="Recipes by comma; NAME@BITS or NAME@BITS_K/BITS_V sets a budget.")
    ] = "auto",
    bundle: options.BundleFiles = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Also find the largest batch in this much memory, such as 24GiB.", show_default=False),
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also measure the same model with transformers' own caches.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print memory and largest batches, and exit.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Figures, as CSV.")] = Path("throughput.csv"),
    dtype: options.Dtype = "fp32",
    model: options.ModelName = None,
    device: options.Device = "auto",
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Measure tokens per second, time to the first token and memory of whole models, cache by cache.

    Example: turboesm bench throughput --model random:esm2_t33_650M --dtype bf16 --batch 1,64 --context 1024
    """
    if bundle:
        refuse_options(ctx, ("recipes",), "--bundle takes the place of --recipes; leave one out")
    if plan:
        refuse_options(
            ctx, ("batch", "kinds", "peers"), "--plan says how much each batch takes, for every kind of cache"
        )
        if len(listed(recipes)) > 1 or len(bundle or []) > 1:
            raise typer.BadParameter("--plan is of one codec: name one", param_hint="--recipes, --bundle")
    else:
        check_output(output, force)
    made = Wanted(
        batch, context, kinds, memory, recipes, bundle or [], dtype, plan, model, device, json, output, peers
    )
    _bench(made)


def _bench(wanted: Wanted) -> None:
    """Measure, write the rows, show the tables."""
    contexts, batches, forms = _numbers(wanted.contexts), _numbers(wanted.batches), _forms(wanted.kinds)
    if wanted.plan:
        _plan(wanted, contexts)
        return
    from turboesm_cli.commands.planning import memory_of
    from turboesm_cli.evaluation.crossover import crossovers, rows
    from turboesm_cli.evaluation.throughput import Load
    from turboesm_cli.reporting.results import to_records, write_csv

    loads = [Load(batch, context) for context in contexts for batch in batches]
    free = memory_of(None, wanted.device)
    budget = memory_of(wanted.memory, wanted.device) if wanted.memory else None
    model, specs = _model_and_codecs(wanted)
    _check_contexts(model, loads)
    found, largest = _measure(wanted, model, _kinds(forms, specs), loads, free, budget)
    if wanted.peers:
        found += _measure_peers(model, loads, free)
    made = rows(model, found, largest)
    if made:
        write_csv(wanted.output, made)
        console.files.append(wanted.output)
    if wanted.json:
        console.print_json(to_records(made))
    else:
        _show(model, found, largest)
    for crossing in crossovers(found):
        console.say(crossing.sentence)
    console.say(f"{len(made)} figures in {wanted.output}")


def _plan(wanted: Wanted, contexts: list[int]) -> None:
    """Show what caches would take, from shapes and a recipe alone: neither weights nor proteins are needed."""
    from turboesm_cli.codec.header import read_header
    from turboesm_cli.codec.recipes import parse_recipe
    from turboesm_cli.codec.sizes import planned_size
    from turboesm_cli.commands.planning import check_context, check_named, memory_of, shape_of

    if wanted.bundles:
        header = read_header(wanted.bundles[0])
        check_named(header, wanted.model, wanted.bundles[0])
        shape, size = header.shape, header.size
    else:
        shape = shape_of(wanted.model, wanted.device)
        size = planned_size(shape, parse_recipe(next(iter(listed(wanted.recipes)), "auto")))
    check_context(max(contexts), shape, "--context")
    _show_plans(wanted, shape, size, contexts, memory_of(wanted.memory, wanted.device))


def _measure(
    wanted: Wanted, model: Model, kinds: list[Kind], loads: list[Load], free: int, budget: int | None
) -> tuple[list[Throughput], list[Throughput]]:
    from turboesm_cli.evaluation.throughput import sweep

    contexts = list(dict.fromkeys(load.context for load in loads)) if budget else []
    found, largest = [], []
    with console.progress("measuring", len(kinds) * (len(loads) + len(contexts))) as tick:

        def skipped(what: str) -> None:
            console.warn(f"left out: {what}")
            tick()

        for item in sweep(model, kinds, loads, free, skipped):
            found.append(item)
            tick()
        for context in contexts:
            for kind in kinds:
                best = _largest(wanted, model, kind, context, budget or free)
                if best is None:
                    console.warn(f"{kind.name}: no batch of {context} tokens fits in {wanted.memory}")
                else:
                    largest.append(best)
                tick()
    return found, largest


def _measure_peers(model: Model, loads: list[Load], free: int) -> list[Throughput]:
    from turboesm_cli.evaluation.transformers_peers import PEERS, sweep_peers

    found = []
    with console.progress("measuring transformers", len(PEERS) * len(loads)) as tick:

        def skipped(what: str) -> None:
            console.warn(f"left out: {what}")
            tick()

        for item in sweep_peers(model, loads, free, skipped, console.warn):
            found.append(item)
            tick()
    return found


def _check_contexts(model: Model, loads: list[Load]) -> None:
    longest, most = max(load.context for load in loads), model.shape.context
    if most is not None and longest > most:
        raise InputError(f"--context {longest}: {model.name} takes {most:,} tokens at most")


def _show(model: Model, found: list[Throughput], largest: list[Throughput]) -> None:
    from turboesm_cli.evaluation.crossover import COLUMNS, cells
    from turboesm_cli.evaluation.rows import dtype_name

    title = f"{model.name}, {dtype_name(model.dtype)} weights: decoding with each kind of cache"
    if found:
        console.print_table(title, COLUMNS, [cells(item, found) for item in found])
    if largest:
        lines = [
            [item.kind.name, f"{item.load.context:,}", f"{item.load.batch:,}", f"{item.peak / 2**30:.2f}"]
            for item in largest
        ]
        console.print_table("Largest batch in --memory", ["cache", "context", "batch", "peak GiB"], lines)


def _show_plans(wanted: Wanted, shape: Shape, size: CodecSize, contexts: list[int], memory: int) -> None:
    from turboesm_cli.engine.memory_plan import COLUMNS, LEGEND, RESERVED, plans

    made = [
        plan
        for context in dict.fromkeys(contexts)
        for plan in plans(shape, size, FORMATS[wanted.dtype].itemsize, context, memory)
    ]
    if wanted.json:
        console.print_json([plan.as_dict() for plan in made])
    else:
        lines = [[plan.kind, f"{plan.context:,}", *plan.cells()[1:]] for plan in made]
        title = f"Memory, of {memory / 2**30:.1f} GiB, of which {RESERVED:.0%} are left free"
        console.print_table(title, [COLUMNS[0], "context", *COLUMNS[1:]], lines)
        console.say(LEGEND)


def _largest(wanted: Wanted, model: Model, kind: Kind, context: int, memory: int) -> Throughput | None:
    from turboesm_cli.engine.memory_plan import plans
    from turboesm_cli.evaluation.throughput import largest_batch

    every = plans(model.shape, kind.spec.size, FORMATS[wanted.dtype].itemsize, context, memory)
    planned = next(plan for plan in every if plan.kind == kind.form).batch
    return largest_batch(model, kind, context, memory, planned) if planned else None


def _model_and_codecs(wanted: Wanted) -> tuple[Model, list[CodecSpec]]:
    """The model in its dtype, and the codecs of --bundle or --recipes, calibrated in float32."""
    from turboesm_cli.codec.bundle import read_bundle
    from turboesm_cli.codec.recipes import parse_recipe
    from turboesm_cli.evaluation.accuracy import calibrated
    from turboesm_cli.evaluation.transformers_peers import check_peers
    from turboesm_cli.sequences.datasets import calibration_path

    model = options.open_model(wanted.model, wanted.device)
    if wanted.peers:
        check_peers(model)
    ready = [read_bundle(path) for path in wanted.bundles]
    for path, bundle in zip(wanted.bundles, ready, strict=True):
        bundle.check_model(model, path)
    if not ready:
        named = {name: parse_recipe(name) for name in listed(wanted.recipes)}
        proteins = Reading(limit=CALIBRATION_PROTEINS).proteins(str(calibration_path()))
        ready = [entry.bundle for entry in calibrated(model, proteins, named, console.progress)]
    if not ready:
        raise InputError("no codec to measure; name a recipe with --recipes or a bundle with --bundle")
    return model.to(model.device, FORMATS[wanted.dtype].dtype), [bundle.spec for bundle in ready]


def _kinds(forms: list[str], specs: list[CodecSpec]) -> list[Kind]:
    from turboesm_cli.evaluation.throughput import Kind

    return [Kind.of(form, spec) for form in forms for spec in (specs if form == "packed" else specs[:1])]


def _forms(names: str) -> list[str]:
    forms = list(dict.fromkeys(listed(names)))
    if not forms or not set(forms) <= set(KINDS):
        raise InputError(f"--kinds {names}: name some of {', '.join(KINDS)}")
    return forms


def _numbers(text: str) -> list[int]:
    """Whole numbers from 1 on, by comma. Raises InputError."""
    parts = listed(text)
    if not parts or not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**6 for part in parts):
        raise InputError(f"{text!r}: give whole numbers by comma, such as 1,8,64")
    return [int(part) for part in parts]
