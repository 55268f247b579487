"""A code as the compiled loops of a CPU read it (`cpu_loops`): masks over bytes or words of a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turboesm_kernels.bits import analysis_of, grid_of
from turboesm_kernels.layout import BYTE, Profile
from turboesm_kernels.reference import SideSpec

TERMS = 4
"""Pieces of one byte or word that a loop over tokens takes at once."""

PIECES = 2 + 2 * TERMS
"""Numbers of a group of pieces: its row of codes, how many pieces, their masks, their axes."""


@dataclass(frozen=True)
class Loops:
    """A uniform-grid code as the loops read it: masks over its bytes or words. H heads, A axes, head_dim d.

    map      float32: keys [H, d, A], values [H, A, d]: `PreparedSide.map` times the step from code to code
    middle   float32 [H, A]: the code that stands for 0
    centre   float32 [H, d]
    at       of keys, float32 [H, d, P], see `SideSpec.centre_at`, or None
    groups   int32 [H + 1]: each head's groups start there
    pieces   int32 [G, PIECES]
    factors  float32 [G, TERMS]: a masked number times it is the piece's part of its code
    analysis, norm   as in `Bits`
    grid     float32 [H, 6, A]: `per_step`, `half`, `top`, `level`, `zero`, `deviation` of `Bits`
    """

    map: Tensor
    middle: Tensor
    centre: Tensor
    at: Tensor | None
    groups: Tensor
    pieces: Tensor
    factors: Tensor
    analysis: Tensor
    norm: Tensor
    grid: Tensor

    @classmethod
    def of(cls, spec: SideSpec, decoding: Tensor, steps: list[dict[int, float]]) -> Loops:
        """Of a side; `decoding` is its `PreparedSide.map`, `steps` each head's, by width (`grid_steps`)."""
        profiles = [spec.profiles[index] for index in spec.profile_of_head]
        step = _floats([[own.get(w, 0.0) for w in p.widths] for own, p in zip(steps, profiles, strict=True)])
        middle = _floats([[(2**w - 1) / 2 for w in p.widths] for p in profiles])
        scaled = decoding * (step[:, None] if spec.side == "k" else step[..., None])
        by_profile = [_groups(profile, spec.lanes if spec.side == "k" else 1) for profile in spec.profiles]
        of_head = [by_profile[index] for index in spec.profile_of_head]
        groups = torch.tensor([0, *map(len, of_head)]).cumsum(0).int()
        found = [group for own in of_head for group in own]
        pieces = torch.tensor([group.numbers for group in found], dtype=torch.int32)
        factors = _floats([group.factors for group in found])
        at = None if spec.centre_at is None else spec.centre_at.float().mT.contiguous()
        analysis, norm = analysis_of(spec)
        return cls(
            scaled.contiguous(), middle, spec.centre.contiguous(), at, groups, pieces, factors,
            analysis.contiguous(), norm.contiguous(), grid_of(spec, steps),
        )  # fmt: skip

    @property
    def reading(self) -> tuple[int, ...]:
        """Numbers of attention's job, from K_MAP or V_MAP on; addresses are good for as long as this lives."""
        axes = self.middle.shape[1]
        first, last = (self.map, self.middle, self.centre), (self.groups, self.pieces, self.factors)
        return *(x.data_ptr() for x in first), axes, *(x.data_ptr() for x in last)

    @property
    def writing(self) -> tuple[int, ...]:
        """Numbers of packing's job, from P_CENTRE on."""
        tables = (self.centre, self.analysis, self.grid, self.norm, self.groups, self.pieces, self.factors)
        return tuple(x.data_ptr() for x in tables)


def _floats(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


@dataclass(frozen=True)
class _Group:
    """Up to TERMS pieces of one row of codes."""

    numbers: list[int]
    factors: list[float]


def _groups(profile: Profile, lanes: int) -> list[_Group]:
    """A code's groups, row by row; with 4 lanes a group is 4 neighbouring axes.

    The masks of the fourth byte of a word are for the word 8 bits down.
    """
    rows: dict[int, list[tuple[int, int, float]]] = {}
    for piece in profile.pieces:
        up = BYTE * min(piece.byte % lanes, 2) + piece.shift
        rows.setdefault(piece.byte // lanes, []).append((piece.mask << up, piece.axis, 2.0 ** (piece.low - up)))
    return [
        _group(row, terms[start : start + TERMS])
        for row, terms in sorted(rows.items())
        for start in range(0, len(terms), TERMS)
    ]


def _group(row: int, terms: list[tuple[int, int, float]]) -> _Group:
    masks, axes, factors = zip(*terms, *[(0, 0, 0.0)] * (TERMS - len(terms)), strict=True)
    return _Group([row, len(terms), *masks, *axes], list(factors))
