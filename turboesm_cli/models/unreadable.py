"""Files that cannot be read as a model: what they turn out to be, and how to mend it. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from turboesm_cli.models.names import torch_cache

HOW_TO_SAVE = (
    "save it with its settings: `model.save_pretrained(FOLDER)`, or as the guide models.md (README: Models) shows"
)


def one_line(error: Exception) -> str:
    """The start of what an error says, on one line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]


def again(path: Path) -> str:
    """How to get a file again: one in torch's cache is not downloaded anew while it is there."""
    cached = path.parent == torch_cache()
    return f"delete {path}, then run again" if cached else "download it again"


SIGNS = (
    (b"version https://git-lfs", "a Git LFS pointer and not the weights; run `git lfs pull` in its repository"),
    (b"<", "a web page, not a checkpoint"),
    (b"{", "JSON text, not a checkpoint"),
    (b"gguf", "a GGUF file; name the Hugging Face folder or the fair-esm .pt file that it was made from"),
    (b"\x89hdf", "an HDF5 file of TensorFlow; name a folder with model.safetensors"),
)
"""What files that are no checkpoints start with, in lower case, and what they are."""


def sign_of(path: Path) -> str | None:
    """What a file that is no checkpoint is by its first bytes, and how to mend it; None where they do not tell."""
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip().lower()
    except OSError:
        return None
    found = next((what for sign, what in SIGNS if head.startswith(sign)), None)
    return found if found is None or ";" in found else f"{found}; {again(path)}"
