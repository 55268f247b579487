"""Files of earlier versions keep loading: bundles and caches that were committed when their version was written.

`tests/golden/*-v1.*` hold the tiny model's codecs and the caches of two peptides, `*-v2.tqkv` the same caches in
version 2. They are never made again: a later format gets files of its own beside them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from turboesm_kernels.reference import Rope, roundtrip

from turboesm_cli.cache.cache_file import CachedProtein, Packfile, write_packfile
from turboesm_cli.cache.inventory import facts_of
from turboesm_cli.cache.packed import PackedCache
from turboesm_cli.codec.bundle import read_bundle
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.outputs.archive import to_bytes
from turboesm_cli.outputs.files import file_sha256

GOLDEN = Path(__file__).parent / "golden"
BUNDLES = sorted(GOLDEN.glob("*.tqz"))
CACHES = sorted(GOLDEN.glob("*.tqkv"))
SHA256 = {
    "auto-v1.tqkv": "3e7b5949e783ac89",
    "auto-v1.tqz": "e2011e77fe4d4ddd",
    "auto-v2.tqkv": "0717cd70a129ed00",
    "flat-v1.tqkv": "3eb8a8b05d7753ed",
    "flat-v1.tqz": "a41c6e8d0b7827b5",
    "flat-v2.tqkv": "1d821250c8f88c28",
    "paper-v1.tqkv": "52554b79528e079c",
    "paper-v1.tqz": "e429811efaf3cf82",
    "paper-v2.tqkv": "6606221cd985dfa3",
}
ROUNDTRIPS = {
    "auto-v1": [97.144, 93.074],
    "flat-v1": [90.867, 92.357],
    "paper-v1": [98.366, 94.05],
}
CACHED = {
    "auto-v1": [998.907, 331.439, 716.444, 214.344],
    "flat-v1": [982.41, 329.758, 707.166, 214.287],
    "paper-v1": [995.988, 331.769, 712.237, 214.905],
}


def test_there_are_golden_files_of_every_version() -> None:
    names = ("auto", "flat", "paper")
    assert [path.stem for path in BUNDLES] == [f"{name}-v1" for name in names]
    assert [path.stem for path in CACHES] == [f"{name}-v{version}" for name in names for version in (1, 2)]


def test_golden_files_are_the_ones_that_were_committed() -> None:
    assert {path.name: facts_of(path)["sha256"][:16] for path in sorted(GOLDEN.iterdir())} == SHA256


def sums(tensors: list[torch.Tensor]) -> list[float]:
    return [round(float(x.double().abs().sum()), 3) for x in tensors]


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.stem)
def test_a_golden_bundle_codes_as_it_did(path: Path) -> None:
    bundle = read_bundle(path)
    layer = bundle.spec.layers[1]
    assert layer is not None
    d = bundle.spec.head_dim
    x = torch.linspace(-2, 2, 2 * 3 * d).view(1, 2, 3, d)
    frequencies = 1.0 / 10000 ** (torch.arange(0, d, 2).float() / d)
    back = [roundtrip(x, layer.k, Rope.at(torch.arange(3), frequencies)), roundtrip(x, layer.v)]
    assert sums(back) == pytest.approx(ROUNDTRIPS[path.stem], abs=2e-3)


def bundle_of(caches: Path) -> Path:
    return GOLDEN / f"{caches.stem.split('-')[0]}-v1.tqz"


@pytest.mark.parametrize("path", CACHES, ids=lambda path: path.stem)
def test_golden_caches_hold_what_they_did(path: Path, tiny: EsmModel) -> None:
    bundle, facts = read_bundle(bundle_of(path)), facts_of(path)
    assert facts["format_version"] == int(path.stem[-1])
    with Packfile(path, bundle, file_sha256(bundle_of(path))) as stored:
        proteins = list(stored)
        assert [protein.protein.accession for protein in proteins] == ["one", "two"]
        assert facts["proteins"] == len(stored) == 2
        assert facts["tokens"] == sum(protein.cached for protein in proteins) == 30
        held = []
        for protein in proteins:
            cache = PackedCache(tiny, bundle.spec, 1, protein.cached)
            cache.load(protein.read(), protein.cached)
            held += list(cache.keys_values(1))
    assert sums(held) == pytest.approx(CACHED[bundle_of(path).stem], abs=5e-3)


@pytest.mark.parametrize("name", ["auto", "flat", "paper"])
def test_the_same_caches_give_the_same_parts(name: str, tmp_path: Path) -> None:
    bundle = GOLDEN / f"{name}-v1.tqz"
    with Packfile(GOLDEN / f"{name}-v1.tqkv") as file:
        items = [CachedProtein(item.protein, item.cached, to_bytes(item.read())) for item in file]
    write_packfile(tmp_path / "c.tqkv", read_bundle(bundle), file_sha256(bundle), items)
    assert facts_of(tmp_path / "c.tqkv")["parts"] == facts_of(GOLDEN / f"{name}-v2.tqkv")["parts"]
