"""fair-esm, the package that ESM-2's modules come from: the one place that imports it.

Its Python name is `esm`, and so is that of EvolutionaryScale's package (ESM3, ESM C), which holds no ESM-2.
"""

from __future__ import annotations

from importlib.util import find_spec

from turboesm_cli.errors import ModelError

try:
    from esm import ESM2 as ESM2
    from esm.modules import gelu as gelu
except ImportError as error:
    _found = find_spec("esm")
    if _found is None:
        raise ModelError("fair-esm is not installed; run `pip install fair-esm==2.0.0`") from error
    raise ModelError(
        f"the Python package `esm` in {_found.origin or list(_found.submodule_search_locations or [])} is not "
        "fair-esm (EvolutionaryScale's package `esm`, of ESM3 and ESM C, has the same name); use an environment "
        "without it, or run `pip uninstall esm` and `pip install --force-reinstall --no-deps fair-esm==2.0.0`"
    ) from error
