"""The kernels that draw tokens against what plain torch draws.

On a CPU they run in Triton's interpreter, in a child process that has TRITON_INTERPRET set before Triton is
imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from interpreter import run_interpreted
from torch import Tensor

from turboesm_cli.models import sampling
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.sampling import OF_KIND, OF_STEP, Sampling, gumbel_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in the child of test_interpreter")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the child process")
def test_interpreter() -> None:
    """Run the tests below on the CPU: Triton reads TRITON_INTERPRET when it is imported."""
    run_interpreted(__file__)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("device", RUNS)
@pytest.mark.parametrize("plan", [Sampling(), Sampling(0.3, 0.9), Sampling(2.0, 0.5), Sampling(1.0, 0.0)])
def test_draws_what_torch_draws(plan: Sampling, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from turboesm_kernels.sampling import draw

    monkeypatch.setattr(torch, "empty", lambda shape, **kinds: torch.full(shape, 99, **kinds))
    rows, kinds = 60, len(ESM2_ALPHABET.residues)
    logits = 3 * numbers(rows, 2 * kinds)[:, ::2]
    logits[0], logits[1] = 0.0, -80.0  # all alike; and but for one next to nothing
    logits[1, 7] = 5.0
    chances = torch.linspace(0, 1 - 2**-24, rows)
    given = (x.to(device) for x in (logits, torch.tensor(ESM2_ALPHABET.residues), chances))
    found = draw(*given, plan.temperature, plan.top_p).cpu()
    assert torch.equal(found, sampling.sample(ESM2_ALPHABET, logits.double(), chances.double(), plan))


@pytest.mark.parametrize("device", RUNS)
@pytest.mark.parametrize("shape", [(1,), (7, 20), (3, 64)])
def test_refuses_what_it_does_not_draw_from(shape: tuple[int, ...], device: str) -> None:
    from turboesm_kernels.sampling import draw

    with pytest.raises(ValueError, match=r"draw|unpack"):
        draw(torch.zeros(shape, device=device), torch.arange(20), torch.zeros(5, device=device), 1.0, 1.0)


@pytest.mark.parametrize("device", RUNS)
@pytest.mark.parametrize("kinds", [1, 33, 1024, 1500])
def test_noise_is_that_of_torch(kinds: int, device: str) -> None:
    from turboesm_kernels.sampling import gumbel

    seeds = torch.tensor([0, 5, 2**62, (1 << 63) - 1])
    steps = torch.tensor([0, 3, 1023, 2])
    found = gumbel(seeds.to(device), steps.to(device), kinds, OF_STEP, OF_KIND).cpu()
    assert torch.allclose(found, sampling.gumbel(seeds, steps, kinds), rtol=2e-5, atol=2e-5)


def test_noise_rises_with_its_bits_and_has_no_tail_of_its_own() -> None:
    """-log(-log u) of the middle of each of 2^31 intervals, the last of which float32 would round to u = 1."""
    most = 2**31 - 1
    bits = torch.tensor([0, 1, 1000, most // 3, most // 2, most - 10**6, most - 64, most - 1, most, most + 2**31])
    noise = gumbel_of(bits)
    middles = ((bits & most).double() + 0.5) / 2.0**31
    assert torch.allclose(noise[3:].double(), -(-middles.log()).log()[3:], rtol=1e-5, atol=1e-5)
    assert bool((noise[:-1].diff() >= 0).all()) and noise[-1] == noise[-2] and noise[0] > -3.1 and noise[-1] < 22.2
