"""A codec on disk: the `.tqz` bundle.

manifest: model {name, fingerprint, layers, width, heads; family and further sizes where they are not ESM-2's};
tokens: those of an autoregressive model, see `decoder_alphabets`; recipe (every field); calibration {sha256,
proteins, tokens, sequences: the first 16 hex digits of each sequence's sha256; source: name of their file, where
there is one}; layers: for each, null (the layer keeps tokens) or {"k": SIDE, "v": SIDE} with SIDE {profiles:
[{widths, nbytes, lanes}], profile_of_head, scale}; choices: for each coded layer and side its bytes per vector,
its allocation and the errors predicted.
codec.safetensors: layers.I.{k,v}.{centre,analysis,deviation,synthesis,levels,thresholds}, and layers.I.k.centre_at
where positions are learned; see `turboesm_kernels.reference.SideSpec`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from turboesm_kernels.layout import SIDES
from turboesm_kernels.reference import SideSpec, table_slice

from turboesm_cli.codec.fit import CodecSpec, LayerSpec
from turboesm_cli.codec.header import (
    KIND,
    PART,
    VERSION,
    Calibration,
    check_recipe,
    check_tensor,
    damage_told,
    parse_header,
    profiles_of,
    tensor_name,
)
from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.codec.sizes import CodecSize, SideSize
from turboesm_cli.errors import BundleError, InputError, OutputError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.families import FIRST, alphabet_of
from turboesm_cli.models.protocol import Model, learned_positions
from turboesm_cli.models.shapes import Shape
from turboesm_cli.outputs.archive import Archive, new_archive, printable, to_bytes
from turboesm_cli.outputs.files import check_output

PROTEINS_LIMIT = 2_000_000
"""Calibration proteins: each takes 23 bytes of a manifest, which has to stay below `archive.MANIFEST_LIMIT`."""


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

    @property
    def size(self) -> CodecSize:
        """How large the codec and its caches are."""
        return self.spec.size

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


def check_storable(model_name: str, proteins: int, recipe: Recipe) -> None:
    """Raise InputError where a bundle could not be read back; to be asked before the work that a codec takes."""
    if proteins > PROTEINS_LIMIT:
        raise InputError(f"{proteins:,} calibration proteins, over {PROTEINS_LIMIT:,}; give --max-proteins")
    try:
        printable(model_name)
        check_recipe(recipe)
    except ValueError as error:
        raise InputError(f"no bundle can hold this: {error}; rename the model, or change the recipe") from error


def write_bundle(path: Path, bundle: Bundle, devices: str = "") -> None:
    """Write a bundle, whole or not at all. Raises OutputError.

    devices  those that it was learned on, where they are more than one: the manifest names them
    """
    calibration = described_calibration(bundle.calibration)
    described = {
        "model": {"name": bundle.model_name, "fingerprint": bundle.fingerprint, **bundle.shape.as_dict()}
        | ({"family": bundle.family} if bundle.family != FIRST else {}),
        "recipe": bundle.spec.recipe.as_dict(),
        "calibration": calibration,
        "layers": [None if layer is None else _describe(layer) for layer in bundle.spec.layers],
        "choices": list(bundle.spec.choices),
    } | ({"tokens": tokens} if (tokens := bundle.alphabet.described()) else {})
    tensors = {
        tensor_name(index, side, name): tensor
        for index, layer in enumerate(bundle.spec.layers)
        if layer is not None
        for side in SIDES
        for name, tensor in getattr(layer, side).tensors.items()
    }
    with new_archive(path, KIND, VERSION) as archive:
        archive.manifest = described | ({"devices": devices} if devices else {})
        archive.add(PART, [to_bytes(tensors)])


def described_calibration(calibration: Calibration) -> dict[str, Any]:
    """As manifests have it; see `header.parse_calibration`."""
    found = asdict(calibration) | {"sequences": sorted(calibration.sequences)}
    return found if calibration.source else {name: value for name, value in found.items() if name != "source"}


def read_bundle(path: Path) -> Bundle:
    """Read a bundle, with everything in it checked first. Raises BundleError."""
    with Archive(path, KIND, VERSION) as archive:
        manifest, tensors = archive.manifest, archive.read(PART) if PART in archive.parts else {}
    with damage_told(path):
        return _bundle(path, manifest, tensors)


def _bundle(path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Bundle:
    header = parse_header(path, manifest, tensors)
    size = header.size
    layers = tuple(
        layer and LayerSpec(*(_side(described[side.side], tensors, index, side) for side in layer))
        for index, (described, layer) in enumerate(zip(manifest["layers"], size.layers, strict=True))
    )
    choices = tuple(_choice(choice) for choice in manifest.get("choices", ()))
    return Bundle(
        header.model_name,
        header.fingerprint,
        header.shape,
        header.calibration,
        CodecSpec(header.recipe, layers, size.heads, size.head_dim, choices, size.kinds),
        header.family,
        header.alphabet,
    )


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


def _side(described: dict[str, Any], tensors: dict[str, Tensor], layer: int, size: SideSize) -> SideSpec:
    where = f"layer {layer}, {size.side}"
    own = {name: tensors[tensor_name(layer, size.side, name)] for name in size.tensors}
    for name, like in size.tensors.items():
        tensor = own[name]
        check_tensor(where, name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), like)
        if name != "thresholds" and not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: {name} is not finite")
    profiles, of_head = profiles_of(described), tuple(described["profile_of_head"])
    spec = SideSpec(size.side, profiles, of_head, scale=described["scale"], **own)
    _check_tables(spec, where)
    if not bool((spec.deviation > 0).all()):
        raise ValueError(f"{where}: a deviation is not positive")
    return spec


def _check_tables(spec: SideSpec, where: str) -> None:
    for head, index in enumerate(spec.profile_of_head):
        for width, _axes in spec.profiles[index].runs:
            thresholds = spec.thresholds[head, table_slice(width)]
            ascending = bool((thresholds[1:] >= thresholds[:-1]).all()) and bool(thresholds[:-1].isfinite().all())
            if not ascending:
                raise ValueError(f"{where}, head {head}: the {width}-bit table does not ascend")
