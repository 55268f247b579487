"""turboesm from Python: packed key/value caches of protein language models.

Names are imported when they are first used, so that `import turboesm` is quick. turboesm_cli/guides/python.md has
an example of it all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from turboesm_cli import __version__ as __version__

if TYPE_CHECKING:
    from turboesm_cli.codec.bundle import Bundle as Bundle
    from turboesm_cli.errors import BundleError as BundleError
    from turboesm_cli.errors import DeviceError as DeviceError
    from turboesm_cli.errors import InputError as InputError
    from turboesm_cli.errors import ModelError as ModelError
    from turboesm_cli.errors import OutputError as OutputError
    from turboesm_cli.errors import TurboESMError as TurboESMError
    from turboesm_cli.models.protocol import Model as Model
    from turboesm_cli.sequences.fasta import Protein as Protein

    from .api import PackedCache as PackedCache
    from .api import calibrate as calibrate
    from .api import evaluate as evaluate
    from .api import load_bundle as load_bundle
    from .api import load_model as load_model
    from .api import prefill as prefill
    from .api import read_fasta as read_fasta
    from .api import step as step
    from .api import tokenize as tokenize
    from .results import read_figures as read_figures
    from .results import read_results as read_results

_HOMES = {
    f"{__name__}.api": (
        "PackedCache",
        "calibrate",
        "evaluate",
        "load_bundle",
        "load_model",
        "prefill",
        "read_fasta",
        "step",
        "tokenize",
    ),
    f"{__name__}.results": ("read_figures", "read_results"),
    "turboesm_cli.codec.bundle": ("Bundle",),
    "turboesm_cli.models.protocol": ("Model",),
    "turboesm_cli.sequences.fasta": ("Protein",),
    "turboesm_cli.errors": (
        "BundleError",
        "DeviceError",
        "InputError",
        "ModelError",
        "OutputError",
        "TurboESMError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'turboesm' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
