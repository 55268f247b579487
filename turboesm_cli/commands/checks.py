"""What holds for every command, whatever it does."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer
import typer.core

from turboesm_cli import whereabouts
from turboesm_cli.commands.gpus import is_spread, spread
from turboesm_cli.errors import DeviceError, OutputError

LEAST_ADDRESS_SPACE = 700 << 20
"""Bytes. With less, libraries that torch loads end the process, each in its own words."""


class Command(typer.core.TyperCommand):
    """A command whose options are checked as one, and that has the room to run at all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        check_values(ctx, self.params)
        whereabouts.note_command(words_of(ctx, self.params))
        return rest

    def invoke(self, ctx: Any) -> Any:
        check_room()
        check_inputs_stay(ctx, self.params)
        if is_spread(ctx):
            return spread(ctx)
        return super().invoke(ctx)


class Group(typer.core.TyperGroup):
    """Commands, with options of their own that are checked likewise."""

    def invoke(self, ctx: Any) -> Any:
        check_inputs_stay(ctx, self.params)
        return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        rest = super().parse_args(ctx, args)
        check_log(ctx, words)
        check_values(ctx, self.params)
        whereabouts.note_command(words_of(ctx, self.params))
        return rest


_OUTPUTS = ("output", "rejects")


def check_inputs_stay(ctx: Any, parameters: Sequence[Any]) -> None:
    """Raise OutputError where an output is one of the files that the command reads, with --force, too."""
    given = {parameter.name: ctx.params.get(parameter.name) for parameter in parameters}
    outputs = [Path(given[name]) for name in _OUTPUTS if given.get(name) is not None]
    inputs = [value for name, value in given.items() if name not in _OUTPUTS and value is not None]
    texts = [str(each) for value in inputs for each in (value if isinstance(value, list | tuple) else [value])]
    for output in outputs:
        if any(map(partial(_is_file, output), texts)):
            raise OutputError(f"{output} is read by this command; choose another output path")


def check_log(ctx: Any, words: Sequence[str]) -> None:
    """Raise BadParameter where --log is another of the command's words, too: lines would be added to an input."""
    log = ctx.params.get("log")
    if log is None:
        return
    times = sum(_is_file(log, word.partition("=")[2] or word) for word in words)
    if times > is_given(ctx, "log"):  # else the environment names it
        raise typer.BadParameter(f"{log} is read by this command; name another file", param_hint="--log")


def _is_file(path: Path, text: str) -> bool:
    """Whether text, or a part of it by comma, names the file at `path`."""
    for part in {text, *text.split(",")}:
        with contextlib.suppress(OSError, ValueError):
            if path.is_file() and path.samefile(part):
                return True
    return False


def listed(text: str) -> list[str]:
    """What a list by comma names, blanks around it left out."""
    return [part.strip() for part in text.split(",") if part.strip()]


def words_of(ctx: Any, parameters: Sequence[Any]) -> str:
    """The command with what the user gave that figures follow from; files without their folders."""
    names, at = list[str](), ctx
    while at.parent is not None:
        names.insert(0, str(at.info_name))
        at = at.parent
    arguments, options = list[str](), list[str]()
    for parameter in parameters:
        aside = {parameter.name, f"{ctx.info_name} {parameter.name}"} & _NOT_OF_FIGURES
        if aside or not is_given(ctx, parameter.name):
            continue
        value = ctx.params[parameter.name]
        words = [_without_folder(str(each)) for each in (value if isinstance(value, list | tuple) else [value])]
        if parameter.param_type_name == "argument":
            arguments += words
        elif isinstance(value, bool):
            options.append(max(parameter.opts if value else parameter.secondary_opts, key=len))
        else:
            options += [part for word in words for part in (max(parameter.opts, key=len), word)]
    return shlex.join(["turboesm", *names, *arguments, *options])


_NOT_OF_FIGURES = {
    "output", "force", "if_done", "resume_anywhere", "json", "rejects", "device", "shard", "gpus", "log", "debug",
    "decode batch",
}  # fmt: skip
"""Options, of all commands or of one, that say where a measurement is done, how many proteins at a time, and what
becomes of it; rows have a column for the device."""


def _without_folder(text: str) -> str:
    return ",".join(Path(part).name if "/" in part and Path(part).exists() else part for part in text.split(","))


def check_room() -> None:
    """Raise DeviceError where torch cannot even be loaded."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < LEAST_ADDRESS_SPACE:
        raise DeviceError(
            f"this shell allows {limit >> 20:,} MiB of memory, and torch alone takes about "
            f"{LEAST_ADDRESS_SPACE >> 20:,}: raise the limit (ulimit -v, or the job's memory)"
        )


def check_values(ctx: Any, parameters: Sequence[Any]) -> None:
    """What holds for the options and arguments of every command, once they are read.

    `~` and `~user` mean a home folder wherever a path may begin, which shells leave alone in `--output=~/x`.
    `inf` and `nan` are numbers to the command line, but not to what is done with them. Raises BadParameter.
    """
    for parameter in parameters:
        if parameter.name in ctx.params and parameter.name not in _PLAIN_TEXT:
            try:
                ctx.params[parameter.name] = _checked(ctx.params[parameter.name])
            except ValueError as error:
                raise typer.BadParameter(str(error), ctx=ctx, param=parameter) from error


_PLAIN_TEXT = {"title"}


def _checked(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_checked(item) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    if isinstance(value, Path):
        return Path(_at_home(str(value)))
    if type(value) is str and "~" in value:
        return ",".join(_at_home(part) for part in value.split(","))
    return value


def _at_home(path: str) -> str:
    found = os.path.expanduser(path)  # noqa: PTH111 - which leaves alone what it does not know
    if found == path and path.startswith("~"):
        raise ValueError(f"{path}: there is no user of that name; write ./{path} for a file of that name")
    return found


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether the user gave an option."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_options(ctx: typer.Context, names: Sequence[str], why: str) -> None:
    """Raise BadParameter where the user gave one of these options, which would be ignored."""
    for name in names:
        if is_given(ctx, name):
            raise typer.BadParameter(why, param_hint=f"--{name.replace('_', '-')}")
