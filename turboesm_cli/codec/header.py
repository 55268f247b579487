"""What a bundle's manifest says: whose codec it is, what it was calibrated on, how large. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from turboesm_kernels.layout import SIDES, Profile, Side

from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.codec.sizes import Buffer, CodecSize, Dims, SideSize
from turboesm_cli.errors import BundleError, ModelError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.families import FAMILIES, FIRST, alphabet_of
from turboesm_cli.models.shapes import Shape, check_shape
from turboesm_cli.outputs.archive import Archive, printable
from turboesm_cli.sequences.fasta import Protein

KIND = "turboesm-bundle"
VERSION = 1
PART = "codec.safetensors"


@dataclass(frozen=True)
class Calibration:
    """What a codec was fitted to: sha256 of the set, counts, and the start of each sequence's sha256.

    source  name of the file that the proteins came from, or of several
    """

    sha256: str
    proteins: int
    tokens: int
    sequences: frozenset[str]
    source: str = ""


class Known(Protocol):
    """What a header and a whole bundle both tell."""

    @property
    def model_name(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def calibration(self) -> Calibration: ...
    @property
    def size(self) -> CodecSize: ...
    @property
    def family(self) -> str: ...
    @property
    def alphabet(self) -> Alphabet: ...


@dataclass(frozen=True)
class Header:
    """All of a bundle but its tensors, whose sizes it tells."""

    model_name: str
    fingerprint: str
    shape: Shape
    calibration: Calibration
    recipe: Recipe
    size: CodecSize
    family: str
    alphabet: Alphabet


def sequence_key(protein: Protein) -> str:
    """The start of the sha256 of a protein's sequence, by which bundles know it."""
    return hashlib.sha256(protein.sequence.encode()).hexdigest()[:16]


def seen(bundle: Known, proteins: Iterable[Protein]) -> list[Protein]:
    """Those of `proteins` that the bundle was calibrated on."""
    return [protein for protein in proteins if sequence_key(protein) in bundle.calibration.sequences]


def read_header(path: Path) -> Header:
    """The header of a bundle, whose tensors are checked by size and hash alone. Raises BundleError."""
    with Archive(path, KIND, VERSION) as archive:
        manifest, found = archive.manifest, archive.dimensions(PART) if PART in archive.parts else {}
    with damage_told(path):
        header = parse_header(path, manifest, found)
        for index, layer in enumerate(header.size.layers):
            for side in layer or ():
                for name, like in side.tensors.items():
                    check_tensor(
                        f"layer {index}, {side.side}", name, *found[tensor_name(index, side.side, name)], like
                    )
    return header


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Raise BundleError where what a bundle says makes no sense."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, ModelError) as error:
        raise BundleError(f"{path} is damaged: {error!r}; calibrate again") from error


def tensor_name(layer: int, side: Side, name: str) -> str:
    """What a tensor of a `SideSpec` is called in a bundle."""
    return f"layers.{layer}.{side}.{name}"


def check_tensor(where: str, name: str, dtype: str, size: Dims, like: Buffer) -> None:
    """Raise ValueError where a tensor is of another size or dtype than it should be."""
    if (dtype, size) != (like.dtype, like.size):
        raise ValueError(f"{where}: {name} is {dtype} {list(size)}, not {like.dtype} {list(like.size)}")


_SIZES = ("own_head_dim", "own_key_value_heads", "context", "own_parameters")
"""Of a `Shape`, where they are not as usual."""


def parse_header(path: Path, manifest: dict[str, Any], tensors: Container[str]) -> Header:
    """What a manifest says, `tensors` being the names of those that are there.

    Raises LookupError, TypeError, ValueError or ModelError; BundleError where it is of a later version.
    """
    model = manifest["model"]
    own = {name: model[name] for name in _SIZES if name in model}
    shape = Shape(model["layers"], model["width"], model["heads"], **own)
    check_shape(shape, path)
    if len(manifest["layers"]) != shape.layers:
        raise ValueError(f"{len(manifest['layers'])} layers described, {shape.layers} in the model")
    recipe = parse_recipe_fields(manifest["recipe"])
    layers = tuple(
        None if described is None else _pair(described, index, shape, tensors)
        for index, described in enumerate(manifest["layers"])
    )
    if any(layer is None and not (index == 0 and recipe.exact_first) for index, layer in enumerate(layers)):
        raise ValueError("a layer other than the first has no codec")
    family = _family(path, model)
    alphabet = alphabet_of(family, manifest.get("tokens"))
    return Header(
        printable(model["name"]),
        printable(model["fingerprint"]),
        shape,
        parse_calibration(manifest["calibration"]),
        recipe,
        CodecSize(layers, shape.key_value_heads, shape.head_dim, len(alphabet), recipe.sinks),
        family,
        alphabet,
    )


def parse_calibration(described: dict[str, Any]) -> Calibration:
    """What a manifest says of a calibration. Raises LookupError, TypeError or ValueError."""
    return Calibration(
        printable(described["sha256"]),
        int(described["proteins"]),
        int(described["tokens"]),
        frozenset(map(printable, described["sequences"])),
        printable(described.get("source", "")),
    )


def profiles_of(described: dict[str, Any]) -> tuple[Profile, ...]:
    """The bit layouts of a side. Raises LookupError, TypeError or ValueError."""
    return tuple(Profile(tuple(p["widths"]), int(p["nbytes"]), int(p["lanes"])) for p in described["profiles"])


def _pair(
    described: dict[str, Any], layer: int, shape: Shape, tensors: Container[str]
) -> tuple[SideSize, SideSize]:
    k, v = (_side_size(described[side], layer, side, shape, tensors) for side in SIDES)
    return k, v


def _side_size(
    described: dict[str, Any], layer: int, side: Side, shape: Shape, tensors: Container[str]
) -> SideSize:
    where = f"layer {layer}, {side}"
    profiles, scale = profiles_of(described), described["scale"]
    _check_profiles(profiles, described["profile_of_head"], scale, shape, where)
    positioned = side == "k" and tensor_name(layer, side, "centre_at") in tensors
    if positioned and shape.context is None:
        raise ValueError(f"{where}: a centre for each position, of which there is no number")
    first = profiles[0]
    return SideSize(
        side,
        shape.key_value_heads,
        shape.head_dim,
        len(first.widths),
        first.nbytes,
        first.lanes,
        max(profile.widths[0] for profile in profiles),
        scale != "none",
        (shape.context or 0) if positioned else 0,
    )


def _check_profiles(
    profiles: Sequence[Profile], of_head: Sequence[int], scale: str, shape: Shape, where: str
) -> None:
    first = profiles[0]
    alike = {(len(p.widths), p.nbytes, p.lanes) for p in profiles}
    if alike != {(len(first.widths), first.nbytes, first.lanes)} or scale not in ("none", "norm", "least-squares"):
        raise ValueError(f"{where}: profiles differ in size, or scale {scale!r} is unknown")
    if first.nbytes > 4 * shape.head_dim or len(first.widths) > 4 * shape.head_dim:
        raise ValueError(
            f"{where}: {len(first.widths)} axes in {first.nbytes} bytes for {shape.head_dim} channels"
        )
    if len(of_head) != shape.key_value_heads or not set(of_head) <= set(range(len(profiles))):
        raise ValueError(f"{where}: profile_of_head does not name a profile for each head")


def _family(path: Path, model: dict[str, Any]) -> str:
    family = printable(model.get("family", FIRST))
    if family not in FAMILIES:
        raise BundleError(f"{path} is for models of family {family!r}: a later version of turboesm reads it")
    return family


_LIKE = Recipe("", bits_k=3, bits_v=3)
"""A recipe whose fields have the types that all have."""


def parse_recipe_fields(described: dict[str, Any]) -> Recipe:
    """The recipe that a manifest describes. Raises TypeError or ValueError."""
    names = {field.name for field in fields(Recipe)}
    recipe = Recipe(**{key: value for key, value in described.items() if key in names})
    for name, like in _LIKE.as_dict().items():
        value = getattr(recipe, name)
        if isinstance(like, str):
            printable(value)
        elif type(value) is not type(like) and not (name in ("bits_k", "bits_v") and type(value) is float):
            raise ValueError(f"{name} of the recipe is {value!r}")
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError for numbers that no bundle has."""
    if not 0 <= recipe.sinks <= 16 or not (0 < recipe.bits_k <= 16 and 0 < recipe.bits_v <= 16):
        raise ValueError(f"{recipe.sinks} sinks, {recipe.bits_k} and {recipe.bits_v} bits")
