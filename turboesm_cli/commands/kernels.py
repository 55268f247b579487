"""`turboesm bench kernels`: GPU kernels on synthetic caches, beside the fastest attention over fp16 ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turboesm_cli import console
from turboesm_cli.commands import options
from turboesm_cli.outputs.files import check_output


def kernels(
    output: Annotated[Path, typer.Option("--output", "-o", help="Figures, as CSV.")] = Path("kernels.csv"),
    force: options.Force = False,
) -> None:
    """Time attention over packed caches on a CUDA device, with synthetic codecs and random data.

    Example: turboesm bench kernels -o kernels.csv
    """
    check_output(output, force)
    import torch

    from turboesm_cli import __version__
    from turboesm_cli.errors import DeviceError
    from turboesm_cli.reporting.results import commit_of_source, write_csv

    if not torch.cuda.is_available():
        raise DeviceError("bench kernels times CUDA kernels, and there is no CUDA device here")
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
