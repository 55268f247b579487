"""A codec on disk: the `.tqz` bundle.

manifest: model {name, fingerprint, layers, width, heads; family and further sizes where they are not ESM-2's};
tokens: those of an autoregressive model, see `decoder_alphabets`; recipe (every field); calibration {sha256,
proteins, tokens, sequences: the first 16 hex digits of each sequence's sha256}; layers: for each, null (the layer
keeps tokens) or {"k": SIDE, "v": SIDE} with SIDE {profiles: [{widths, nbytes, lanes}], profile_of_head, scale};
choices: for each coded layer and side its bytes per vector, its allocation and the errors predicted.
codec.safetensors: layers.I.{k,v}.{centre,analysis,deviation,synthesis,levels,thresholds}, and layers.I.k.centre_at
where positions are learned; see `turboesm_kernels.reference.SideSpec`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turboesm_kernels.layout import Profile
from turboesm_kernels.reference import SPEC_TENSORS, Side, SideSpec, table_size, table_slice

from turboesm_cli.codec.fit import CodecSpec, LayerSpec
from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.errors import BundleError, InputError, ModelError, OutputError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.families import FAMILIES, FIRST, alphabet_of
from turboesm_cli.models.protocol import Model, learned_positions
from turboesm_cli.models.shapes import Shape, check_shape
from turboesm_cli.outputs.archive import Archive, new_archive, printable, to_bytes
from turboesm_cli.outputs.files import check_output
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.sensitivity import SIDES

KIND = "turboesm-bundle"
VERSION = 1
PART = "codec.safetensors"
PROTEINS_LIMIT = 2_000_000
"""Calibration proteins: each takes 23 bytes of a manifest, which has to stay below `archive.MANIFEST_LIMIT`."""


@dataclass(frozen=True)
class Calibration:
    """What a codec was fitted to: sha256 of the set, counts, and the start of each sequence's sha256."""

    sha256: str
    proteins: int
    tokens: int
    sequences: frozenset[str]


@dataclass(frozen=True)
class Bundle:
    """A codec with the identity of its model and of its calibration set; the model's family and tokens."""

    model_name: str
    fingerprint: str
    shape: Shape
    calibration: Calibration
    spec: CodecSpec
    family: str = FIRST
    alphabet: Alphabet = field(default_factory=alphabet_of)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write it as a .tqz file, whole or not at all. Raises OutputError where there is one, or none can be."""
        if Path(path).exists() and not overwrite:
            raise OutputError(f"{path} exists; pass overwrite=True, or choose another path")
        check_output(Path(path), may_exist=True)
        write_bundle(Path(path), self)

    def check_model(self, model: Model, where: Path | str) -> None:
        """Raise BundleError, naming both models, where this bundle was made for another one."""
        if model.family != self.family:
            raise BundleError(
                f"{where} is for models of family {self.family!r} ({self.model_name}), and {model.name} is of "
                f"{model.family!r}; name its model with --model, or calibrate again"
            )
        if model.fingerprint != self.fingerprint:
            raise BundleError(
                f"{where} was calibrated for {self.model_name}, not for {model.name} (their weights differ); "
                "name its model with --model, or calibrate again"
            )
        positioned = any(layer is not None and layer.k.centre_at is not None for layer in self.spec.layers)
        if positioned and not learned_positions(model):
            raise BundleError(
                f"{where} has centres for learned positions, which {model.name} has not; calibrate again"
            )
        if _tokens(model.alphabet) != _tokens(self.alphabet):
            raise BundleError(
                f"{where} was calibrated for {self.model_name} with other tokens than {model.name} has, their "
                "weights alike; name the folder with that tokenizer, or calibrate again"
            )


def _tokens(alphabet: Alphabet) -> dict[str, Any]:
    """What an alphabet is, whatever the model is called."""
    return alphabet.described() | {"name": ""}


def sequence_key(protein: Protein) -> str:
    """The start of the sha256 of a protein's sequence, by which bundles know it."""
    return hashlib.sha256(protein.sequence.encode()).hexdigest()[:16]


def seen(bundle: Bundle, proteins: Iterable[Protein]) -> list[Protein]:
    """Those of `proteins` that the bundle was calibrated on."""
    return [protein for protein in proteins if sequence_key(protein) in bundle.calibration.sequences]


def check_storable(model_name: str, proteins: int, recipe: Recipe) -> None:
    """Raise InputError where a bundle could not be read back; to be asked before the work that a codec takes."""
    if proteins > PROTEINS_LIMIT:
        raise InputError(f"{proteins:,} calibration proteins, over {PROTEINS_LIMIT:,}; give --max-proteins")
    try:
        printable(model_name)
        _check_recipe(recipe)
    except ValueError as error:
        raise InputError(f"no bundle can hold this: {error}; rename the model, or change the recipe") from error


def write_bundle(path: Path, bundle: Bundle, devices: str = "") -> None:
    """Write a bundle, whole or not at all. Raises OutputError.

    devices  those that it was learned on, where they are more than one: the manifest names them
    """
    calibration = asdict(bundle.calibration) | {"sequences": sorted(bundle.calibration.sequences)}
    described = {
        "model": {"name": bundle.model_name, "fingerprint": bundle.fingerprint, **bundle.shape.as_dict()}
        | ({"family": bundle.family} if bundle.family != FIRST else {}),
        "recipe": bundle.spec.recipe.as_dict(),
        "calibration": calibration,
        "layers": [None if layer is None else _describe(layer) for layer in bundle.spec.layers],
        "choices": list(bundle.spec.choices),
    } | ({"tokens": tokens} if (tokens := bundle.alphabet.described()) else {})
    tensors = {
        f"layers.{index}.{side}.{name}": tensor
        for index, layer in enumerate(bundle.spec.layers)
        if layer is not None
        for side in SIDES
        for name, tensor in getattr(layer, side).tensors.items()
    }
    with new_archive(path, KIND, VERSION) as archive:
        archive.manifest = described | ({"devices": devices} if devices else {})
        archive.add(PART, [to_bytes(tensors)])


def read_bundle(path: Path) -> Bundle:
    """Read a bundle, with everything in it checked first. Raises BundleError."""
    with Archive(path, KIND, VERSION) as archive:
        manifest, tensors = archive.manifest, archive.read(PART) if PART in archive.parts else {}
    try:
        return _bundle(path, manifest, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, ModelError) as error:
        raise BundleError(f"{path} is damaged: {error!r}; calibrate again") from error


_SIZES = ("own_head_dim", "own_key_value_heads", "context", "own_parameters")
"""Of a `Shape`, where they are not as usual."""


def _bundle(path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Bundle:
    model, calibration = manifest["model"], manifest["calibration"]
    own = {name: model[name] for name in _SIZES if name in model}
    shape = Shape(model["layers"], model["width"], model["heads"], **own)
    check_shape(shape, path)
    if len(manifest["layers"]) != shape.layers:
        raise ValueError(f"{len(manifest['layers'])} layers described, {shape.layers} in the model")
    layers = tuple(
        None
        if described is None
        else LayerSpec(*(_side(described, tensors, index, side, shape) for side in SIDES))
        for index, described in enumerate(manifest["layers"])
    )
    recipe = parse_recipe_fields(manifest["recipe"])
    family = _family(path, model)
    alphabet = alphabet_of(family, manifest.get("tokens"))
    if any(layer is None and not (index == 0 and recipe.exact_first) for index, layer in enumerate(layers)):
        raise ValueError("a layer other than the first has no codec")
    return Bundle(
        printable(model["name"]),
        printable(model["fingerprint"]),
        shape,
        parse_calibration(calibration),
        CodecSpec(
            recipe,
            layers,
            shape.key_value_heads,
            shape.head_dim,
            tuple(_choice(choice) for choice in manifest.get("choices", ())),
            len(alphabet),
        ),
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
    )


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
    _check_recipe(recipe)
    return recipe


def _check_recipe(recipe: Recipe) -> None:
    if not 0 <= recipe.sinks <= 16 or not (0 < recipe.bits_k <= 16 and 0 < recipe.bits_v <= 16):
        raise ValueError(f"{recipe.sinks} sinks, {recipe.bits_k} and {recipe.bits_v} bits")


def _choice(described: dict[str, Any]) -> dict[str, Any]:
    """What a bundle says of a choice, which is told and not decoded with."""
    if type(described["layer"]) is not int or described["side"] not in SIDES:
        raise ValueError("a choice without a layer or a side")
    predicted = {printable(name): float(error) for name, error in described["predicted"].items()}
    return described | {"allocation": printable(described["allocation"]), "predicted": predicted}


def _describe(layer: LayerSpec) -> dict[str, Any]:
    return {
        name: {
            "profiles": [asdict(profile) for profile in side.profiles],
            "profile_of_head": list(side.profile_of_head),
            "scale": side.scale,
        }
        for name, side in (("k", layer.k), ("v", layer.v))
    }


def _side(described: dict[str, Any], tensors: dict[str, Tensor], index: int, side: Side, shape: Shape) -> SideSpec:
    found = described[side]
    profiles = tuple(Profile(tuple(p["widths"]), int(p["nbytes"]), int(p["lanes"])) for p in found["profiles"])
    where = f"layers.{index}.{side}."
    own = {name: tensors[where + name] for name in SPEC_TENSORS}
    if side == "k" and where + "centre_at" in tensors:
        own["centre_at"] = tensors[where + "centre_at"]
    spec = SideSpec(side, profiles, tuple(found["profile_of_head"]), scale=found["scale"], **own)
    _check_side(spec, shape, f"layer {index}, {side}")
    return spec


def _check_side(spec: SideSpec, shape: Shape, where: str) -> None:
    """Raise ValueError unless every tensor has the shape and the properties that decoding relies on."""
    axes = len(spec.profiles[0].widths)
    widest = max(width for profile in spec.profiles for width in profile.widths)
    expected = {
        "centre": (shape.key_value_heads, shape.head_dim),
        "analysis": (shape.key_value_heads, shape.head_dim, axes),
        "deviation": (shape.key_value_heads, axes),
        "synthesis": (shape.key_value_heads, axes, shape.head_dim),
        "levels": (shape.key_value_heads, table_size(widest)),
        "thresholds": (shape.key_value_heads, table_size(widest)),
    }
    if spec.centre_at is not None:
        if shape.context is None:
            raise ValueError(f"{where}: a centre for each position, of which there is no number")
        expected["centre_at"] = (shape.key_value_heads, shape.context or 0, shape.head_dim)
    for name, size in expected.items():
        tensor, dtype = spec.tensors[name], torch.float16 if name == "centre_at" else torch.float32
        if tuple(tensor.shape) != size or tensor.dtype != dtype:
            raise ValueError(f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(size)}")
        if name != "thresholds" and not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: {name} is not finite")
    _check_profiles(spec, shape, where)
    _check_tables(spec, where)
    if not bool((spec.deviation > 0).all()):
        raise ValueError(f"{where}: a deviation is not positive")


def _check_profiles(spec: SideSpec, shape: Shape, where: str) -> None:
    first = spec.profiles[0]
    alike = {(len(p.widths), p.nbytes, p.lanes) for p in spec.profiles}
    if alike != {(len(first.widths), first.nbytes, first.lanes)} or spec.scale not in (
        "none",
        "norm",
        "least-squares",
    ):
        raise ValueError(f"{where}: profiles differ in size, or scale {spec.scale!r} is unknown")
    if first.nbytes > 4 * shape.head_dim or len(first.widths) > 4 * shape.head_dim:
        raise ValueError(
            f"{where}: {len(first.widths)} axes in {first.nbytes} bytes for {shape.head_dim} channels"
        )
    if len(spec.profile_of_head) != shape.key_value_heads or not set(spec.profile_of_head) <= set(
        range(len(spec.profiles))
    ):
        raise ValueError(f"{where}: profile_of_head does not name a profile for each head")


def _check_tables(spec: SideSpec, where: str) -> None:
    for head, index in enumerate(spec.profile_of_head):
        for width, _axes in spec.profiles[index].runs:
            thresholds = spec.thresholds[head, table_slice(width)]
            ascending = bool((thresholds[1:] >= thresholds[:-1]).all()) and bool(thresholds[:-1].isfinite().all())
            if not ascending:
                raise ValueError(f"{where}, head {head}: the {width}-bit table does not ascend")
