"""Allocation of weights to drop: from a ratio for each layer to whole numbers for layers and matrices.

The total is that of `uniform`, to a weight. What the ratios follow from is in `outliers`, `spectra`, `agreement`
and `sensitivity`; masks are not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# No layer is emptied to keep others denser, unless the requested sparsity is higher still.
CEILING = 0.99


def linear_ratios(
    signals: Sequence[float], weights: Sequence[int], sparsity: float, spread: float
) -> tuple[float, ...]:
    """Return the sparsity of each layer: the largest signal gives the lowest, linearly.

    `weights` are the layers' numbers of prunable weights. The signals are scaled to a range of `spread` and
    shifted until the mean over all weights is `sparsity`. Every layer stays within [0, 0.99], or [0, sparsity] if
    that is wider, and the other layers compensate. Equal signals give all layers the same sparsity.
    """
    least, most = min(signals), max(signals)
    if least == most:
        return (sparsity,) * len(signals)
    offsets = [-spread * (signal - least) / (most - least) for signal in signals]
    ceiling, budget = max(CEILING, sparsity), sparsity * sum(weights)

    def shifted(shift: float) -> tuple[float, ...]:
        return tuple(min(max(offset + shift, 0.0), ceiling) for offset in offsets)

    # at `low` all layers are at zero, at `high` all are at the ceiling; the number dropped grows with the shift
    low, high = 0.0, 1 + spread
    for _ in range(64):  # enough halvings for the last bit of a float64
        middle = (low + high) / 2
        dropped = sum(ratio * weight for ratio, weight in zip(shifted(middle), weights, strict=True))
        low, high = (middle, high) if dropped < budget else (low, middle)
    return shifted(high)


def layer_counts(ratios: Sequence[float], weights: Sequence[int], total: int) -> tuple[int, ...]:
    """Return how many weights each layer drops: `ratios` of `weights`, rounded so that the sum is `total`."""
    return _rounded([ratio * weight for ratio, weight in zip(ratios, weights, strict=True)], total)


def matrix_counts(uniform: Sequence[int], sizes: Sequence[int], total: int) -> tuple[int, ...]:
    """Return how many weights each matrix of a layer drops, `total` in all.

    `uniform` holds the numbers that `uniform` drops, `sizes` the numbers of weights. A total between nothing and
    that of `uniform`, or between that of `uniform` and everything, is interpolated in every matrix. So zero drops
    nothing, and the total of `uniform` gives exactly `uniform`.
    """
    least, most = sum(uniform), sum(sizes)
    if total <= least:
        shares = [count * total / least if least else 0.0 for count in uniform]
    else:
        further = (total - least) / (most - least)
        shares = [count + (size - count) * further for count, size in zip(uniform, sizes, strict=True)]
    return _rounded(shares, total)


def _rounded(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Round shares to whole numbers that add up to `total`: those with the largest remainders go up."""
    counts = [math.floor(share) for share in shares]
    missing = total - sum(counts)
    assert 0 <= missing <= len(counts), "the shares do not add up to the total"
    by_remainder = sorted(range(len(shares)), key=lambda n: counts[n] - shares[n])
    for n in by_remainder[:missing]:
        counts[n] += 1
    return tuple(counts)
