"""The same numbers on a CUDA device as on the CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turboesm_cli import decode
from turboesm_cli.cache import PackedCache, PackedCodec
from turboesm_cli.calibration import calibrate
from turboesm_cli.codec import RECIPES
from turboesm_cli.model import EsmModel, load_model
from turboesm_cli.sequences import Protein
from turboesm_cli.stats import collect, to_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def on_gpu(tiny_path: Path) -> EsmModel:
    torch.backends.cuda.matmul.allow_tf32 = False
    return load_model(str(tiny_path), "cuda")


def test_hidden_states(tiny: EsmModel, on_gpu: EsmModel, peptides: list[Protein]) -> None:
    with torch.no_grad():
        expected = decode.encode(tiny, to_tokens(peptides[:3], tiny.device))
        found = decode.encode(on_gpu, to_tokens(peptides[:3], on_gpu.device)).cpu()
    assert torch.allclose(found, expected, atol=1e-4)


def test_statistics(tiny: EsmModel, on_gpu: EsmModel, calibration_proteins: list[Protein]) -> None:
    expected, found = (collect(model, calibration_proteins[:8]) for model in (tiny, on_gpu))
    assert torch.equal(expected.sample.hashes, found.sample.hashes)
    for a, b in zip(expected.layers, found.layers, strict=True):
        assert torch.allclose(a.key_key, b.key_key, rtol=1e-3, atol=1e-1)


def test_packed_decode(tiny: EsmModel, on_gpu: EsmModel, calibration_proteins: list[Protein]) -> None:
    spec = calibrate(on_gpu, calibration_proteins[:12], RECIPES["flat"]).spec
    tokens = to_tokens(calibration_proteins[:1], on_gpu.device)[:, :40]
    with torch.no_grad():
        cache = PackedCache(on_gpu, spec, 1, 40)
        decode.prefill(on_gpu, tokens[:, :20], cache)
        stepped = decode.replay(on_gpu, tokens[:, 20:], cache)
        passed = decode.teacher_forced(on_gpu, tokens, [20], PackedCodec(spec, on_gpu.device))[:, 20:]
    assert torch.nn.functional.cosine_similarity(stepped, passed, dim=-1).min() > 0.999
