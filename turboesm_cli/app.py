"""The command line: registers the commands and turns errors into one line and an exit code. Imports no torch."""

from __future__ import annotations

import errno
import gc
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import typer

from turboesm_cli import __version__, console, streams, threads
from turboesm_cli.commands.bench import bench
from turboesm_cli.commands.calibrate import calibrate
from turboesm_cli.commands.checks import Command, Group
from turboesm_cli.commands.decode import decode
from turboesm_cli.commands.merge import merge
from turboesm_cli.commands.quantize import quantize
from turboesm_cli.commands.report import report
from turboesm_cli.commands.score import score
from turboesm_cli.errors import DeviceError, OutputError, TurboESMError
from turboesm_cli.streams import NoResultsWanted, ReaderGone, ResultsLost

DEFECT, INTERRUPTED, TERMINATED = 1, 130, 143
TERMINATING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What schedulers send before they kill: Slurm what --signal names, Grid Engine SIGUSR1, SIGUSR2 and SIGXCPU."""

EPILOG = (
    "Exit codes: 0 success, 1 a defect of turboesm, 2 wrong command line, 3 unusable input file, 4 model, "
    "5 bundle or cache file, 6 device, 7 output, 130 interrupted, 143 terminated."
)


class _Commands(Group):
    """Commands whose errors end in one line on stderr; --debug (or TURBOESM_DEBUG=1) shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
            console.log("finished: exit code 0")
            return found
        except ReaderGone:
            console.log("finished: exit code 0; whoever read the results had enough")
            raise typer.Exit(0) from None
        except BaseException as error:
            if isinstance(error, NoResultsWanted) and console.files:
                console.warn(f"standard output is closed; {', '.join(map(str, console.files))} is complete")
                console.log("finished: exit code 0")
                raise typer.Exit(0) from error
            if hasattr(error, "exit_code") and not isinstance(error, TurboESMError):  # typer's own: --help, ...
                console.log(f"stopped: {error}")
                raise
            known, debugging = _known(error), _debugging(ctx) and isinstance(error, Exception)
            if known is None or debugging:
                console.log("".join(traceback.format_exception(error)))
            if debugging or (known is None and not isinstance(error, Exception)):
                raise
            message, code = known or (_defect(error), DEFECT)
            console.fail("; ".join([message, *getattr(error, "__notes__", ())]))
            console.log(f"finished: exit code {code}")
            raise typer.Exit(code) from error


def _known(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code of an error that is no defect of turboesm."""
    if isinstance(error, TurboESMError):
        return str(error), error.exit_code
    if _ran_out_of_memory(error):
        mending = "use shorter or fewer proteins at a time, another --device, or a higher limit (ulimit -v)"
        return f"out of memory; {mending}", DeviceError.exit_code
    if isinstance(error, OSError):
        return f"{error.strerror or error}; check the output and its disk", OutputError.exit_code
    if isinstance(error, _Terminated):
        return f"terminated by {error.name}; no output was written", TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; no output was written", INTERRUPTED
    return None


def _defect(error: BaseException) -> str:
    """What the user of a version with a defect is told: one line, and what a report should contain."""
    words = " ".join(str(error).split())[:300]
    return (
        f"a defect of turboesm ({type(error).__name__}: {words}); please report it with this version "
        f"({__version__}), the command line ({shlex.join(sys.argv[1:])}), and what `turboesm --debug ...` prints"
    )


class _Terminated(SystemExit):
    """One of the signals TERMINATING, and its name."""

    def __init__(self, name: str) -> None:
        super().__init__(TERMINATED)
        self.name = name


app = typer.Typer(
    cls=_Commands,
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (calibrate, quantize, decode, score, merge):
    app.command(cls=Command)(command)
app.add_typer(bench, name="bench")
app.command(cls=Command)(report)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print_line(f"turboesm {__version__}")
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
    """Compress the key/value cache of protein language models to about 3 bits per value.

    Models are ESM-2 and autoregressive ones: ProtGPT2, ZymCTRL, ProGen2, IgLM, GPT-2, GPT-J, Llama, Mistral. In
    this order: calibrate a model on proteins; quantize, decode, generate or score with the bundle; bench; report.
    """
    if log is not None:
        _start_log(log)


def _start_log(path: Path) -> None:
    try:
        console.log_to(path)
    except OSError as error:
        raise OutputError(f"cannot write the log {path}: {error.strerror}; choose another file") from error
    console.log(f"started: turboesm {__version__}: {shlex.join(sys.argv[1:])}; {threads.described()}")


def main() -> None:
    """Entry point of `turboesm`."""
    streams.prepare()
    threads.settle()
    warnings.showwarning = lambda message, *_where, **_more: console.warn(" ".join(str(message).split()))
    for number in TERMINATING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has SIGHUP ignored, for what it starts to go on
            signal.signal(number, _terminate)
    code: Any = 0
    try:
        try:
            app()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except ReaderGone:  # of --help, too, which is printed before any command runs
        pass
    except ResultsLost as error:
        console.fail(str(error))
        code = error.exit_code
    gc.freeze()  # or the interpreter looks for garbage in all of torch at its end: a quarter of a short command
    sys.exit(code)


def _terminate(number: int, _frame: object) -> NoReturn:
    for further in TERMINATING:  # schedulers send one after another, and saving what is done takes its time
        signal.signal(further, lambda *_: None)
    raise _Terminated(signal.Signals(number).name)


_NO_MEMORY = re.compile(
    "DefaultCPUAllocator|[Cc]annot allocate memory|failed to map segment|can't start new thread"
    "|error return without exception set"
)
"""What torch, the dynamic linker and Python say where memory is short, under `ulimit -v` for one."""


def _ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; torch and libraries in Rust, which have errors of their own, are not imported."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "PanicException"):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    kinds = RuntimeError | ImportError | OSError | SystemError
    return isinstance(error, kinds) and bool(_NO_MEMORY.search(str(error)))


def _debugging(ctx: Any) -> bool:
    return bool(ctx.params.get("debug")) or os.environ.get("TURBOESM_DEBUG") == "1"


if __name__ == "__main__":
    main()
