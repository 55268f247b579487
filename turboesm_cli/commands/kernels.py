"""`turboesm bench kernels`: attention over synthetic packed caches, beside that over unpacked ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboesm_cli import console
from turboesm_cli.commands import options
from turboesm_cli.outputs.files import check_output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turboesm_cli.reporting.results import ResultRow


def kernels(
    output: Annotated[Path, typer.Option("--output", "-o", help="Figures, as CSV.")] = Path("kernels.csv"),
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Time this CPU, with 1 and 2 threads, and not a CUDA device.")
    ] = False,
    force: options.Force = False,
) -> None:
    """Time attention over packed caches, with synthetic codecs and random data.

    Example: turboesm bench kernels -o kernels.csv
    """
    check_output(output, force)
    from turboesm_cli import __version__
    from turboesm_cli.reporting.results import commit_of_source, write_csv

    rows = []
    for row in _measured(cpu, __version__, commit_of_source()):
        rows.append(row)
        console.say(f"{row.model} {row.tokens} {row.recipe} {row.metric} {row.value:.4g} {row.unit}")
    write_csv(output, rows)
    console.files.append(output)
    cells = [[row.model, str(row.tokens), row.recipe, row.metric, f"{row.value:.4g} {row.unit}"] for row in rows]
    console.print_table("Kernels", ["shape", "tokens", "what", "figure", "value"], cells)
    if cpu:
        from turboesm_cli.evaluation import cpu_speed

        title = "Attention's time, and in brackets the fp32 time over it: above 1, packed is faster"
        console.print_table(title, *cpu_speed.table(rows))
    else:
        from turboesm_cli.evaluation import kernel_speed

        title = "Fastest fp16 attention's time over ours, 3 bits: above 1, packed is faster"
        console.print_table(title, *kernel_speed.map_cells(rows))


def _measured(cpu: bool, version: str, commit: str) -> Iterator[ResultRow]:
    import torch

    from turboesm_cli.errors import DeviceError

    if cpu:
        from turboesm_kernels import cpu_compiled

        from turboesm_cli.evaluation import cpu_speed

        if reason := cpu_compiled.problem():
            console.say(f"backend compiled cannot run: {reason}")
        return cpu_speed.bench(version=version, commit=commit)
    if not torch.cuda.is_available():
        raise DeviceError(
            "bench kernels times CUDA kernels, and there is no CUDA device here; --cpu times this CPU"
        )
    from turboesm_cli.evaluation import kernel_speed

    return kernel_speed.bench(version=version, commit=commit)
