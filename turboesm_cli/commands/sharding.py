"""`--shard`: one part of the input, and what is written down of the output that it is a part of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from turboesm_cli import console
from turboesm_cli.outputs.shard_records import RUN_SHARD, Part, Seal, check_record, sealed
from turboesm_cli.outputs.shards import Shard, parse_shard


def _parsed(text: str) -> Shard:
    try:
        return parse_shard(text, os.environ)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


ShardOption = Annotated[
    Shard | None,
    typer.Option(
        "--shard",
        parser=_parsed,
        metavar="I/N",
        help="Work on part I (from 0) of N of the input, for `turboesm merge`; auto: the Slurm array task's.",
        show_default=False,
    ),
]


def check_shard(shard: Shard | None, output: Path | None) -> None:
    """Refuse a shard whose output has no name of its own, or whose record would replace a file of the user's."""
    if shard is None:
        return
    if output is None:
        raise typer.BadParameter("each shard has an output of its own: name one with -o", param_hint="--shard")
    check_record(output)


def of_shard(run: Mapping[str, str], shard: Shard | None) -> dict[str, str]:
    """What the output of a shard follows from; without one, that of the whole."""
    return dict(run) if shard is None else {**run, RUN_SHARD: str(shard)}


def seal_of(
    path: Path,
    run: Mapping[str, str],
    shard: Shard | None,
    kind: str,
    own: tuple[int, int, int],
    devices: str = "",
    extra: Callable[[], Mapping[str, Any]] = dict,
) -> Seal | None:
    """Writes the record of a shard's output, None where it is no shard's.

    run      of the whole
    own      first item, items, and items of the whole
    devices  that it was made on, where they are more than one
    """
    if shard is None:
        return None
    made = {**run, "device": devices} if devices else run
    return sealed(Part(made, shard, *own, kind, path), extra)


def say_shard(shard: Shard | None) -> None:
    """Tell which part the output is, and what to do with it."""
    if shard is not None:
        console.say(f"shard {shard} of the input; when all are done, `turboesm merge OUT SHARD...` joins them")
