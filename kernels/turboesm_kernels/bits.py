"""A uniform-grid code bit by bit: what each bit that is set adds, for look-ups on a CPU (`cpu_lookup`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turboesm_kernels.layout import BYTE, Profile
from turboesm_kernels.reference import SideSpec


@dataclass(frozen=True)
class Bits:
    """A uniform-grid code bit by bit. H heads, A axes, head_dim d, `bits` = 8 nbytes places.

    map       float32, keys [H, d, bits + 1 + d]: a query times it is what each bit that is set adds to the score,
              what all codes 0 stand for, and the phases of the centre's score (`phase_map`);
              values [H, bits + 1, d]: what each bit adds to the sum, and what all codes 0 and the centre stand for
    axis      int64 [H, bits]: the axis whose code has a bit there, 0 where none
    place     uint8 [H, bits]: which bit of that code
    used      uint8 [H, bits]: 1 where there is one
    analysis  float32 [H, d, A], divided by the deviation, 0 where an axis is not coded
    per_step, half, top   float32 [H, 1, A]: code = floor(y per_step + half), 0..top
    level, zero   float32 [H, 1, A]: a code's coordinate is level code - zero; 0 where an axis is not coded
    deviation float32 [H, 1, A]
    norm      float32 [H, 1, 1]: 1 / sqrt(coded axes)
    turned    float32 [H, 1, d]: the keys' centre as RoPE pairs its halves
    centre_at float32 [H, P, d], as in `SideSpec`, or None
    """

    map: Tensor
    axis: Tensor
    place: Tensor
    used: Tensor
    analysis: Tensor
    per_step: Tensor
    half: Tensor
    top: Tensor
    level: Tensor
    zero: Tensor
    deviation: Tensor
    norm: Tensor
    turned: Tensor
    centre_at: Tensor | None = None

    @classmethod
    def of(cls, spec: SideSpec, decoding: Tensor, steps: list[dict[int, float]]) -> Bits:
        """Bits of a side; `decoding` is its `PreparedSide.map`, `steps` each head's, by width (`grid_steps`)."""
        profiles = [spec.profiles[index] for index in spec.profile_of_head]
        axis, place = torch.zeros((2, spec.heads, spec.nbytes * BYTE), dtype=torch.int64)
        used = torch.zeros(axis.shape, dtype=torch.uint8)
        for head, profile in enumerate(profiles):
            for p in profile.pieces:
                at = torch.arange(p.width) + p.byte * BYTE + p.shift
                axis[head, at], place[head, at], used[head, at] = p.axis, p.low + torch.arange(p.width), 1
        step, width = _steps(profiles, steps), _widths(profiles)
        top, analysis, norm = (1 << width).float() - 1, *analysis_of(spec)
        levels = (decoding.mT if spec.side == "k" else decoding).cpu().float()  # [H, A, d]
        levels = levels * (step * (width > 0))[..., None]
        weight = (1 << place).float() * used
        of_bit = levels.gather(1, axis[..., None].expand(-1, -1, spec.head_dim)) * weight[..., None]
        turned = torch.cat((-spec.centre[:, spec.head_dim // 2 :], spec.centre[:, : spec.head_dim // 2]), 1)
        offset = -torch.einsum("ha,had->hd", top / 2, levels)[:, None]
        if spec.side == "k":
            whole = torch.cat((of_bit.mT, offset.mT, phase_map(spec.centre.cpu())), 2)
        else:
            whole = torch.cat((of_bit, offset), 1)
        tensors = (
            whole,
            axis,
            place.to(torch.uint8),
            used,
            analysis,
            *grid_of(spec, steps).split(1, 1),
            norm,
            turned.cpu()[:, None],
        )
        found = cls(*(tensor.to(spec.centre.device) for tensor in tensors))
        return found if spec.centre_at is None else replace(found, centre_at=spec.centre_at.float())


def grid_of(spec: SideSpec, steps: list[dict[int, float]]) -> Tensor:
    """float32 [H, 6, A]: `per_step`, `half`, `top`, `level`, `zero`, `deviation` of `Bits`."""
    profiles, deviation = [spec.profiles[index] for index in spec.profile_of_head], spec.deviation.cpu()
    step, width = _steps(profiles, steps), _widths(profiles)
    coded, codes = (width > 0).float(), (1 << width).float()
    level, top = deviation * step * coded, codes - 1
    rows = (1 / step, codes / 2, top * coded, level, level * top / 2, deviation)
    return torch.stack(rows, 1).to(spec.centre.device)


def analysis_of(spec: SideSpec) -> tuple[Tensor, Tensor]:
    """`analysis` and `norm` of `Bits`."""
    coded = (_widths([spec.profiles[index] for index in spec.profile_of_head]) > 0).float()
    analysis = spec.analysis.cpu() * (coded / spec.deviation.cpu())[:, None]
    return analysis.to(spec.centre.device), coded.sum(-1).rsqrt()[:, None, None].to(spec.centre.device)


def _steps(profiles: list[Profile], steps: list[dict[int, float]]) -> Tensor:
    """float32 [H, A]: each axis' step, 1 where it has no code."""
    return torch.tensor([[own.get(w, 1.0) for w in p.widths] for own, p in zip(steps, profiles, strict=True)])


def _widths(profiles: list[Profile]) -> Tensor:
    """int64 [H, A]."""
    return torch.tensor([p.widths for p in profiles])


def phase_map(centre: Tensor) -> Tensor:
    """[..., d, d] that takes a query to phases of <q, R_j c>: the rest is a product with `Rope.half`.

    <q, R_j c> = sum_i cos_ij (q_i c_i + q_i' c_i') + sin_ij (q_i' c_i - q_i c_i'), i' = i + d/2; c [..., d].
    """
    first, second = (torch.diag_embed(half) for half in centre.chunk(2, -1))
    return torch.cat((torch.cat((first, -second), -1), torch.cat((second, first), -1)), -2)
