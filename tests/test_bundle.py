"""Bundles: round trip, and refusal of everything that is not as it should be."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from turboesm_cli.cache.packed import PackedCodec
from turboesm_cli.codec.bundle import Bundle, read_bundle, write_bundle
from turboesm_cli.codec.calibration import calibrate
from turboesm_cli.codec.header import KIND, PART, VERSION, seen
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.errors import BundleError, TurboESMError
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.forward import rope_at
from turboesm_cli.models.loading import load_model
from turboesm_cli.outputs.archive import MANIFEST, new_archive
from turboesm_cli.sequences.fasta import Protein


@pytest.fixture(scope="module", params=list(RECIPES))
def bundle(request: pytest.FixtureRequest, tiny: EsmModel, calibration_proteins: list[Protein]) -> Bundle:
    return calibrate(tiny, calibration_proteins[:12], RECIPES[request.param])


@pytest.fixture(scope="module")
def calibrated(tiny: EsmModel, calibration_proteins: list[Protein]) -> Bundle:
    return calibrate(tiny, calibration_proteins[:12], RECIPES["flat"])


@pytest.fixture
def flat(calibrated: Bundle, tmp_path: Path) -> Path:
    write_bundle(tmp_path / "flat.tqz", calibrated)
    return tmp_path / "flat.tqz"


def test_a_bundle_comes_back_as_it_was(bundle: Bundle, tiny: EsmModel, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b.tqz", bundle)
    found = read_bundle(tmp_path / "b.tqz")
    assert replace(found, spec=bundle.spec) == bundle
    assert found.spec.recipe == bundle.spec.recipe
    k = torch.randn(1, 2, 6, 16)
    for layer in range(2):
        for a, b in zip(
            PackedCodec(found.spec, torch.device("cpu")).roundtrip(layer, k, k, rope_at(tiny, 0, 6)),
            PackedCodec(bundle.spec, torch.device("cpu")).roundtrip(layer, k, k, rope_at(tiny, 0, 6)),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_the_same_bundle_gives_the_same_bytes(
    tiny: EsmModel, calibration_proteins: list[Protein], tmp_path: Path
) -> None:
    shuffled = list(reversed(calibration_proteins[:12]))
    for name, proteins in (("a", calibration_proteins[:12]), ("b", shuffled)):
        write_bundle(tmp_path / name, calibrate(tiny, proteins, RECIPES["flat"]))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_bundle_knows_its_calibration_set(
    bundle: Bundle, calibration_proteins: list[Protein], peptides: list[Protein]
) -> None:
    assert bundle.calibration.proteins == 12
    assert seen(bundle, calibration_proteins[:14]) == calibration_proteins[:12]
    assert seen(bundle, peptides) == []


def test_a_bundle_for_another_model_is_refused_by_name(
    bundle: Bundle, tmp_path: Path, save_tiny_model: Callable[..., Path]
) -> None:
    other = load_model(str(save_tiny_model(tmp_path / "other.pt", seed=7)), "cpu")
    with pytest.raises(BundleError, match=r"b.tqz was calibrated for tiny, not for other"):
        bundle.check_model(other, "b.tqz")


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """The bundle with a change, its hashes made right again: what a forger would do."""
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read(MANIFEST))
        tensors = safetensors.torch.load(archive.read(PART))
    change(manifest, tensors)
    kept = {k: v for k, v in manifest.items() if k not in ("format", "format_version", "tool_version", "parts")}
    with new_archive(path, KIND, VERSION) as archive:
        archive.manifest = kept
        archive.add(PART, [safetensors.torch.save(tensors)])


def set_tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def change(_manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[name])

    return change


def set_manifest(*path: str | int, to: Any) -> Callable[..., None]:
    def change(manifest: dict[str, Any], _tensors: dict[str, torch.Tensor]) -> None:
        inner: Any = manifest
        for key in path[:-1]:
            inner = inner[key]
        if to is KeyError:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to

    return change


K0 = ("layers", 0, "k")
FORGERIES = {
    "nan-table": set_tensor("layers.0.k.levels", lambda t: t * torch.nan),
    "unsorted-table": set_tensor("layers.0.k.thresholds", lambda t: -t),
    "wrong-shape": set_tensor("layers.1.v.synthesis", lambda t: t[:, :-1].contiguous()),
    "wrong-dtype": set_tensor("layers.1.v.centre", lambda t: t.double()),
    "infinite-rotation": set_tensor("layers.1.k.analysis", lambda t: t / 0),
    "zero-deviation": set_tensor("layers.0.v.deviation", lambda t: t * 0),
    "other-head-dim": set_manifest("model", "width", to=64),
    "huge-model": set_manifest("model", "layers", to=10**9),
    "missing-model": set_manifest("model", to=KeyError),
    "too-few-layers": set_manifest("layers", to=[]),
    "width-9": set_manifest(*K0, "profiles", 0, "widths", to=[9] * 16),
    "too-many-bits": set_manifest(*K0, "profiles", 0, "nbytes", to=1),
    "no-profile": set_manifest(*K0, "profiles", to=[]),
    "profile-of-no-head": set_manifest(*K0, "profile_of_head", to=[0]),
    "profile-out-of-range": set_manifest(*K0, "profile_of_head", to=[0, 7]),
    "unknown-scale": set_manifest(*K0, "scale", to="cubic"),
    "bad-calibration": set_manifest("calibration", to=3),
    "later-layer-without-codec": set_manifest("layers", 1, to=None),
    "negative-sinks": set_manifest("recipe", "sinks", to=-5),
    "text-for-bits": set_manifest("recipe", "bits_k", to="x"),
    "terabytes-of-codes": set_manifest(*K0, "profiles", 0, "nbytes", to=10**12),
    "text-for-a-layer": set_manifest("layers", 1, to="flat"),
}


@pytest.mark.parametrize("kind", list(FORGERIES))
def test_forged_bundles_are_one_line_errors(flat: Path, kind: str) -> None:
    rewrite(flat, FORGERIES[kind])
    with pytest.raises(TurboESMError) as caught:
        read_bundle(flat)
    assert "\n" not in str(caught.value) and str(flat) in str(caught.value)


def with_zip(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], compress: bool = False) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in change(members).items():
            archive.writestr(name, data)


def in_manifest(members: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    return members | {MANIFEST: json.dumps(json.loads(members[MANIFEST]) | changes).encode()}


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


ZIPS: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "future-version": (lambda m: in_manifest(m, format_version=2), "format version 2"),
    "text-version": (lambda m: in_manifest(m, format_version="1"), "format version 1"),
    "another-kind": (lambda m: in_manifest(m, format="turboesm-caches"), "is a turboesm-caches file"),
    "no-manifest": (lambda m: {PART: m[PART]}, "no readable manifest"),
    "manifest-is-a-list": (lambda m: m | {MANIFEST: b"[]"}, "foreign"),
    "manifest-is-text": (lambda m: m | {MANIFEST: b"hello"}, "no readable manifest"),
    "deep-manifest": (lambda m: m | {MANIFEST: b"[" * 100_000}, "no readable manifest"),
    "unlisted-part": (lambda m: m | {"more": b""}, "not those that the manifest lists"),
    "missing-part": (lambda m: {MANIFEST: m[MANIFEST]}, "not those that the manifest lists"),
    "flipped-bit": (lambda m: m | {PART: flip(m[PART], 5000)}, "differs from its sha256"),
    "longer-part": (lambda m: m | {PART: m[PART] + b"x"}, "bytes, the manifest says"),
    "parent-folder": (
        lambda m: (
            {"../evil": m[PART], **in_manifest(m, parts={"../evil": json.loads(m[MANIFEST])["parts"][PART]})}
            | {MANIFEST: in_manifest(m, parts={"../evil": json.loads(m[MANIFEST])["parts"][PART]})[MANIFEST]}
        ),
        "damaged",
    ),
}


@pytest.mark.parametrize("kind", list(ZIPS))
def test_damaged_archives_are_one_line_errors(flat: Path, kind: str) -> None:
    change, reason = ZIPS[kind]
    with_zip(flat, change)
    with pytest.raises(BundleError, match=reason) as caught:
        read_bundle(flat)
    assert "\n" not in str(caught.value)


def test_compressed_archives_are_refused(flat: Path) -> None:
    with_zip(flat, lambda m: m, compress=True)
    with pytest.raises(BundleError, match="compressed"):
        read_bundle(flat)


def test_a_part_named_twice_is_refused(flat: Path) -> None:
    with zipfile.ZipFile(flat, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(PART, b"")
    with pytest.raises(BundleError, match="there twice"):
        read_bundle(flat)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_cut_off_bundles_are_refused(flat: Path, share: float) -> None:
    data = flat.read_bytes()
    flat.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BundleError, match="cut off"):
        read_bundle(flat)


def test_every_flipped_bit_is_found_or_harmless(flat: Path) -> None:
    data, original = flat.read_bytes(), read_bundle(flat)
    for at in range(0, len(data), len(data) // 150):
        flat.write_bytes(flip(data, at))
        try:
            found = read_bundle(flat)
        except BundleError as error:
            assert "\n" not in str(error)
        else:  # a bit of the zip that nobody reads, or of the manifest's text
            for layer, same in zip(found.spec.layers, original.spec.layers, strict=True):
                assert layer is not None and same is not None
                assert all(torch.equal(layer.k.tensors[n], same.k.tensors[n]) for n in same.k.tensors)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no file"):
        read_bundle(tmp_path / "none.tqz")
    with pytest.raises(BundleError):
        read_bundle(tmp_path)
