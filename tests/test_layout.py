"""The bit layout: golden bytes, no bit lost or shared, and packing as its inverse undoes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from turboesm_kernels import reference
from turboesm_kernels.layout import BYTE, Profile, bytes_for, lanes_for, uniform
from turboesm_kernels.reference import Rope, Side, SideSpec, table_size


def spec_of(
    profiles: list[Profile], side: Side = "v", heads_by_profile: tuple[int, ...] | None = None
) -> SideSpec:
    """A side whose tables and axes do not matter."""
    own = heads_by_profile or tuple(range(len(profiles)))
    heads, axes = len(own), len(profiles[0].widths)
    eye = torch.eye(axes).expand(heads, axes, axes)
    size = table_size(max(max(p.widths) for p in profiles))
    return SideSpec(
        side, tuple(profiles), own, torch.zeros(heads, axes), eye, torch.ones(heads, axes), eye,
        torch.zeros(heads, size), torch.zeros(heads, size), "none",
    )  # fmt: skip


def random_codes(spec: SideSpec, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    widths = torch.tensor([spec.profiles[i].widths for i in spec.profile_of_head])
    drawn = torch.randint(0, 256, (2, spec.heads, tokens, widths.shape[1]), generator=generator)
    return (drawn % (2 ** widths[:, None])).to(torch.uint8)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    lanes = draw(st.sampled_from([1, 2, 4]))
    groups = sorted(draw(st.lists(st.integers(0, 8), min_size=1, max_size=12)), reverse=True)
    spare = draw(st.integers(0, 2))
    lane_bytes = -(-sum(groups) // BYTE) + spare
    return Profile(tuple(width for width in groups for _ in range(lanes)), lane_bytes * lanes, lanes)


def test_eight_three_bit_codes_take_three_bytes() -> None:
    spec = spec_of([Profile((3,) * 8, 3)])
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)[None, None, None]
    # byte 0 holds codes 0, 1 and the low bits of 6; byte 1 codes 2, 3, the rest of 6 and the low bit of 7.
    golden = [1 | 2 << 3 | 0b11 << 6, 3 | 4 << 3 | 1 << 6 | 0 << 7, 5 | 6 << 3 | 0 << 6]
    assert reference.pack(codes, spec).flatten().tolist() == golden


def test_a_word_of_four_lanes_as_in_the_diagram() -> None:
    spec = spec_of([Profile((5,) * 4 + (3,) * 4, 4, 4)], side="k")
    codes = torch.tensor([17, 18, 19, 20, 1, 2, 3, 4], dtype=torch.uint8)[None, None, None]
    packed = reference.pack(codes, spec)
    assert packed.shape == (1, 1, 1, 1, 4)
    assert packed.flatten().tolist() == [17 | 1 << 5, 18 | 2 << 5, 19 | 3 << 5, 20 | 4 << 5]


def test_memory_order_of_keys_and_values() -> None:
    profile = Profile((8,) * 8, 8, 4)
    codes = torch.arange(3 * 8, dtype=torch.uint8).view(1, 1, 3, 8)  # code = 8 token + axis
    keys, values = (reference.pack(codes, spec_of([profile], side)) for side in ("k", "v"))
    assert keys[0, 0, 1].tolist() == [[8 * token + axis for axis in (4, 5, 6, 7)] for token in range(3)]
    assert values[0, 0, 5].tolist() == [5, 13, 21]


@given(profiles())
def test_every_bit_of_every_code_has_one_place(profile: Profile) -> None:
    taken = [(p.byte, p.shift + bit) for p in profile.pieces for bit in range(p.width)]
    coded = [(p.axis, p.low + bit) for p in profile.pieces for bit in range(p.width)]
    assert len(set(taken)) == len(taken)
    assert all(byte < profile.nbytes and bit < BYTE for byte, bit in taken)
    assert sorted(coded) == [(axis, bit) for axis, width in enumerate(profile.widths) for bit in range(width)]


@given(profiles(), st.sampled_from(["k", "v"]), st.integers(0, 5), st.integers(0, 99))
def test_unpack_undoes_pack(profile: Profile, side: Side, tokens: int, seed: int) -> None:
    spec = spec_of([profile], side, (0, 0, 0))
    codes = random_codes(spec, tokens, seed)
    assert torch.equal(reference.unpack(reference.pack(codes, spec), spec), codes)


@pytest.mark.parametrize("side", ["k", "v"])
def test_heads_of_different_profiles_keep_to_themselves(side: Side) -> None:
    spec = spec_of([Profile((5, 3, 1, 1), 2), Profile((4, 4, 2, 0), 2)], side, (0, 1, 1, 0))
    codes = random_codes(spec, 7)
    assert torch.equal(reference.unpack(reference.pack(codes, spec), spec), codes)


@pytest.mark.parametrize(
    ("widths", "nbytes", "lanes", "words"),
    [
        ((9,), 2, 1, "0..8"),
        ((), 1, 1, "0..8"),
        ((1, 2), 1, 1, "widest first"),
        ((3, 3, 3), 1, 1, "do not fit"),
        ((3, 2), 2, 2, "share a width"),
        ((2, 2), 3, 2, "lanes"),
        ((2, 2, 2), 3, 3, "lanes"),
    ],
)
def test_impossible_profiles_are_refused(widths: tuple[int, ...], nbytes: int, lanes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Profile(widths, nbytes, lanes)


@pytest.mark.parametrize(("head_dim", "lanes"), [(16, 1), (24, 1), (32, 2), (64, 4), (96, 2), (128, 4)])
def test_sizes_by_head_dim(head_dim: int, lanes: int) -> None:
    assert lanes_for(head_dim) == lanes
    for bits in (2, 3, 4):
        assert uniform(head_dim, bits).nbytes == bytes_for(head_dim, bits) == head_dim * bits // BYTE
    assert bytes_for(head_dim, 2.5) <= head_dim * 2.5 / BYTE < bytes_for(head_dim, 2.5) + lanes


@given(st.floats(0.07, 15.0))
def test_scales_come_back_within_a_step(scale: float) -> None:
    back = reference.byte_to_scale(reference.scale_to_byte(torch.tensor([scale])))
    assert abs(back.item() / scale - 1) < 0.0112


def test_scale_bytes_clamp_at_the_ends() -> None:
    assert reference.scale_to_byte(torch.tensor([0.0, -1.0, 1e9])).tolist() == [0, 0, 255]


def test_rope_turns_back_and_keeps_products_relative() -> None:
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    rope = Rope.at(torch.arange(50), frequencies)
    x, y = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    turned = rope.rotate(x.expand(50, 16)), rope.rotate(y.expand(50, 16))
    assert torch.allclose(rope.rotate_back(turned[0]), x.expand(50, 16), atol=1e-5)
    products = turned[0] @ turned[1].T
    assert torch.allclose(products.diagonal(-7), products[7, 0].expand(43), atol=1e-4)
