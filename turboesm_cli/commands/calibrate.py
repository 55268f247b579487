"""`turboesm calibrate`: proteins → statistics → codec → bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turboesm_cli import console
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.commands import options
from turboesm_cli.commands.reading import Reading
from turboesm_cli.sequences.fasta import LongPolicy, digest


def calibrate(
    model: Annotated[
        str,
        typer.Argument(
            help="Official ESM-2 (esm2_t33_650M), fair-esm .pt file, Hugging Face folder, OWNER/MODEL, iglm, "
            "iglm-s or embedded.",
            show_default=False,
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
        str, typer.Option(help=f"How to code: {', '.join(RECIPES)}; NAME@BITS sets the budget.")
    ] = "auto",
    bits: Annotated[
        float | None, typer.Option(help="Bits per value, of keys and values.", show_default=False)
    ] = None,
    bits_k: options.BitsK = None,
    bits_v: options.BitsV = None,
    max_proteins: options.MaxProteins = None,
    strict: options.Strict = False,
    long: options.Long = LongPolicy.ERROR,
    rejects: options.Rejects = None,
    tags: options.Tags = "",
    device: options.Device = "auto",
    force: options.Force = False,
    if_done: options.IfDone = "refuse",
    resume_anywhere: options.ResumeAnywhere = False,
) -> None:
    """Learn a codec for a model's keys and values from real proteins; write it as a .tqz bundle.

    Keys after RoPE, queries and values are captured in the model's own forward pass and summed up as they come:
    memory depends on the model, not on the number of proteins. Take proteins like those that you will decode or
    generate. Prints the bundle's path.

    Example: turboesm calibrate esm2_t33_650M proteins.fasta -o 650M.tqz

    Example: turboesm calibrate iglm antibodies.fasta --tags species=HUMAN -o iglm.tqz
    """
    from turboesm_cli.codec.bundle import write_bundle
    from turboesm_cli.codec.calibration import calibrate as learn
    from turboesm_cli.codec.recipes import parse_recipe, with_bits
    from turboesm_cli.statistics.batching import told

    chosen = with_bits(with_bits(parse_recipe(recipe), bits, bits), bits_k, bits_v)
    if output is not None:
        options.Kept(output, force, if_done, resume_anywhere)
    reading = Reading(strict, long, max_proteins, rejects, tags=tags)
    proteins = reading.proteins(fasta)
    loaded = options.open_model(model, device)
    proteins = reading.known(fasta, proteins, loaded.alphabet)
    path = output or Path(f"{loaded.name}-{chosen.name}.tqz")
    kept = options.Kept(path, force, if_done, resume_anywhere)
    tagged = told(proteins, loaded.alphabet)
    own = {"recipe": chosen.as_dict()} | ({"told": tagged[:16]} if tagged else {})
    run = options.run_of("calibrate", loaded, digest(proteins), **own)
    if not kept.is_done(run):
        with kept.work(run) as work:
            with console.progress("calibrating", len(proteins)) as tick:
                bundle = learn(loaded, proteins, chosen, tick, work)
            write_bundle(path, bundle, work.devices)
        console.say(f"{len(proteins)} proteins, {bundle.calibration.tokens:,} tokens, recipe {chosen.name}")
    console.print_line(str(path))
