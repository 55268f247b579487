"""`turboesm calibrate`: proteins → statistics → codec → bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboesm_cli import console
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.commands import completion, options
from turboesm_cli.commands.gpus import Gpus
from turboesm_cli.commands.predicting import Bounds, learned
from turboesm_cli.commands.reading import Reading
from turboesm_cli.commands.sharding import ShardOption, of_shard, say_shard, seal_of
from turboesm_cli.sequences.fasta import LongPolicy, digest

if TYPE_CHECKING:
    from turboesm_cli.codec.recipes import Recipe
    from turboesm_cli.models.protocol import Model
    from turboesm_cli.outputs.shards import Shard
    from turboesm_cli.outputs.work import SavedWork
    from turboesm_cli.sequences.fasta import Protein


def calibrate(
    model: Annotated[
        str,
        typer.Argument(
            help="Official ESM-2 (esm2_t33_650M), fair-esm .pt file, Hugging Face folder, OWNER/MODEL, iglm, "
            "iglm-s, embedded, or random:NAME (random weights, for time and memory).",
            show_default=False,
            autocompletion=completion.model,
        ),
    ],
    fasta: Annotated[
        str,
        typer.Argument(
            help="Calibration proteins, in any format of `guides/inputs.md`; - for stdin.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Bundle to write. Default: MODEL-RECIPE.tqz.", show_default=False),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help=f"How to code: {', '.join(RECIPES)}; NAME@BITS sets the budget.",
            autocompletion=completion.recipes,
        ),
    ] = "auto",
    bits: Annotated[
        float | None, typer.Option(help="Bits per value, of keys and values.", show_default=False)
    ] = None,
    bits_k: options.BitsK = None,
    bits_v: options.BitsV = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Take the smallest budget predicted to hold this error (1 - mean cosine of final hidden states).",
            show_default=False,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0, help="The same for the KL of the next residue or token, nat.", show_default=False),
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            envvar="TURBOESM_FRONTIER",
            help="Try budgets from 2 to 4 on the proteins held back, and say what each costs.",
        ),
    ] = True,
    max_proteins: options.MaxProteins = None,
    shard: ShardOption = None,
    gpus: Gpus = None,
    strict: options.Strict = False,
    long: options.Long = LongPolicy.ERROR,
    rejects: options.Rejects = None,
    tags: options.Tags = "",
    device: options.Device = "auto",
    json: options.Json = False,
    force: options.Force = False,
    if_done: options.IfDone = "refuse",
    resume_anywhere: options.ResumeAnywhere = False,
) -> None:
    """Learn a codec for a model's keys and values from real proteins; write it as a .tqz bundle.

    Keys after RoPE, queries and values are captured in the model's own forward pass and summed up as they come:
    memory depends on the model, not on the number of proteins. Take proteins like those that you will decode or
    generate. Prints the bundle's path.

    One protein in 16 is held back, and decoded at the end with each budget of bits: the mean error of these
    proteins and its standard error are what is predicted for others like them.

    Example: turboesm calibrate esm2_t33_650M proteins.fasta -o 650M.tqz

    Example: turboesm calibrate esm2_t33_650M proteins.fasta --max-error 0.001 -o 650M.tqz

    With --shard the output holds statistics, and `turboesm merge` makes the bundle of all shards' statistics.

    Example: turboesm calibrate iglm antibodies.fasta --tags species=HUMAN -o iglm.tqz
    """
    from turboesm_cli.codec.bundle import write_bundle
    from turboesm_cli.codec.calibration import check, few
    from turboesm_cli.codec.recipes import parse_recipe, with_bits
    from turboesm_cli.statistics.batching import told

    bounds = Bounds(max_error, max_kl)
    if bounds.given and (bits or bits_k or bits_v or "@" in recipe or not frontier):
        raise typer.BadParameter(
            "choose the budget of bits: leave out --bits, --bits-k, --bits-v, @BITS and --no-frontier",
            param_hint=["--max-error", "--max-kl"],
        )
    if bounds.given and shard is not None:
        raise typer.BadParameter(
            "a budget is chosen from all proteins: not with --shard", param_hint=["--max-error"]
        )
    chosen = with_bits(with_bits(parse_recipe(recipe), bits, bits), bits_k, bits_v)
    if output is not None:
        options.Kept(output, force, if_done, resume_anywhere)
    reading = Reading(strict, long, max_proteins, rejects, tags=tags)
    proteins = reading.proteins(fasta)
    loaded = options.open_model(model, device)
    proteins = reading.known(fasta, proteins, loaded.alphabet)
    check(loaded, proteins, chosen)
    if warning := few(loaded, proteins):
        console.warn(warning)
    path = output or Path(f"{loaded.name}-{chosen.name}.tqz")
    kept = options.Kept(path, force, if_done, resume_anywhere)
    tagged = told(proteins, loaded.alphabet)
    own = {"recipe": chosen.as_dict()} | ({"told": tagged[:16]} if tagged else {}) | bounds.named
    run = options.run_of("calibrate", loaded, digest(proteins), **own)
    if not kept.is_done(of_shard(run, shard)):
        with kept.work(of_shard(run, shard)) as work:
            if shard is not None:
                _gather(path, (model, loaded), proteins, chosen, run, shard, work)
            else:
                found = learned(loaded, proteins, chosen, frontier, bounds, work)
                write_bundle(path, found.bundle, work.devices)
        if shard is None:
            console.say(f"{console.counted(len(proteins), 'protein')}, {found.bundle.calibration.tokens:,} tokens")
            found.say()
            if json:
                console.print_json({"bundle": str(path)} | found.as_dict())
                return
        say_shard(shard)
    console.print_line(str(path))


def _gather(
    path: Path,
    model: tuple[str, Model],
    proteins: list[Protein],
    recipe: Recipe,
    run: dict[str, str],
    shard: Shard,
    work: SavedWork,
) -> None:
    """Write a shard's statistics; `model` as it was named, and loaded."""
    from turboesm_cli.codec.bundle import check_storable
    from turboesm_cli.codec.calibration import adapted, described
    from turboesm_cli.codec.statistics_file import write_statistics
    from turboesm_cli.statistics.collect import batches_of, gather

    given, loaded = model
    check_storable(loaded.name, len(proteins), recipe)
    todo = batches_of(loaded, proteins)
    own, few = todo.numbers(shard), sum(map(len, (batch for kind in todo.of_shard(shard) for batch in kind)))
    gathered = gather(loaded, proteins, phase=console.progress, work=work, shard=shard)
    seal = seal_of(path, run, shard, "statistics", (own.start, len(own), todo.total), work.devices)
    calibration, fitting = described(loaded, proteins), adapted(loaded, proteins, recipe)
    write_statistics(path, loaded, given, calibration, fitting, gathered, seal)
    console.say(f"statistics of {few} of {len(proteins)} proteins in {path}")
