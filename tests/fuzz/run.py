"""Coverage-guided fuzzing: `python tests/fuzz/run.py fasta|archive [libFuzzer options] [corpus folders]`.

Needs atheris (`pip install -e .[fuzz]`). An input that finds a defect is written to `crash-*` in the working
folder; put it into `tests/fuzz/corpus/TARGET`, which `tests/test_fuzz.py` replays.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris
import torch  # noqa: F401  (before the instrumentation, which would take minutes over it)

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["turboesm_cli", "turboesm_kernels", "targets"]):
    from targets import TARGETS

if __name__ == "__main__":
    name = sys.argv.pop(1)
    corpus = str(Path(__file__).parent / "corpus" / name)
    atheris.Setup([*sys.argv, corpus], TARGETS[name])
    atheris.Fuzz()
