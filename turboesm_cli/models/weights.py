"""Weights of a checkpoint, and files that hold tensors: what they are, and what else they turn out to be.

Pickles are read with `weights_only=True` alone; `argparse.Namespace` is the one class allowed, since fair-esm's
checkpoints hold their settings in one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboesm_cli.errors import ModelError
from turboesm_cli.models.shapes import Shape
from turboesm_cli.models.unreadable import HOW_TO_SAVE, again, one_line, sign_of

LAYER_NORM_EPS = 1e-5
"""The epsilon of ESM-2's layer norms, which fair-esm gives every model."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights by fair-esm's names, in their own dtypes; see `esm2.EsmModel` for the rest.

    tied  whether the language-model head's output matrix is the embedding
    """

    name: str
    shape: Shape
    weights: dict[str, Tensor]
    token_dropout: bool = True
    layer_norm_eps: float = LAYER_NORM_EPS
    tied: bool = True
    is_random: bool = False
    note: str = ""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors file or a pickle. Raises ModelError."""
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            return dict(safetensors.torch.load_file(path))
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(path, error) from error
    return check_tensors(load_pickle(path), path)


def load_pickle(path: Path) -> Any:
    """What `torch.load` makes of a file, without running code of its own. Raises ModelError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
        raise _unreadable(path, error) from error


def check_tensors(weights: Any, where: Path) -> dict[str, Tensor]:
    """The weights, if they are what a checkpoint holds: dense tensors by name. Raises ModelError."""
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in weights.items()
    ):
        raise ModelError(f"{where} does not hold tensors by name: no checkpoint; {again(where)}")
    return weights


def renamed(weights: Iterable[tuple[str, Tensor]], rename: Callable[[str], str], where: Path) -> dict[str, Tensor]:
    """The weights by other names. Raises ModelError where two that differ would get one name."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights:
        new = rename(unwrapped(name))
        if new in found and not same(found[new], tensor):
            raise ModelError(f"{where} holds two different weights for {new}, one of them {name}; save it again")
        found[new] = tensor
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are equal, in whatever dtypes they are stored."""
    return torch.equal(a.float(), b.float())


def unwrapped(name: str) -> str:
    """A weight's name without what torch.compile and DataParallel put before it."""
    return re.sub(r"(^|\.)_orig_mod\.", r"\1", name).removeprefix("module.")


def widened(x: Tensor) -> Tensor:
    """The same in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def _unreadable(path: Path, error: Exception) -> ModelError:
    if isinstance(error, PermissionError | FileNotFoundError):
        return ModelError(f"{path} cannot be read ({error.strerror}); check the file and its permissions")
    sign = sign_of(path)
    if sign is not None:
        return ModelError(f"{path} is {sign}")
    pickled = re.search(r"GLOBAL ([\w.]+)", str(error))
    if pickled or "TorchScript" in str(error):
        what = f"a pickled {pickled[1]}" if pickled else "TorchScript"
        return ModelError(f"{path} holds {what}, code that turboesm does not run; {HOW_TO_SAVE}")
    return ModelError(f"{path} cannot be read as a checkpoint ({one_line(error)}); {again(path)}")
