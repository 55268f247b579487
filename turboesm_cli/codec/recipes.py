"""Recipes: everything that decides how a cache is coded, as data.

Each field of a recipe is one part of the method, to be switched on its own; `RECIPES` names the combinations
worth having. `paper` is TurboESM (arXiv 2603.26110), the others are ours, each a step on from the one before.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from turboesm_cli.errors import InputError
from turboesm_cli.reporting.recipe_names import typed

if TYPE_CHECKING:
    from turboesm_kernels.reference import Scale, Side

Rotation = Literal["none", "hadamard", "svd", "hadamard-svd"]
Metric = Literal["plain", "attention", "sensitivity"]
Residual = Literal["none", "sign", "qjl"]
Allocation = Literal["flat", "waterfill"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a cache is coded.

    bits_k, bits_v  payload bits per value, a mean over all layers; scales, sinks and layer 0's tokens not counted
    centre          take out each head's mean (of keys before RoPE), add it back on reading
    positions       where positions are learned, take out the mean of each one's keys, in layers where that is much
    rotation_k/_v   orthogonal axes of keys after RoPE and of values; svd: those of their second moment
    metric          what "least squares" means: plain; attention: keys in the queries' second moment, values in
                    the Gram matrix of the output projection; sensitivity: both in their measured effect on the
                    final hidden states (see `sensitivity`)
    scale           a factor for each token and head: none, norm or least-squares
    sinks           leading tokens kept in float16
    residual        what K's last bit is spent on: none (it belongs to the table), sign (of the residual, times a
                    constant, as in TurboESM) or qjl (signs of the residual in random orthogonal axes, unbiased)
    allocation      flat: every axis has the same width; waterfill: wide axes get more bits
    profile         whether each head has its own bit widths, or the heads of a layer share them
    budget          side: every layer's keys get bits_k, its values bits_v; model: the sum is shared out over all
                    layers and sides by expected effect (metric sensitivity only: no other has one unit)
    choose          take, for each layer and side, the flat or the water-filled code, whichever is predicted to
                    do better on proteins held back
    grid            lloyd-max or uniform levels
    exact_first     keep tokens instead of keys and values in layer 0, where these follow from the token; with
                    budget model, the other layers get its bits
    """

    name: str
    bits_k: float = 3
    bits_v: float = 3
    centre: bool = True
    rotation_k: Rotation = "hadamard-svd"
    rotation_v: Rotation = "hadamard-svd"
    metric: Metric = "plain"
    scale: Scale = "least-squares"
    sinks: int = 1
    residual: Residual = "none"
    allocation: Allocation = "flat"
    grid: Literal["lloyd-max", "uniform"] = "lloyd-max"
    exact_first: bool = False
    profile: Literal["head", "layer"] = "head"
    budget: Literal["side", "model"] = "side"
    choose: bool = False
    positions: bool = True

    def bits(self, side: Side) -> float:
        """Payload bits of one side."""
        return self.bits_k if side == "k" else self.bits_v

    @property
    def typed(self) -> str:
        """As it is typed: `auto@2.5`, `paper@4/3`."""
        return typed(self.name, self.bits_k, self.bits_v)

    def rotation(self, side: Side) -> Rotation:
        """Rotation of one side."""
        return self.rotation_k if side == "k" else self.rotation_v

    def residual_of(self, side: Side) -> Residual:
        """Residual bit of one side: values have none."""
        return self.residual if side == "k" else "none"

    def allocated(self, allocation: Allocation) -> Recipe:
        """This recipe with the axes that suit `allocation`: mixed to be alike, or wide apart from narrow."""
        rotation: Rotation = "svd" if allocation == "waterfill" else "hadamard-svd"
        return replace(self, allocation=allocation, rotation_k=rotation, rotation_v=rotation)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


_PAPER = Recipe(
    "paper", bits_k=4, bits_v=3, centre=False, rotation_k="svd", rotation_v="none", scale="none", sinks=0,
    residual="sign",
)  # fmt: skip
_FLAT = Recipe("flat")
_WATERFILL = replace(
    _FLAT.allocated("waterfill"), name="waterfill", metric="attention", grid="uniform", profile="layer"
)
_AUTO = replace(
    _WATERFILL, name="auto", metric="sensitivity", sinks=4, exact_first=True, budget="model",
    choose=True,
)  # fmt: skip

_AUTO_CODED = replace(_AUTO, name="auto-coded", exact_first=False)
_TURBOQUANT = Recipe(
    "turboquant", centre=False, rotation_k="hadamard", rotation_v="hadamard", scale="norm", sinks=0
)  # fmt: skip

RECIPES = {recipe.name: recipe for recipe in (_PAPER, _FLAT, _WATERFILL, _AUTO, _AUTO_CODED, _TURBOQUANT)}
"""paper: TurboESM. flat: centred, mixed axes, one table, token scales, a sink; needs no held-back proteins and has
the shortest codes. waterfill: wide axes get more bits, in the metric that one attention layer sees. auto: bits go
where they change the final hidden states most, over axes, layers and sides; layer 0 from its tokens; four sinks,
since peptides, all start, otherwise do half again as badly as the rest (an autoregressive model may get more, see
`statistics.sinks`). auto-coded: auto with layer 0 coded like the others. turboquant: what TurboQuant (arXiv
2504.19874) does, a Hadamard rotation, Lloyd-Max tables and each token's norm, to compare with."""


def parse_recipe(text: str) -> Recipe:
    """The recipe that `NAME`, `NAME@BITS` or `NAME@BITS_K/BITS_V` names. Raises InputError."""
    name, _, bits = text.partition("@")
    if name not in RECIPES:
        raise InputError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    if name == text:
        return RECIPES[name]
    try:
        bits_k, bits_v = [float(part) for part in bits.split("/")] * (2 - bits.count("/"))
    except ValueError as error:
        raise InputError(f"recipe {text!r}: bits are a number, or two as in {name}@3/4") from error
    return with_bits(RECIPES[name], bits_k, bits_v)


BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0)
"""Bits per value that there are."""


def with_bits(recipe: Recipe, bits_k: float | None, bits_v: float | None) -> Recipe:
    """The recipe at other bit budgets: 2 to 4 in steps of 0.5. Raises InputError."""
    for value in (bits_k, bits_v):
        if value is not None and value not in BUDGETS:
            raise InputError(f"{value:g} bits per value: choose 2 to 4 in steps of 0.5")
    changed = replace(
        recipe,
        bits_k=recipe.bits_k if bits_k is None else bits_k,
        bits_v=recipe.bits_v if bits_v is None else bits_v,
    )
    if recipe.residual != "none" and changed.bits_k != int(changed.bits_k):
        raise InputError(f"recipe {recipe.name!r} takes whole bits for keys, since one of them is a sign")
    return changed
