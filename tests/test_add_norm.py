"""Sums with their norms, products of few rows, gated ones: torch's numbers, and models that compute the same.

On a CPU the kernels run in Triton's interpreter, in a child process that has TRITON_INTERPRET set before Triton is
imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter import run_interpreted
from torch import Tensor

from turboesm_cli.models import forward, norms, random_shapes
from turboesm_cli.models.decoder import Decoder
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.loading import load_model
from turboesm_cli.models.norms import Norm
from turboesm_cli.models.protocol import Model
from turboesm_cli.models.shapes import Shape
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the child process of test_interpreter")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [(1,), (2, 1), (1, 3), (2, 2), (5,)]
WIDTHS = [1, 20, 320, 1280, 1281]
KINDS = ["layer norm", "rms norm"]
INNER = [1, 40, 1024, 1500]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the child process")
def test_interpreter() -> None:
    """Run the tests below on the CPU: Triton reads TRITON_INTERPRET when it is imported."""
    run_interpreted(__file__)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New buffers are full of NaN."""
    monkeypatch.setattr(torch, "empty", lambda shape, **kinds: torch.full(shape, torch.nan, **kinds))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """Found is exact, float64, but for its dtype's rounding and float32's within."""
    step = torch.finfo(found.dtype).eps
    assert torch.allclose(found.double(), exact, rtol=step, atol=1e-5), (found.double() - exact).abs().max()


def norm_of(kind: str, width: int, dtype: torch.dtype, device: str) -> Norm:
    weight, bias = ((1 + 0.3 * numbers(2, width, seed=9)).to(device, dtype)).unbind()
    return Norm(weight, None if kind == "rms norm" else bias, 1e-5)


def check_sum(x: Tensor, y: Tensor, norm: Norm) -> None:
    from turboesm_kernels.add_norm import add_norm

    total, normed = add_norm(x, y, *norm)
    assert total.dtype == normed.dtype == x.dtype and total.shape == normed.shape == x.shape
    if INTERPRETED and x.dtype == torch.bfloat16:  # which Triton's interpreter rounds towards 0
        assert_rounded(total, x.double() + y.double())
    else:
        assert torch.equal(total, x + y)
    bias = None if norm.bias is None else norm.bias.double()
    assert_rounded(normed, Norm(norm.weight.double(), bias, norm.epsilon)(total.double()))


def check_sums(
    kind: str, width: int, dtype: torch.dtype, shapes: list[tuple[int, ...]], device: str = "cpu"
) -> None:
    norm = norm_of(kind, width, dtype, device)
    for shape in shapes:
        x, y = (numbers(*shape, width, seed=seed).to(device, dtype) for seed in range(2))
        check_sum(x, y, norm)
    wide = numbers(2, 2 * width + 5, seed=20).to(device, dtype)
    check_sum(wide[:, 1 : width + 1], wide[:, 3 : width + 3], norm)  # strided rows
    check_sum(wide[:, 1 : 2 * width + 1 : 2], wide[:, :width], norm)  # strided channels
    check_sum(10 * wide[:, :width] + 50, wide[:, 2 : width + 2], norm)  # a mean far from 0


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "rows"), list(zip(WIDTHS, ROWS, strict=True)))
@pytest.mark.parametrize("kind", KINDS)
def test_sums(kind: str, width: int, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    check_sums(kind, width, dtype, [rows])


@pytest.mark.gpu
@no_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 2049, 5120, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_on_gpu(kind: str, width: int, dtype: torch.dtype) -> None:
    check_sums(kind, width, dtype, [*ROWS, (300,)], "cuda")


PRODUCTS = [(3, 40, 72), (64, 130, 328), (1, 7, 8), (17, 64, 2576)]
"""Rows, columns, depth: of 1, 2 and 8 parts; the last part and blocks that are not full."""

EXACT = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def check_product(size: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> None:
    """A product, activated, and in parts that `add_norm` sums; rows that do not lie beside each other."""
    from turboesm_kernels.add_norm import WIDEST, add_norm
    from turboesm_kernels.linear import ACTIVATIONS, linear, linear_parts

    rows, width, depth = size
    x = numbers(rows, depth + 8, seed=1).to(device, dtype)[:, :depth]
    weight = (2 * numbers(width, depth, seed=2) / depth**0.5).to(device, dtype)
    bias = numbers(width, seed=3).to(device, dtype)
    exact = x.double() @ weight.double().T
    step = 2 * torch.finfo(dtype).eps  # the product is rounded, then what is made of it
    assert set(EXACT) == set(ACTIVATIONS)
    for name, own in ((name, own) for name in EXACT for own in (bias, None)):
        wanted = EXACT[name](exact if own is None else exact + own.double())
        found = linear(x, weight, own, name)
        assert found.dtype == dtype and found.shape == (rows, width)
        assert torch.allclose(found.double(), wanted, rtol=step, atol=step), (name, found.double() - wanted)
    parts = linear_parts(x[None], weight, bias)
    assert parts.dtype == torch.float32 and parts.shape[1:] == (1, rows, width)
    assert torch.allclose(parts.double().sum(0)[0], exact + bias.double(), rtol=1e-5, atol=1e-5)
    if width > WIDEST:
        return
    norm, before = norm_of("layer norm", width, dtype, device), numbers(1, rows, width, seed=4).to(device, dtype)
    total, normed = add_norm(before, parts, *norm)
    assert_rounded(total, before.double() + parts.double().sum(0))
    wide = Norm(norm.weight.double(), norm.weight.new_zeros(width).double() + norm.bias.double(), norm.epsilon)
    assert_rounded(normed, wide(total.double()))


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", PRODUCTS, ids=str)
def test_products_of_few_rows(size: tuple[int, int, int]) -> None:
    check_product(size, torch.float16)


@pytest.mark.gpu
@no_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [*PRODUCTS, (8, 1280, 5120), (64, 5120, 1280), (33, 50264, 768)], ids=str)
def test_products_of_few_rows_on_gpu(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_product(size, dtype, "cuda")


def test_parts_cover_the_depth() -> None:
    pytest.importorskip("triton")
    from turboesm_kernels.linear import MOST_PARTS, PART_BLOCK, part_size, parts_of

    for width in (1, 64, 1280, 5120, 60000):
        for depth in range(8, 12000, 8):
            parts = parts_of(width, depth)
            each = part_size(depth, parts)
            assert 1 <= parts <= MOST_PARTS and each % PART_BLOCK == 0
            assert parts * each >= depth > (parts - 1) * each, (width, depth)


@interpreted
def test_what_does_not_fit_together_is_refused() -> None:
    from turboesm_kernels.add_norm import WIDEST, add_norm
    from turboesm_kernels.linear import MOST_ROWS, linear

    half = numbers(2, 16).half()
    for x, weight in (
        (half, half[:, :8]),
        (half.float(), half.float()),
        (half[:1].expand(MOST_ROWS + 1, 16), half),
    ):
        with pytest.raises(ValueError, match="no product"):
            linear(x, weight, None)
    with pytest.raises(ValueError, match="no activation 'swish'"):
        linear(half, half, None, "swish")

    x, weight = numbers(2, 8), numbers(8)
    wide = numbers(1, WIDEST + 1)
    for one, other, own in ((x, x[:1], weight), (x, x.half(), weight), (x, x, weight[1:]), (wide, wide, wide[0])):
        with pytest.raises(ValueError, match="cannot norm"):
            add_norm(one, other, own, None, 1e-5)


def check_gated(inner: int, dtype: torch.dtype, device: str = "cpu") -> None:
    from turboesm_kernels.gated import gated_silu

    for rows in ((1,), (2, 3)):
        joint = 4 * numbers(*rows, 2 * inner).to(device, dtype)
        joint[0].view(-1)[0] = -200  # whose exponential float32 does not hold
        gate, value = joint.double().chunk(2, -1)
        found = gated_silu(joint)
        assert found.dtype == dtype and found.shape == gate.shape
        exact = F.silu(gate) * value
        bound = 2 * torch.finfo(dtype).eps * exact.abs() + 1e-6 * value.abs() + torch.finfo(dtype).tiny
        assert bool(((found.double() - exact).abs() <= bound).all())


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", INNER)
def test_gated(inner: int, dtype: torch.dtype) -> None:
    check_gated(inner, dtype)


@pytest.mark.gpu
@no_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [*INNER, 14336])
def test_gated_on_gpu(inner: int, dtype: torch.dtype) -> None:
    check_gated(inner, dtype, "cuda")


DECODERS: dict[str, tuple[Shape, int, int, dict[str, str]]] = {
    "gpt2": (Shape(2, 48, 4, context=64), 40, 72, {"family": "gpt2", "activation": "gelu_new"}),
    "progen": (Shape(2, 128, 8, context=64), 40, 72, {"family": "progen", "activation": "gelu_new"}),
    "llama": (Shape(2, 64, 4, 16, 2, context=64), 40, 80, {"family": "llama", "activation": "silu"}),
}
"""Mistral's body is Llama's, GPT-J's is ProGen's: attention and feed-forward part beside each other."""

SUMS = {"esm2": 4, "gpt2": 4, "progen": 2, "llama": 4}
"""How many sums of two layers are normed."""


@pytest.fixture
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> Model:
    """Of a family, with norms that do something."""
    if request.param in DECODERS:
        monkeypatch.setitem(random_shapes.SHAPES, "tiny", DECODERS[request.param])
    found = load_model("random:tiny" if request.param in DECODERS else str(tiny_path), "cpu")
    for index, part in enumerate(norm_weights(found)):
        part.data += 0.3 * numbers(*part.shape, seed=index)
    return found


def norm_weights(model: Model) -> list[Tensor]:
    """Weights and biases of all norms."""
    if isinstance(model, EsmModel):
        return [weight for name, weight in model.net.named_parameters() if "layer_norm" in name]
    assert isinstance(model, Decoder)
    blocks = [norm for block in model.blocks for norm in (block.norm, block.mlp_norm) if norm is not None]
    return [part for norm in (*blocks, model.last_norm) for part in (norm.weight, norm.bias) if part is not None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were run, by name; they may be run on a CPU."""
    pytest.importorskip("triton")
    from turboesm_kernels import add_norm, gated, linear

    made: list[str] = []

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: made.append(name) or kernel(*args)

    kernels = ((add_norm, "add_norm"), (gated, "gated_silu"), (linear, "linear"), (linear, "linear_parts"))
    for module, name in kernels:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    monkeypatch.setattr(norms, "runs_triton", lambda _device: True)
    return made


def hidden_states(model: Model, proteins: list[Protein]) -> Tensor:
    tokens = to_tokens(proteins[:2], model)[:, :4]
    return forward.encode(model, tokens)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("model", SUMS, indirect=True)
def test_models_compute_the_same(
    model: Model, dtype: torch.dtype, peptides: list[Protein], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model.to(torch.device("cpu"), dtype)
    with torch.no_grad():
        found = hidden_states(model, peptides).double()
        assert calls.count("add_norm") == SUMS[model.family]
        assert calls.count("gated_silu") == (2 if model.family == "llama" else 0)
        assert calls.count("linear_parts") == (SUMS[model.family] if dtype == torch.float16 else 0)
        monkeypatch.setattr(norms, "runs_triton", lambda _device: False)
        calls.clear()
        expected = hidden_states(model, peptides).double()
    error = (found - expected).norm() / expected.norm()
    assert not calls and error < (1e-6 if dtype == torch.float32 else 2e-3), error


@pytest.mark.parametrize("model", ["esm2", "llama"], indirect=True)
def test_torch_does_what_kernels_cannot(model: Model, peptides: list[Protein], calls: list[str]) -> None:
    with torch.enable_grad():
        hidden_states(model, peptides)
    with torch.no_grad():
        hidden_states(model.to(torch.device("cpu"), torch.float64), peptides)
    assert not calls


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("model", SUMS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_compute_the_same_on_gpu(
    model: Model, dtype: torch.dtype, peptides: list[Protein], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model.to(torch.device("cuda"), dtype)
    with torch.no_grad():
        found = hidden_states(model, peptides).double()
        monkeypatch.setattr(norms, "runs_triton", lambda _device: False)
        expected = hidden_states(model, peptides).double()
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2), error
