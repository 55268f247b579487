"""Fixtures: a tiny ESM-2 with random weights, proteins, and the real checkpoints where they are at hand."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import esm
import pytest
import torch
from hypothesis import HealthCheck, settings

from turboesm_cli.codec.fit import CodecSpec, LayerSpec, fit
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.loading import load_model
from turboesm_cli.sequences.fasta import Protein, read_fasta
from turboesm_cli.statistics.collect import collect

ANY_SPEED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
"""A test says nothing of how busy the machine is."""

os.environ["HF_HUB_OFFLINE"] = "1"  # tests download nothing
os.environ["TURBOESM_FRONTIER"] = "0"  # nor do they try five budgets where one will do

settings.register_profile("house", **ANY_SPEED)
settings.register_profile("search", max_examples=20_000, print_blob=True, **ANY_SPEED)
settings.load_profile("house")  # --hypothesis-profile comes after

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"


def _checkpoint_path(name: str) -> Path:
    """A checkpoint of the folder $TURBOESM_CHECKPOINTS; the test is skipped where it is not there."""
    folder = os.environ.get("TURBOESM_CHECKPOINTS")
    path = Path(folder or ".") / name
    if not folder or not path.exists():
        pytest.skip(f"TURBOESM_CHECKPOINTS names no folder with {name}")
    return path


def save_tiny(path: Path, layers: int = 2, width: int = 32, heads: int = 2, seed: int = 0) -> Path:
    """A fair-esm checkpoint of an ESM-2 with random weights whose attention is far from uniform."""
    torch.manual_seed(seed)
    net = esm.ESM2(layers, width, heads)
    for layer in net.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 3
            projection.bias.data.normal_()
    settings = argparse.Namespace(
        arch="esm2",
        encoder_layers=layers,
        encoder_embed_dim=width,
        encoder_attention_heads=heads,
        token_dropout=True,
    )
    names = {"lm_head": "encoder."}
    state = {
        names.get(key.split(".")[0], "encoder.sentence_encoder.") + key: v for key, v in net.state_dict().items()
    }
    torch.save({"cfg": {"model": settings}, "model": state}, path)
    return path


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny.pt")


@pytest.fixture(scope="session")
def checkpoint_path() -> Callable[[str], Path]:
    return _checkpoint_path


@pytest.fixture(scope="session")
def save_tiny_model() -> Callable[..., Path]:
    return save_tiny


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> EsmModel:
    return load_model(str(tiny_path), "cpu")


@pytest.fixture(scope="session")
def embedded() -> EsmModel:
    return load_model("embedded", "cpu")


@pytest.fixture(scope="session")
def calibration_proteins() -> list[Protein]:
    return [p for p in read_fasta(DATA / "calibration" / "calibration.fasta") if p.residues <= 200]


@pytest.fixture(scope="session")
def peptides() -> list[Protein]:
    return list(read_fasta(DATA / "evaluation" / "peptide.fasta"))


@pytest.fixture(scope="session")
def specs(tiny: EsmModel, calibration_proteins: list[Protein]) -> dict[str, CodecSpec]:
    statistics = collect(tiny, calibration_proteins[:20])
    return {name: fit(tiny, statistics, recipe) for name, recipe in RECIPES.items()}


@pytest.fixture(scope="session")
def precise_specs(specs: dict[str, CodecSpec]) -> dict[str, CodecSpec]:
    """The codecs in float64, likewise."""
    return {name: replace(spec, layers=tuple(map(_in_double, spec.layers))) for name, spec in specs.items()}


def _in_double(layer: LayerSpec | None) -> LayerSpec | None:
    sides = [] if layer is None else [layer.k, layer.v]
    exact = [replace(side, **{name: tensor.double() for name, tensor in side.tensors.items()}) for side in sides]
    return LayerSpec(*exact) if exact else None


@pytest.fixture(scope="session")
def precise(tiny_path: Path) -> EsmModel:
    """The tiny model in float64, so that rounding does not tip a code over a threshold."""
    return load_model(str(tiny_path), "cpu").to(torch.device("cpu"), torch.float64)
