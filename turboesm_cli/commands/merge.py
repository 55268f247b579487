"""`turboesm merge`: the outputs of all shards → the output of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboesm_cli import console
from turboesm_cli.commands import options
from turboesm_cli.errors import InputError

if TYPE_CHECKING:
    from turboesm_cli.outputs.shard_records import Part

Outputs = Annotated[
    list[Path], typer.Argument(help="Outputs of all shards of one run, in any order.", show_default=False)
]
AnyDevice = Annotated[
    bool, typer.Option("--any-device", help="Merge what was made on different devices; results name them.")
]


def merge(
    output: Annotated[Path, typer.Argument(help="File to write.", show_default=False)],
    shards: Outputs,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Of calibration statistics, if it is not where `calibrate` found it.",
            show_default=False,
        ),
    ] = None,
    any_device: AnyDevice = False,
    force: options.Force = False,
    if_done: options.IfDone = "refuse",
) -> None:
    """Join the outputs of runs with --shard: figures, FASTA, tables, files of caches, calibration statistics.

    The merged file has the bytes of the run that was never split. OUTPUT.shard, which each run with --shard writes
    beside its output, says what that is a part of; shards that are missing or there twice, or of other inputs,
    bundles, models, settings or versions, are refused. Files are streamed. Statistics make a bundle, whose tensors
    are those of one run to within rounding.

    Example: turboesm merge decode.csv part-0.csv part-1.csv part-2.csv part-3.csv

    Example: turboesm merge 650M.tqz part-0.tqs part-1.tqs
    """
    from turboesm_cli.outputs.shard_records import read_part
    from turboesm_cli.outputs.work import DEVICE

    kept = options.Kept(output, force, if_done, False)
    parts = _checked([read_part(path) for path in shards], any_device)
    if model is not None and parts[0].kind != "statistics":
        raise typer.BadParameter("is for calibration statistics; leave it out", param_hint="--model")
    devices = list(dict.fromkeys(part.run[DEVICE] for part in parts))
    run = {**parts[0].run, DEVICE: _all_of(devices)}
    if kept.is_done(run):
        return
    with kept.work(run):
        _write(output, parts, _all_of(devices), model)
    console.say(f"{output} joins {len(parts)} shards")


def _checked(parts: Sequence[Part], any_device: bool) -> list[Part]:
    """The parts in order. Raises InputError where they make up no whole, or are of another version than this."""
    from turboesm_cli import __version__
    from turboesm_cli.outputs.identity import code_digest
    from turboesm_cli.outputs.shard_records import joined
    from turboesm_cli.outputs.work import DEVICE

    ordered = joined(parts, frozenset({DEVICE} if any_device else ()))
    own = f"turboesm {__version__} ({code_digest()[:8]})"
    if ordered[0].run["version"].split(",")[0] != own:
        made = ordered[0].run["version"].split(",")[0]
        raise InputError(f"{ordered[0].path} was made by {made}, and this is {own}; merge with that version")
    return ordered


def _all_of(devices: Sequence[str]) -> str:
    """Devices, as work that went on from one to another names them."""
    from turboesm_cli.outputs.work import THEN

    return THEN.join(dict.fromkeys(name for each in devices for name in each.split(THEN)))


def _write(output: Path, parts: Sequence[Part], device: str, model: str | None) -> None:
    """Write the whole. Raises InputError where a part is not what its shard wrote."""
    from turboesm_cli.outputs.joining import first_line, join_text
    from turboesm_cli.outputs.work import THEN

    kind = parts[0].kind
    if kind == "csv":
        _write_csv(output, parts, device)
    elif kind == "fasta":
        join_text(output, parts)
    elif kind == "tsv":
        join_text(output, parts, head=first_line(parts[0]))
    elif kind == "tqkv":
        from turboesm_cli.cache.merging import merge_packfiles

        merge_packfiles(output, parts, device if THEN in device else "")
    elif kind == "bench":
        from turboesm_cli.evaluation.bench_shards import merged_bench
        from turboesm_cli.reporting.results import write_csv

        write_csv(output, merged_bench(parts, device))
    elif kind == "statistics":
        _write_bundle(output, parts, device if THEN in device else "", model)
    else:
        raise InputError(
            f"{parts[0].path} is of kind {kind!r}, which this version does not merge; upgrade turboesm"
        )


def _write_csv(output: Path, parts: Sequence[Part], device: str) -> None:
    from turboesm_cli.evaluation.merged_rows import merged_rows
    from turboesm_cli.outputs.joining import join_text
    from turboesm_cli.outputs.shard_records import damaged, extra_of
    from turboesm_cli.reporting.results import HEAD, csv_bytes

    try:
        rows = merged_rows(map(extra_of, parts), device)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise damaged(parts[0].path, error) from error
    join_text(output, parts, HEAD.encode(), csv_bytes(rows))


def _write_bundle(output: Path, parts: Sequence[Part], devices: str, name: str | None) -> None:
    from turboesm_cli.codec.bundle import write_bundle
    from turboesm_cli.codec.statistics_file import merged_bundle, model_given

    model = options.open_model(name or model_given(parts[0].path), "cpu")
    bundle = merged_bundle(parts, model)
    write_bundle(output, bundle, devices)
    made_of = bundle.calibration
    console.say(f"{made_of.proteins} proteins, {made_of.tokens:,} tokens, recipe {bundle.spec.recipe.name}")
