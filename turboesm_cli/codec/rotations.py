"""Orthogonal axes of a head's vectors, and the square roots of a metric."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from turboesm_cli.codec.recipes import Rotation

METRIC_FLOOR = 0.05
"""Added to a metric, as a part of its mean eigenvalue: no direction is free of charge, least of all where few
proteins were measured (a floor of 0.001 doubles the error after 60 proteins, and adds 5 % after 900)."""


def square_roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """M^(1/2) and M^(-1/2) of metrics float64 [H, d, d], scaled to a mean eigenvalue of 1."""
    metric = metric / mean_eigenvalue(metric)[:, None, None].clamp_min(1e-30)
    metric = (metric + METRIC_FLOOR * _identity_like(metric)) / (1 + METRIC_FLOOR)
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(METRIC_FLOOR / 2)
    return _power(values, vectors, 0.5), _power(values, vectors, -0.5)


def mean_eigenvalue(matrix: Tensor) -> Tensor:
    """Mean eigenvalues [H] of symmetric matrices [H, d, d]."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def orthogonal_axes(covariance: Tensor, rotation: Rotation) -> Tensor:
    """Orthogonal axes float64 [H, d, d], one a column, widest first (where the rotation has an order)."""
    size = covariance.shape[-1]
    if rotation == "none":
        return _identity_like(covariance)
    if rotation == "hadamard":
        return hadamard(size).expand_as(covariance)
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    # Eigenvectors have no sign of their own: take the one that makes the largest entry positive.
    vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    return vectors if rotation == "svd" else vectors @ hadamard(size)


def hadamard(size: int) -> Tensor:
    """Orthogonal float64 [size, size] with flat entries: Hadamard's matrix times, for an odd part, Hartley's."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    angles = torch.outer(torch.arange(odd), torch.arange(odd)).double() * (2 * math.pi / odd)
    matrix = (angles.cos() + angles.sin()) / math.sqrt(odd)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1))) / math.sqrt(2)
    return matrix


def random_orthogonal(size: int, seed: int = 0) -> Tensor:
    """Haar-distributed orthogonal float64 [size, size]: QR of a Gaussian matrix, R's diagonal made positive."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def _power(values: Tensor, vectors: Tensor, power: float) -> Tensor:
    return vectors @ torch.diag_embed(values**power) @ vectors.mT


def _identity_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(matrix)
