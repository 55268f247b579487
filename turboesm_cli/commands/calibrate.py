"""`turboesm calibrate`: proteins → statistics → codec → bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turboesm_cli import console
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.commands import completion, options
from turboesm_cli.commands.predicting import Bounds, learned
from turboesm_cli.commands.reading import Reading
from turboesm_cli.sequences.fasta import LongPolicy, digest


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
    if kept.is_done(run):
        console.print_line(str(path))
        return
    with kept.work(run) as work:
        found = learned(loaded, proteins, chosen, frontier, bounds, work)
        write_bundle(path, found.bundle, work.devices)
    console.say(f"{console.counted(len(proteins), 'protein')}, {found.bundle.calibration.tokens:,} tokens")
    found.say()
    if json:
        console.print_json({"bundle": str(path)} | found.as_dict())
    else:
        console.print_line(str(path))
