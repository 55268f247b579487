"""The real command in a process of its own, forked from a server that has imported torch.

Most of a short command is that import. What is forked is given its own streams, folder and environment, and does
what `python -m turboesm_cli.app` does; only the libraries of others are there before. What these read of the
environment when they are imported, such as OpenMP the number of threads, is as it was for the server; hashes of
text are the same in all processes that it forks; and none of them takes the interpreter down. Tests of starts,
ends, streams and threads run a new interpreter; where two processes must give the same bytes, one of them does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TextIO

LIBRARIES = (
    "torch",
    "torch._dynamo",
    "esm",
    "pandas",
    "safetensors.torch",
    "rich.progress",
    "rich.table",
    "typer",
)
Done = subprocess.CompletedProcess[str]


def run_afresh(*arguments: str, cwd: Path, env: Mapping[str, str] = os.environ, stdin: str | None = None) -> Done:
    """The command in a new interpreter."""
    command = [sys.executable, "-m", "turboesm_cli.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=dict(env), input=stdin)


def run_forked(*arguments: str, cwd: Path, env: Mapping[str, str] = os.environ) -> Done:
    """The same in a process that is forked, with nothing to read on its standard input."""
    with tempfile.TemporaryDirectory() as name:
        streams = [Path(name) / stream for stream in ("in", "out", "err")]
        for path in streams:
            path.touch()
        asked = {"arguments": arguments, "cwd": str(cwd), "env": dict(env), "streams": [*map(str, streams)]}
        requests, answers = _server()
        requests.write(json.dumps(asked) + "\n")
        requests.flush()
        code = int(answers.readline() or "the server has ended")
        return Done(arguments, code, *(path.read_text(encoding="utf-8") for path in streams[1:]))


@cache
def _server() -> tuple[TextIO, TextIO]:
    """Where it is asked and where it answers; started at the first call."""
    command, env = (
        [sys.executable, "-P", __file__],
        {"OMP_WAIT_POLICY": "passive"} | os.environ,
    )  # as `threads` says
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    requests, answers = server.stdin, server.stdout
    assert requests is not None and answers is not None

    def stop() -> None:
        with contextlib.suppress(OSError):
            requests.close()
        server.wait(10)

    atexit.register(stop)
    return requests, answers


def _serve() -> dict[str, Any] | None:
    """Answer each request with the exit code of a child. In the child: the request; at the end: None."""
    with os.fdopen(os.dup(0)) as requests, os.fdopen(os.dup(1), "w") as answers:
        for line in requests:
            child = os.fork()
            if not child:
                return dict(json.loads(line))
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


def _become(asked: dict[str, Any]) -> None:
    """Take the streams, the folder, the environment and the arguments that are asked for."""
    for number, path in enumerate(asked["streams"]):
        handle = os.open(path, os.O_RDWR)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = ["turboesm", *asked["arguments"]]


def _run(asked: dict[str, Any]) -> int:
    """The exit code, all output written. Taking down an interpreter with torch in it takes another second."""
    _become(asked)
    code: Any = 0
    try:
        runpy.run_module("turboesm_cli.app", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


if __name__ == "__main__":
    for library in LIBRARIES:
        __import__(library)
    gc.freeze()  # else children copy what their collector looks at
    code = _run(asked) if (asked := _serve()) else 0
    os.execv("/bin/sh", ["sh", "-c", f"exit {code}"])  # see `_run`
