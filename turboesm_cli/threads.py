"""How many threads torch gets, and how they wait: decided before torch is imported, since OpenMP reads it then."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's share of the CPUs: microseconds of time in a period, and the period, or "max"."""


def prepare(environment: MutableMapping[str, str] = os.environ) -> str:
    """Set what OpenMP is to do where the user has not, and say what decides the number of threads.

    Threads that spin while they wait, OpenMP's default, make everything several times slower on a machine that
    other jobs share. The number is OMP_NUM_THREADS, else SLURM_CPUS_PER_TASK, else a container's quota of CPUs;
    else torch takes the cores that the process may run on.
    """
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if environment.get("OMP_NUM_THREADS"):
        return "OMP_NUM_THREADS"
    source, number = "SLURM_CPUS_PER_TASK", _whole(environment.get("SLURM_CPUS_PER_TASK", ""))
    if number is None:
        source, number = "the container's quota of CPUs", _quota()
    if number is None:
        return "the cores that the process may run on"
    environment["OMP_NUM_THREADS"] = str(number)
    return source


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def _quota() -> int | None:
    """Whole CPUs of the container's quota, where that is less than the cores that the process may run on."""
    try:
        time, period = QUOTA.read_text(encoding="ascii").split()
        number = max(1, math.ceil(int(time) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return number if number < len(os.sched_getaffinity(0)) else None
