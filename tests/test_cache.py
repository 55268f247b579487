"""Caches: what goes in comes out as the codec says, and every byte is counted."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from turboesm_kernels import cpu_compiled, dispatch, reference
from turboesm_kernels.operands import PreparedLayer

from turboesm_cli.cache.cache_file import CachedProtein, Packfile, StoredProtein, write_packfile
from turboesm_cli.cache.dense import DenseCache
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import (
    PackedCache,
    PackedCodec,
    check_tensors,
)
from turboesm_cli.codec.bundle import read_bundle, write_bundle
from turboesm_cli.codec.calibration import calibrate
from turboesm_cli.codec.fit import CodecSpec, fit
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.engine.jobs import new_cache
from turboesm_cli.engine.prefill import cache_protein
from turboesm_cli.errors import BundleError
from turboesm_cli.models import forward
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.loading import load_model
from turboesm_cli.outputs.archive import to_bytes
from turboesm_cli.outputs.files import file_sha256
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens
from turboesm_cli.statistics.collect import collect

BITS = [2, 3, 4]
WIDTHS = [16, 24, 32, 64, 128]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_tiny_model) -> dict[int, EsmModel]:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("widths")
    paths = {d: save_tiny_model(folder / f"{d}.pt", layers=2, width=2 * d) for d in WIDTHS}
    return {d: load_model(str(path), "cpu") for d, path in paths.items()}


@pytest.fixture(scope="module")
def statistics(models: dict[int, EsmModel], calibration_proteins: list[Protein]) -> dict[int, object]:
    return {d: collect(model, calibration_proteins[:20]) for d, model in models.items()}


def random_keys_values(model: EsmModel, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, model.shape.heads, tokens, model.shape.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def filled(
    model: EsmModel, spec: CodecSpec, tokens: int, parts: list[int]
) -> tuple[PackedCache, list[torch.Tensor]]:
    """A cache filled in parts, and the keys and values that went into layer 1."""
    cache = PackedCache(model, spec, 1, tokens)
    k, v = random_keys_values(model, tokens)
    ids = torch.randint(4, 24, (1, tokens), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, *parts]).cumsum(0).tolist()
    for start, stop in pairwise(bounds):
        cache.begin(stop - start)
        for layer in range(model.shape.layers):
            cache.append(layer, k[:, :, start:stop], v[:, :, start:stop], ids[:, start:stop])
    return cache, [k, v]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", WIDTHS)
def test_round_trip_is_exact_and_bytes_are_counted(
    models: dict[int, EsmModel], statistics: dict[int, object], head_dim: int, bits: int
) -> None:
    model = models[head_dim]
    spec = fit(model, statistics[head_dim], replace(RECIPES["flat"], bits_k=bits, bits_v=bits))  # type: ignore[arg-type]
    cache, (k, v) = filled(model, spec, 11, [1, 4, 1, 5])
    whole, _ = filled(model, spec, 11, [11])
    expected = PackedCodec(spec, torch.device("cpu")).roundtrip(1, k, v, forward.rope_at(model, 0, 11))
    for found, again, wanted in zip(cache.keys_values(1), whole.keys_values(1), expected, strict=True):
        assert torch.equal(found, again)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5)  # products of other shapes round otherwise
    assert cache.nbytes == spec.size.sequence_bytes(11) == sum(t.nbytes for t in cache.tensors.values())
    codes = sum(t.nbytes for name, t in cache.tensors.items() if name.endswith("codes"))
    assert codes == 2 * 2 * model.shape.heads * 10 * head_dim * bits // 8  # dense: no bit is wasted


def test_payload_by_hand(models: dict[int, EsmModel], statistics: dict[int, object]) -> None:
    spec = fit(models[64], statistics[64], RECIPES["flat"])  # type: ignore[arg-type]
    one_side = 24 * 1023 + 1023 + 2 * 64  # 3 bits of 64 channels, a scale byte, one sink in float16
    assert spec.size.sequence_bytes(1024) == 4 + 2 * 2 * 2 * one_side
    assert 4 * spec.size.numbers(1024) == 2 * 2 * 2 * 64 * 1024 * 4


@pytest.mark.parametrize("sinks", range(5))
def test_sinks_are_kept_in_float16(models: dict[int, EsmModel], statistics: dict[int, object], sinks: int) -> None:
    model = models[16]
    spec = fit(model, statistics[16], replace(RECIPES["flat"], sinks=sinks))  # type: ignore[arg-type]
    cache, (k, v) = filled(model, spec, 9, [1, 2, 6])
    for found, exact in zip(cache.keys_values(1), (k, v), strict=True):
        assert torch.equal(found[:, :, :sinks], exact[:, :, :sinks].half().float())
        assert not torch.allclose(found[:, :, sinks:], exact[:, :, sinks:], atol=1e-3)


def test_a_prompt_shorter_than_the_sinks(models: dict[int, EsmModel], statistics: dict[int, object]) -> None:
    model = models[16]
    spec = fit(model, statistics[16], replace(RECIPES["flat"], sinks=4))  # type: ignore[arg-type]
    cache, (k, _v) = filled(model, spec, 2, [2])
    assert torch.equal(cache.keys_values(1)[0], k.half().float())


def test_attention_over_the_cache_is_attention_over_what_it_gives_back(
    models: dict[int, EsmModel], statistics: dict[int, object]
) -> None:
    model = models[24]
    spec = fit(model, statistics[24], RECIPES["paper"])  # type: ignore[arg-type]
    cache, _ = filled(model, spec, 7, [7])
    q = random_keys_values(model, 3, seed=5)[0]
    k, v = cache.keys_values(1)
    expected = reference.attend(q.double(), k.double(), v.double())
    assert torch.allclose(cache.attend(1, q).double(), expected, atol=1e-5)


def test_without_compiled_loops_the_same_is_held(
    models: dict[int, EsmModel], statistics: dict[int, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed one by one, and attended to, by look-up: as with numba but for ties and rounding."""
    pytest.importorskip("numba")
    model = models[24]
    q = random_keys_values(model, 3, seed=5)[0]
    found = []
    for reason in (None, "numba is not installed"):
        monkeypatch.setattr(cpu_compiled, "problem", lambda reason=reason: reason)
        spec = fit(model, statistics[24], RECIPES["auto"])  # type: ignore[arg-type]
        cache, _ = filled(model, spec, 9, [4, 1, 1, 1, 1, 1])
        found.append(cache.attend(1, q))
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4)


def test_values_in_tiles_are_saved_and_copied_as_those_in_planes_are(
    models: dict[int, EsmModel], statistics: dict[int, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the kernels read and write them; here what is done without."""
    model, tokens = models[64], 17
    spec = fit(model, statistics[64], RECIPES["flat"])  # type: ignore[arg-type]
    plain, _ = filled(model, spec, tokens, [tokens])
    monkeypatch.setattr(dispatch, "keeps_tiles", lambda layer: True)
    cache, copied = (PackedCache(model, spec, 3, tokens) for _ in range(2))
    one, other = cache.rows(1, 2), cache.rows(2, 3)
    assert cache.leading(tokens)["layers.1.v.codes"].dim() == 6
    one.load(plain.tensors, tokens)
    assert one.nbytes == plain.nbytes
    assert all(torch.equal(found, plain.tensors[name]) for name, found in one.tensors.items())
    some = {name: tensor.clone() for name, tensor in one.leading(11).items()}
    other.fill(some, 11)
    copied.take(cache, torch.tensor([2, 1, 1]))
    for held, length in ((one, tokens), (other, 11), (copied.rows(0, 1), 11), (copied.rows(2, 3), tokens)):
        assert held.length == length
        for found, wanted in zip(held.keys_values(1), plain.keys_values(1), strict=True):
            assert torch.allclose(found, wanted[:, :, :length], rtol=0, atol=1e-5)  # another shape's rounding
    one.wipe(tokens)
    assert not one.tensors["layers.1.v.codes"].any() and other.tensors["layers.1.v.codes"].any()


def test_truncate_forgets(models: dict[int, EsmModel], statistics: dict[int, object]) -> None:
    model = models[16]
    spec = fit(model, statistics[16], RECIPES["flat"])  # type: ignore[arg-type]
    cache, _ = filled(model, spec, 9, [9])
    once, _ = filled(model, spec, 9, [9])
    cache.truncate(6)
    assert cache.length == 6 and cache.keys_values(0)[0].shape[2] == 6
    k, v = random_keys_values(model, 9)
    cache.begin(3)
    for layer in range(2):
        cache.append(layer, k[:, :, 6:], v[:, :, 6:], torch.zeros(1, 3, dtype=torch.int64))
    assert torch.equal(cache.keys_values(1)[0], once.keys_values(1)[0])


@pytest.mark.parametrize("form", ["packed", "fp16", "int8", "fp8"])
def test_what_is_wiped_is_zero(form: str, tiny: EsmModel, calibration_proteins: list[Protein]) -> None:
    """Of so many tokens, whatever was there; the cache is empty."""
    spec = calibrate(tiny, calibration_proteins[:12], RECIPES["flat"]).spec
    cache = new_cache(tiny, spec, form, 2, 24)
    cache.begin(20)
    for tensor in cache.leading(24).values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
    cache.wipe(20)
    assert cache.length == 0 and not cache.lengths.any()
    for name, tensor in cache.leading(20).items():
        assert name == "unmasked" or not tensor.float().any(), name
    left = [
        tensor.float().nan_to_num(1.0).any() for name, tensor in cache.leading(24).items() if name != "unmasked"
    ]
    assert any(left)


def test_a_step_that_is_wiped_leaves_nothing(models: dict[int, EsmModel], statistics: dict[int, object]) -> None:
    """What is made of a sink goes to packed token 0 until a token comes that belongs there."""
    spec = fit(models[16], statistics[16], replace(RECIPES["flat"], sinks=4))  # type: ignore[arg-type]
    cache = PackedCache(models[16], spec, 2, 9)
    forward.step(models[16], torch.tensor([5, 6]), cache)
    assert cache.leading(5)["layers.1.v.codes"].any()
    cache.wipe(1)
    assert not any(tensor.float().any() for name, tensor in cache.leading(9).items() if name != "unmasked")


def test_a_full_cache_says_so(models: dict[int, EsmModel], statistics: dict[int, object]) -> None:
    spec = fit(models[16], statistics[16], RECIPES["flat"])  # type: ignore[arg-type]
    cache, _ = filled(models[16], spec, 4, [4])
    with pytest.raises(ValueError, match="do not fit"):
        cache.begin(4)


needs_loops = pytest.mark.skipif(cpu_compiled.problem() is not None, reason=f"{cpu_compiled.problem()}")


@pytest.fixture
def stepped(models: dict[int, EsmModel], statistics: dict[int, object]) -> PackedCache:
    """A cache that has made ready what its steps do."""
    spec = fit(models[16], statistics[16], RECIPES["waterfill"])  # type: ignore[arg-type]
    cache, _ = filled(models[16], spec, 16, [8, *[1] * 3])
    forward.step(models[16], torch.tensor([5]), cache)
    return cache


@needs_loops
def test_what_does_not_fit_is_refused_before_it_is_written(
    stepped: PackedCache, models: dict[int, EsmModel]
) -> None:
    """Loops write wherever addresses say."""
    with pytest.raises(ValueError, match="for"):
        forward.step(models[16], torch.tensor([5, 6, 7]), stepped)
    q = torch.randn(1, 2, 1, 16)
    for wrong in (q[..., :8], q.expand(50, 2, 1, 16), torch.randn(1, 4, 1, 16), q.long(), q.to("meta")):
        with pytest.raises(ValueError, match="queries"):
            stepped.attend(1, wrong)
    stepped.begin(stepped.capacity - stepped.length)
    before = {name: tensor.clone() for name, tensor in stepped.tensors.items()}
    stepped.begin(0)  # no room is made, and a token comes all the same
    with pytest.raises(ValueError, match="do not fit"):
        stepped.append(1, q, q, torch.tensor([[5]]))
    assert all(torch.equal(before[name], tensor) for name, tensor in stepped.tensors.items())


@needs_loops
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_memory_of_its_own(stepped: PackedCache, models: dict[int, EsmModel], twin: Any) -> None:
    other = twin(stepped)
    before = {name: tensor.clone() for name, tensor in stepped.tensors.items()}
    k, v = random_keys_values(models[16], 1, seed=3)
    other.begin(1)
    other.append(1, k, v, torch.tensor([[5]]))
    assert all(torch.equal(before[name], tensor) for name, tensor in stepped.tensors.items())
    stepped.begin(1)
    stepped.append(1, k, v, torch.tensor([[5]]))
    assert all(torch.equal(other.tensors[name], tensor) for name, tensor in stepped.tensors.items())
    assert not torch.equal(before["layers.1.k.codes"], stepped.tensors["layers.1.k.codes"])


@needs_loops
def test_buffers_that_move_are_found_again(stepped: PackedCache, models: dict[int, EsmModel]) -> None:
    alone = copy.deepcopy(stepped)
    for tensor in stepped.tensors.values():
        tensor.share_memory_()
    for cache in (alone, stepped):
        k, v = random_keys_values(models[16], 1, seed=3)
        cache.begin(1)
        cache.append(1, k, v, torch.tensor([[5]]))
    assert all(torch.equal(alone.tensors[name], tensor) for name, tensor in stepped.tensors.items())
    assert torch.equal(stepped.attend(1, k), alone.attend(1, k))


@needs_loops
def test_torchs_default_dtype_changes_nothing(
    stepped: PackedCache, models: dict[int, EsmModel], statistics: dict[int, object]
) -> None:
    layer = fit(models[16], statistics[16], RECIPES["waterfill"]).layers[1]  # type: ignore[arg-type]
    assert layer is not None
    q = torch.randn(1, 2, 1, 16)
    expected = stepped.attend(1, q)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(stepped.attend(1, q), expected)
        again = PreparedLayer.of(layer.k, layer.v)
        for side in (again.k, again.v):
            assert side.loops is not None
            assert {x.dtype for x in (side.loops.map, side.loops.middle, side.loops.factors)} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_layer_may_keep_tokens_alone(tiny: EsmModel, calibration_proteins: list[Protein]) -> None:
    recipe = replace(RECIPES["flat"], exact_first=True)
    spec = fit(tiny, collect(tiny, calibration_proteins[:12]), recipe)
    tokens = to_tokens([Protein("a", "", "MKTAYIAKQR")], tiny)
    cache, dense = PackedCache(tiny, spec, 1, 12), DenseCache(tiny, 1, 12, FORMATS["fp32"])
    with torch.no_grad():
        forward.prefill(tiny, tokens, cache)
        forward.prefill(tiny, tokens, dense)
        q = random_keys_values(tiny, 1)[0]
        assert torch.allclose(cache.attend(0, q), dense.attend(0, q), atol=1e-5)
    assert cache.tensors["layers.0.tokens"].nbytes == 12
    assert cache.nbytes == spec.size.sequence_bytes(12)


def test_tables_are_counted_apart(tiny: EsmModel, calibration_proteins: list[Protein]) -> None:
    spec = fit(tiny, collect(tiny, calibration_proteins[:12]), RECIPES["flat"])
    tables = 14 * 2  # of 1, 2 and 3 bits: levels and thresholds
    assert spec.size.shared_bytes == 2 * 2 * 2 * 4 * (16 + 16 * 16 * 2 + 16 + tables)


@pytest.fixture
def on_disk(tiny: EsmModel, calibration_proteins: list[Protein], tmp_path: Path):  # type: ignore[no-untyped-def]
    bundle = calibrate(tiny, calibration_proteins[:12], RECIPES["flat"])
    write_bundle(tmp_path / "b.tqz", bundle)
    proteins = calibration_proteins[:3]
    items = [
        CachedProtein(protein, 5 + index, to_bytes(cache_protein(tiny, bundle.spec, protein, 5 + index).tensors))
        for index, protein in enumerate(proteins)
    ]
    write_packfile(tmp_path / "c.tqkv", bundle, file_sha256(tmp_path / "b.tqz"), items)
    return tmp_path, bundle, items


def cache_of(stored: StoredProtein, model: EsmModel, spec: CodecSpec) -> PackedCache:
    cache = PackedCache(model, spec, 1, stored.protein.residues + 2)
    cache.load(stored.read(), stored.cached)
    return cache


def test_caches_come_back_from_disk_to_the_byte(on_disk, tiny: EsmModel) -> None:  # type: ignore[no-untyped-def]
    folder, bundle, items = on_disk
    with Packfile(folder / "c.tqkv", bundle, file_sha256(folder / "b.tqz")) as file:
        for item, back in zip(items, file, strict=True):
            assert (back.protein.sequence, back.cached) == (item.protein.sequence, item.cached)
            cache = cache_of(back, tiny, bundle.spec)
            assert all(
                torch.equal(cache.leading(item.cached)[name], t)
                for name, t in safetensors.torch.load(item.data).items()
            )
            assert back.nbytes == item.nbytes == sum(t.nbytes for t in back.read().values())


def test_decoding_goes_on_from_disk_as_from_memory(on_disk, tiny: EsmModel) -> None:  # type: ignore[no-untyped-def]
    folder, bundle, items = on_disk
    with Packfile(folder / "c.tqkv", bundle, file_sha256(folder / "b.tqz")) as file:
        back = next(iter(file))
        stored = cache_of(back, tiny, bundle.spec)
    tokens = to_tokens([back.protein], tiny)
    live = cache_protein(tiny, bundle.spec, back.protein, 5, room=tokens.shape[1])
    with torch.no_grad():
        expected = forward.replay(tiny, tokens[:, 5:], live)
        found = forward.replay(tiny, tokens[:, 5:], stored)
    assert torch.equal(found, expected)
    assert items[0].cached == back.cached


def test_caches_of_another_bundle_are_refused(on_disk) -> None:  # type: ignore[no-untyped-def]
    folder, bundle, _items = on_disk
    with pytest.raises(BundleError, match="packed with another bundle"):
        Packfile(folder / "c.tqkv", bundle, "0" * 64)


def test_caches_that_do_not_fit_are_refused(on_disk) -> None:  # type: ignore[no-untyped-def]
    folder, bundle, items = on_disk
    wrong = CachedProtein(Protein("x", "", "MKTAYIAKQRQISF"), 5, items[2].data)  # 7 tokens called 5
    write_packfile(folder / "d.tqkv", bundle, file_sha256(folder / "b.tqz"), [wrong])
    with Packfile(folder / "d.tqkv", bundle, file_sha256(folder / "b.tqz")) as file:
        (stored,) = file
        with pytest.raises(BundleError, match="damaged"):
            stored.read()


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("layers.0.tokens", lambda tensor: tensor + 200, "no token of ESM-2"),
        ("layers.1.k.sinks", lambda tensor: tensor * torch.nan, "not finite"),
        ("unmasked", lambda tensor: tensor * torch.inf, "not finite"),
        ("unmasked", lambda tensor: tensor * 0, "not in 0..1"),
    ],
)
def test_caches_with_what_no_cache_holds_are_refused(name: str, change: Any, reason: str) -> None:
    golden = Path(__file__).parent / "golden" / "auto-v1.tqz"
    bundle = read_bundle(golden)
    with Packfile(golden.with_suffix(".tqkv"), bundle, file_sha256(golden)) as file:
        stored = next(iter(file))
        tensors = stored.read()
    check_tensors(bundle.spec, bundle.alphabet, tensors, stored.cached)
    with pytest.raises(ValueError, match=reason):
        check_tensors(bundle.spec, bundle.alphabet, tensors | {name: change(tensors[name])}, stored.cached)
