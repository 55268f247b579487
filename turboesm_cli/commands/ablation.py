"""`turboesm bench ablation`: what each part of the recipes is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from turboesm_cli import console
from turboesm_cli.commands import options
from turboesm_cli.commands.reading import Reading, digest_of, families_of
from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import MAX_RESIDUES
from turboesm_cli.sequences.records import RECORD_CAP


def ablation(
    families: options.Families = options.EVERY_FAMILY,
    output: Annotated[Path, typer.Option("--output", "-o", help="Figures, as CSV.")] = Path("ablation.csv"),
    calibration: options.Calibration = None,
    max_calibration: options.MaxCalibration = None,
    max_proteins: options.MaxEvaluated = None,
    max_residues: options.MaxResidues = 500,
    rejects: options.Rejects = None,
    model: options.ModelName = None,
    device: options.Device = "auto",
    json: options.Json = False,
    force: options.Force = False,
    if_done: options.IfDone = "refuse",
    resume_anywhere: options.ResumeAnywhere = False,
) -> None:
    """Change one part of a recipe at a time, at equal bytes, and measure the error over three calibration sets.

    Example: turboesm bench ablation --families tm,idr --max-proteins 4 -o ablation.csv
    """
    from turboesm_cli.evaluation.ablation import ablate, ablation_table
    from turboesm_cli.reporting.results import to_records, write_csv
    from turboesm_cli.sequences.datasets import calibration_path

    kept = options.Kept(output, force, if_done, resume_anywhere)
    reading = Reading(rejects=rejects, max_residues=RECORD_CAP)
    sets = families_of(reading, families, max_proteins, max_residues)
    loaded = options.open_model(model, device)
    if loaded.is_random:
        raise InputError(
            f"{loaded.name} has random weights, which accuracy cannot be measured on; name a real model"
        )
    few = replace(reading, limit=max_calibration, max_residues=MAX_RESIDUES)
    learned = few.proteins(str(calibration or calibration_path()))
    run = options.run_of("bench", loaded, digest_of([learned, *sets.values()]), measured="ablation")
    if kept.is_done(run):
        return
    with kept.work(run) as work:
        rows = list(ablate(loaded, learned, sets, console.progress, work))
        write_csv(output, rows)
    if json:
        console.print_json(to_records(rows))
    else:
        title = "Error (1 - mean cosine, all families) with one part changed; range over three calibration subsets"
        console.print_table(title, *ablation_table(rows))
    console.say(f"{len(rows)} figures in {output}; `turboesm report {output}` shows them")
