"""What `--plan` needs to know of models and devices: from names, headers and settings, without weights and torch
where that is possible."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

from turboesm_cli import console
from turboesm_cli.errors import BundleError, InputError

if TYPE_CHECKING:
    from turboesm_cli.codec.header import Known
    from turboesm_cli.models.shapes import Shape


def check_named(header: Known, name: str | None, where: Path) -> None:
    """Raise BundleError where the model that --model names is not the bundle's.

    A known name is compared by shape and name alone, a folder by its settings; anything else is loaded.
    """
    from turboesm_cli.models.names import EMBEDDED_NAME, is_embedded
    from turboesm_cli.models.shapes import official_name

    name = name or os.environ.get("TURBOESM_MODEL")
    if not name or (is_embedded(name) and header.model_name == EMBEDDED_NAME and not Path(name).exists()):
        return
    found = None if is_embedded(name) else _family_and_shape(name)
    if found is None:
        _check_weights(name, where)
        return
    official, own = official_name(name), official_name(header.model_name)
    other = official is not None and own is not None and official != own
    if found != (header.family, header.shape) or other:
        raise BundleError(
            f"{where} was calibrated for {header.model_name} ({_words(header.shape)}), not for {name} "
            f"({_words(found[1])}); name its model with --model, or calibrate again"
        )
    if official is None:
        console.say(f"{name} has the sizes of {where}'s model; weights are compared when it is loaded")


def _check_weights(name: str, where: Path) -> None:
    from turboesm_cli.codec.bundle import read_bundle
    from turboesm_cli.models.loading import load_model

    read_bundle(where).check_model(load_model(name, "cpu"), where)


def shape_of(name: str | None, device: str) -> Shape:
    """The shape of the model that --model names, by default the embedded one's; loaded where its name says none.

    Raises ModelError.
    """
    from turboesm_cli.models.names import EMBEDDED

    found = _family_and_shape(name or os.environ.get("TURBOESM_MODEL") or EMBEDDED)
    if found is not None:
        return found[1]
    from turboesm_cli.commands.options import open_model

    return open_model(name, device).shape


def _family_and_shape(name: str) -> tuple[str, Shape] | None:
    """What a model's name, or the settings and headers in its folder, say; None where it has to be loaded."""
    from turboesm_cli.models.families import FIRST
    from turboesm_cli.models.folders import family_and_shape, hub_name, in_hub_cache
    from turboesm_cli.models.names import RANDOM_PREFIX, is_embedded, known_shape
    from turboesm_cli.models.random_shapes import SHAPES, layout_of, whole_shape
    from turboesm_cli.models.shapes import official_name

    if (known := known_shape(name)) is not None:
        return FIRST, known
    random = name.removeprefix(RANDOM_PREFIX)
    if random != name and random in SHAPES:
        return layout_of(random).family, whole_shape(random)
    if official_name(name) or is_embedded(name) or name.startswith("~"):
        return None  # loading tells what it is, or refuses it beside a path of that name
    if Path(name).is_dir():
        return family_and_shape(Path(name))
    folder = in_hub_cache(name) if hub_name(name) and not Path(name).exists() else None
    return None if folder is None else family_and_shape(folder)


def memory_of(text: str | None, device: str) -> int:
    """Bytes to plan with: --memory, else what the device has free. Raises InputError, DeviceError."""
    from turboesm_cli.engine.memory_plan import machine_memory, parse_memory

    if text:
        return parse_memory(text)
    if device == "cpu" or (device == "auto" and not _has_driver()):
        return machine_memory()
    import torch

    from turboesm_cli.models.loading import pick_device

    found = pick_device(device)
    return int(torch.cuda.mem_get_info(found)[0]) if found.type == "cuda" else machine_memory()


def _has_driver() -> bool:
    """Whether there is a driver of NVIDIA GPUs, without which torch need not be asked."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def check_context(tokens: int, shape: Shape, what: str) -> None:
    """Raise InputError where a plan is for more tokens than a model takes."""
    if shape.context is not None and tokens > shape.context:
        raise InputError(f"{what} {tokens}: the model takes {shape.context:,} tokens at most")


def _words(shape: Shape) -> str:
    return f"{shape.layers} layers, {shape.width} wide, {shape.heads} heads"
