"""The command line: registers the commands and turns errors into one line and an exit code. Imports no torch."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import typer
import typer.core

from turboesm_cli import __version__, console
from turboesm_cli.commands.bench import bench
from turboesm_cli.commands.calibrate import calibrate
from turboesm_cli.commands.decode import decode
from turboesm_cli.commands.quantize import quantize
from turboesm_cli.commands.report import report
from turboesm_cli.errors import DeviceError, OutputError, TurboESMError

INTERRUPTED, TERMINATED = 130, 143

EPILOG = (
    "Exit codes: 0 success, 1 a defect of turboesm, 2 wrong command line, 3 unusable input file, 4 model, "
    "5 bundle or cache file, 6 device, 7 output, 130 interrupted, 143 terminated."
)


class _Commands(typer.core.TyperGroup):
    """Commands whose errors end in one line on stderr; --debug (or TURBOESM_DEBUG=1) shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            found = super().invoke(ctx)
            console.log("finished: exit code 0")
            return found
        except BrokenPipeError:  # whoever read our output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except BaseException as error:
            known = _known(error)
            if known is None or (_debugging(ctx) and isinstance(error, Exception)):
                is_of_typer = hasattr(error, "exit_code")  # a wrong command line, --help
                console.log(f"stopped: {error}" if is_of_typer else "".join(traceback.format_exception(error)))
                raise
            message, code = known
            console.fail("; ".join([message, *getattr(error, "__notes__", ())]))
            console.log(f"finished: exit code {code}")
            raise typer.Exit(code) from error


def _known(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code of an error that is no defect of turboesm."""
    if isinstance(error, TurboESMError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _ran_out_of_memory(error)):
        return "out of memory; use shorter or fewer proteins at a time, or another --device", DeviceError.exit_code
    if isinstance(error, OSError):
        return f"{error.strerror or error}; check the output and its disk", OutputError.exit_code
    if isinstance(error, _Terminated):
        return "terminated; no output was written", TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; no output was written", INTERRUPTED
    return None


class _Terminated(SystemExit):
    """SIGTERM, which a scheduler sends, or SIGHUP."""


app = typer.Typer(
    cls=_Commands,
    help="Compress the key/value cache of ESM-2 protein language models to about 3 bits a value.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (calibrate, quantize, decode, bench, report):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.out.print(f"turboesm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    log: Path | None = typer.Option(
        None,
        "--log",
        envvar="TURBOESM_LOG",
        help="Append what is said on stderr to this file, with the time, for runs that nobody watches.",
        show_default=False,
    ),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Compress the key/value cache of ESM-2 protein language models to about 3 bits a value.

    In this order: calibrate a model on proteins, quantize or decode with the bundle, bench recipes, report.
    """
    if log is not None:
        _start_log(log)


def _start_log(path: Path) -> None:
    try:
        console.log_to(path)
    except OSError as error:
        raise OutputError(f"cannot write the log {path}: {error.strerror}; choose another file") from error
    console.log(f"started: turboesm {__version__}: {shlex.join(sys.argv[1:])}")


def main() -> None:
    """Entry point of `turboesm`."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_where, **_more: console.warn(" ".join(str(message).split()))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    app()


def _terminate(_signal: int, _frame: object) -> NoReturn:
    raise _Terminated(TERMINATED)


def _ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says so, which is not imported here."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _debugging(ctx: Any) -> bool:
    return bool(ctx.params.get("debug")) or os.environ.get("TURBOESM_DEBUG") == "1"


if __name__ == "__main__":
    main()
