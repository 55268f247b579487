"""Where this process runs: its host, its number, its job of a scheduler, and the command that it was given."""

from __future__ import annotations

import os
import socket

_COMMAND: list[str] = []


def note_command(words: str) -> None:
    """Say what `command` gives from now on."""
    _COMMAND[:] = [words]


def command() -> str:
    """The command that this process was given, as results name it: what figures follow from; "" in a program."""
    return "".join(_COMMAND)


def host() -> str:
    """The host's name."""
    return socket.gethostname()


def slurm_job() -> str:
    """The Slurm job that this process belongs to, with its task where it is one of an array, or ""."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}", "") for name in ("JOB_ID", "TASK_ID"))
    found = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return found if len(found) < 40 and found.isprintable() else ""


def described() -> str:
    """All of it, for the lines of a log that many processes may share."""
    job = slurm_job()
    return f"{host()} {os.getpid()}" + (f" job {job}" if job else "")
