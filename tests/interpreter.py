"""Tests of kernels in Triton's interpreter, on a CPU: it reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run_interpreted(file: str) -> None:
    """Run a file's tests in a child process that has TRITON_INTERPRET set. Asserts that they pass."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
