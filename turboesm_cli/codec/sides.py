"""Moments + a recipe + bytes -> how one side of a layer is coded: axes, bits an axis, tables.

A vector is coded in coordinates z = (x - mean) M^(1/2) U: in those, plain squared error is the metric's error
e^T M e, and the orthogonal U are the axes of the recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from turboesm_kernels.layout import BYTE, Profile, table_size, uniform
from turboesm_kernels.reference import (
    Side,
    SideSpec,
    decode,
    encode,
    start_scale,
    table_slice,
)

from turboesm_cli.codec import bit_allocation, scalar_quantizers
from turboesm_cli.codec.moments import Moments
from turboesm_cli.codec.recipes import Recipe, Residual
from turboesm_cli.codec.rotations import mean_eigenvalue, orthogonal_axes, random_orthogonal, square_roots
from turboesm_cli.codec.sizes import lanes_of


@dataclass(frozen=True)
class Basis:
    """Coordinates of a side: M^(1/2), its inverse and axes U [H, d, d]; variances of axes [H, d], descending.

    `weight` [H]: mean eigenvalue of the metric; the roots are scaled to a mean eigenvalue of 1, so that errors of
    different heads compare only after multiplication by it.
    """

    root: Tensor
    inverse_root: Tensor
    axes: Tensor
    variance: Tensor
    weight: Tensor

    def weighted(self) -> list[list[float]]:
        """Variances of each head's axes, in units of the metric."""
        return (self.variance * self.weight[:, None]).tolist()

    def pooled(self) -> list[float]:
        """Variances of the heads' first, second, ... axes together, in units of the metric."""
        return [sum(column) for column in zip(*self.weighted(), strict=True)]


def basis_of(side: Side, moments: Moments, recipe: Recipe) -> Basis:
    """Axes of a recipe, widest first."""
    root, inverse_root = square_roots(moments.metric)
    covariance = root @ moments.covariance @ root
    axes = orthogonal_axes(covariance, recipe.rotation(side))
    variance = torch.einsum("hda,hde,hea->ha", axes, covariance, axes).clamp_min(1e-12)
    variance, order = variance.sort(-1, descending=True)
    axes = axes.gather(2, order[:, None].expand_as(axes))
    return Basis(root, inverse_root, axes, variance, mean_eigenvalue(moments.metric))


def fit_side(side: Side, moments: Moments, nbytes: int, recipe: Recipe) -> SideSpec:
    """The code of `nbytes` bytes per vector that a recipe makes of a side's moments."""
    if recipe.residual_of(side) == "qjl":
        plain = replace(recipe, residual="none")
        head_dim = moments.mean.shape[-1]
        return _with_qjl(fit_side(side, moments, nbytes - head_dim // BYTE, plain), moments)
    basis = basis_of(side, moments, recipe)
    profiles = _profiles(basis, nbytes, recipe)
    distinct = tuple(dict.fromkeys(profiles))
    variance = basis.variance
    if recipe.allocation == "flat":  # one table for all axes
        variance = variance.mean(-1, keepdim=True).expand_as(variance)
    spec = SideSpec(
        side,
        distinct,
        tuple(distinct.index(profile) for profile in profiles),
        centre=moments.mean.float(),
        analysis=(basis.root @ basis.axes).float(),
        deviation=variance.sqrt().float().contiguous(),
        synthesis=(basis.axes.mT @ basis.inverse_root).float(),
        **_empty_tables(len(profiles), max(profile.widths[0] for profile in distinct)),
        scale=recipe.scale,
        centre_at=moments.mean_at,
    )
    return _with_tables(spec, moments.sample, recipe)


def _profiles(basis: Basis, nbytes: int, recipe: Recipe) -> list[Profile]:
    """The bit layout of each head."""
    heads, axes = basis.variance.shape
    lanes = lanes_of(axes, recipe)
    if recipe.allocation == "flat":
        even = uniform(axes, BYTE * nbytes // axes)
        fits = (even.nbytes, even.lanes) == (nbytes, lanes)
        return [even if fits else bit_allocation.flat(axes, nbytes, lanes)] * heads
    if recipe.profile == "layer":
        return [bit_allocation.waterfill(basis.pooled(), nbytes, lanes)] * heads
    return [bit_allocation.waterfill(row, nbytes, lanes) for row in basis.variance.tolist()]


def _empty_tables(heads: int, width: int) -> dict[str, Tensor]:
    shape = (heads, table_size(width))
    return {"levels": torch.zeros(shape), "thresholds": torch.full(shape, torch.inf)}


def _with_tables(spec: SideSpec, sample: Tensor, recipe: Recipe) -> SideSpec:
    """The spec with tables fitted to centred vectors [H, N, d]."""
    y = (sample @ spec.analysis) / spec.deviation[:, None]
    if spec.scale != "none":
        y = y / start_scale(y[None], spec)[0]
    for index, profile in enumerate(spec.profiles):
        heads = [head for head, own in enumerate(spec.profile_of_head) if own == index]
        for width, axes in profile.runs:
            table = _table(y[heads][:, :, axes].flatten(1), width, recipe.residual_of(spec.side), recipe.grid)
            where = table_slice(width)
            spec.levels[heads, where] = table.levels
            spec.thresholds[heads, where.start : where.stop - 1] = table.thresholds
    return spec


def _table(values: Tensor, width: int, residual: Residual, grid: str) -> scalar_quantizers.Table:
    """Tables of values [H, N] at `width` bits, the residual's sign included."""
    counts = scalar_quantizers.histogram(values)
    make = scalar_quantizers.lloyd_max if grid == "lloyd-max" else scalar_quantizers.uniform_grid
    if residual == "sign":
        return scalar_quantizers.with_sign(counts, make(counts, width - 1))
    return make(counts, width)


def _with_qjl(spec: SideSpec, moments: Moments) -> SideSpec:
    """The spec with d axes more: signs of what it leaves over, in random orthogonal axes Q.

    QJL (arXiv 2406.03482) as TurboQuant (arXiv 2504.19874) uses it on a residual r, with orthogonal rows q_a in
    place of Gaussian ones: E[sum_a q_a sign(q_a . r)] = d E|q_1| r / |r|, where a coordinate of a random unit
    vector has E|q_1| = Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)). So |r| / (d E|q_1|) times the signs is unbiased;
    |r| is the head's mean, times the token's scale.
    """
    root, inverse_root = square_roots(moments.metric)
    d = moments.mean.shape[-1]
    norm = _residual_norm(spec, moments.sample, root)
    step = norm / (d * math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi))
    q = random_orthogonal(d).expand_as(root)
    spec = _with_symmetric_bit(spec)
    unit = spec.levels[:, table_slice(1)][:, 1:]
    return replace(
        spec,
        profiles=tuple(Profile((*p.widths, *[1] * d), p.nbytes + d // BYTE, p.lanes) for p in spec.profiles),
        analysis=torch.cat((spec.analysis, (root @ q.mT).float()), -1),
        deviation=torch.cat((spec.deviation, (step[:, None] / unit).expand(-1, d)), -1),
        synthesis=torch.cat((spec.synthesis, (q @ inverse_root).float()), 1),
    )


def _residual_norm(spec: SideSpec, sample: Tensor, root: Tensor) -> Tensor:
    """Mean norm [H] in the metric of what `spec` leaves over of samples [H, N, d], over the token's scale."""
    codes, scales = encode(sample[None], spec)
    if scales is None:
        return ((sample - decode(codes, None, spec)[0]) @ root.float()).norm(dim=-1).mean(-1)
    unscaled = decode(codes, None, spec)[0]
    back = decode(codes, scales, spec)[0]
    scale = back.norm(dim=-1) / unscaled.norm(dim=-1).clamp_min(1e-30)
    return (((sample - back) @ root.float()).norm(dim=-1) / scale.clamp_min(1e-30)).mean(-1)


def _with_symmetric_bit(spec: SideSpec) -> SideSpec:
    """The spec with a 1-bit table that is plus or minus one number: residual axes share it with the others."""
    levels, thresholds = spec.levels.clone(), spec.thresholds.clone()
    both = levels[:, table_slice(1)]
    size = (both[:, 1:] - both[:, :1]) / 2
    size = torch.where(size > 0, size, torch.ones_like(size))
    levels[:, table_slice(1)] = torch.cat((-size, size), -1)
    thresholds[:, 0] = 0
    return replace(spec, levels=levels, thresholds=thresholds)
