"""Bits to axes, layers and sides: flat widths, reverse water-filling, and one budget for a whole model."""

from __future__ import annotations

from collections.abc import Sequence

from turboesm_kernels.layout import BYTE, MAX_WIDTH, Profile

from turboesm_cli.codec.scalar_quantizers import GAUSSIAN_DISTORTION


def flat(axes: int, nbytes: int, lanes: int) -> Profile:
    """Equal widths; where bits are not whole, some lanes of axes get one bit more."""
    low, spare = divmod(nbytes * BYTE // lanes, axes // lanes)
    widths = [low + 1] * (spare * lanes) + [low] * (axes - spare * lanes)
    return Profile(tuple(widths), nbytes, lanes)


def waterfill(variance: Sequence[float], nbytes: int, lanes: int) -> Profile:
    """Widths of least expected error for axes of these variances, descending: see `waterfill_path`."""
    return waterfill_path(variance, nbytes, lanes)[nbytes // lanes]


def waterfill_path(variance: Sequence[float], nbytes: int, lanes: int) -> list[Profile]:
    """Water-filled profiles of 0, 1, 2, ... lanes of bytes up to `nbytes`: each bit goes where it saves most.

    Reverse water-filling (Cover & Thomas, "Elements of Information Theory", 10.3) with the distortions of real
    quantizers, which fall convexly with the width: so greedy is optimal. `variance` descends, and so do widths.
    """
    groups = [sum(variance[start : start + lanes]) for start in range(0, len(variance), lanes)]
    widths = [0] * len(groups)
    path = [_spread(widths, 0, lanes)]
    for bits in range(1, nbytes * BYTE // lanes + 1):
        savings = [_saving(group, width) for group, width in zip(groups, widths, strict=True)]
        widths[savings.index(max(savings))] += 1
        if bits % BYTE == 0:
            path.append(_spread(widths, bits // BYTE * lanes, lanes))
    return path


def expected_error(variance: Sequence[float], profile: Profile) -> float:
    """Expected squared error of Gaussian axes of these variances under a profile."""
    return sum(v * GAUSSIAN_DISTORTION[width] for v, width in zip(variance, profile.widths, strict=True))


def share_out(errors: Sequence[Sequence[float]], steps: int) -> list[int]:
    """How many steps of memory each part gets, `steps` in all, for the least sum of errors.

    errors[i][n]: expected error of part i with n steps. Each part gets at least one, and each further step goes
    where it saves most (optimal where the errors fall convexly, as water-filled ones do).
    """
    given = [1] * len(errors)
    for _ in range(steps - len(errors)):
        savings = [row[n] - row[n + 1] if n + 1 < len(row) else -1.0 for row, n in zip(errors, given, strict=True)]
        best = max(savings)
        if best < 0:
            break
        given[savings.index(best)] += 1
    return given


def _saving(variance: float, width: int) -> float:
    if width == MAX_WIDTH:
        return -1.0
    return variance * (GAUSSIAN_DISTORTION[width] - GAUSSIAN_DISTORTION[width + 1])


def _spread(widths: Sequence[int], nbytes: int, lanes: int) -> Profile:
    return Profile(tuple(width for width in widths for _ in range(lanes)), nbytes, lanes)
