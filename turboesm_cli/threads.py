"""How many threads torch gets, and how they wait: settled before torch is imported, since OpenMP reads it then."""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's share of the CPUs: microseconds of time in a period, or "max", and the period."""

_source = ["the cores that the process may run on"]
"""What decided the number of threads."""


def settle() -> None:
    """Set what OpenMP is to do where the user has not.

    Threads that spin while they wait, OpenMP's default, make everything several times slower on a machine that
    other jobs share. Their number is OMP_NUM_THREADS, else SLURM_CPUS_PER_TASK, else a container's quota of CPUs;
    else torch takes the cores that the process may run on.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if os.environ.get("OMP_NUM_THREADS"):
        _source[:] = ["OMP_NUM_THREADS"]
        return
    for source, number in (("SLURM_CPUS_PER_TASK", _of_slurm()), ("the container's quota of CPUs", _quota())):
        if number is not None:
            os.environ["OMP_NUM_THREADS"] = str(number)
            _source[:] = [source]
            return


def described() -> str:
    """For the log."""
    number = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    return f"threads: {number}, by {_source[0]}; they wait {os.environ.get('OMP_WAIT_POLICY', 'as OpenMP likes')}"


def _of_slurm() -> int | None:
    text = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def _quota() -> int | None:
    """Whole CPUs of the container's quota, where that is less than the cores that the process may run on."""
    try:
        time, period = QUOTA.read_text(encoding="ascii").split()
        number = max(1, math.ceil(int(time) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return number if number < len(os.sched_getaffinity(0)) else None
