"""Whole units of a layer: how many stay, which are removed, and the repair of the matrix that reads them.

A unit is a channel of a feed-forward network, or a key-value head with its queries: some columns of the matrix
that reads it. What a model's units are is in `mlprune.models.structures`.

U: units. C: columns of the matrix that reads the units, the same number of each. O: its output channels.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from mlprune.pruning.moments import Moments
from mlprune.pruning.sparsegpt import SingularHessianError

DAMPING = 0.01  # share of the Gram matrix's mean diagonal that is added to its diagonal, as SparseGPT does


def kept_units(count: int, sparsity: float, multiple: int = 1) -> int:
    """Return how many of `count` units stay: the multiple nearest to count * (1 - sparsity), ties upwards.

    May return 0 or `count`.
    """
    exact = count * (1 - Fraction(str(sparsity))) / multiple
    return min(count, int(exact + Fraction(1, 2)) * multiple)


def energy(reader_OC: Tensor, sides: Sequence[Moments], units: int, seed: int) -> Tensor:
    """Return sum W_oc^2 * mean square of c over the unit's columns: the energy that the output loses without it.

    It is Wanda's score, squared and summed; FLAP's (An et al. 2024, arXiv 2312.11983) has the variance in place of
    the mean square. float64 [U].
    """
    (moments,) = sides
    square_C = moments.sumsq_I / moments.tokens if moments.tokens else torch.ones_like(moments.sumsq_I)
    return (reader_OC.double().square().sum(0) * square_C).view(units, -1).sum(1)


def magnitude(reader_OC: Tensor, sides: Sequence[Moments], units: int, seed: int) -> Tensor:
    """Return the squared norm of each unit's columns. float64 [U]."""
    return reader_OC.double().square().sum(0).view(units, -1).sum(1)


def random(reader_OC: Tensor, sides: Sequence[Moments], units: int, seed: int) -> Tensor:
    """Return uniform numbers, drawn on the CPU. float64 [U]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(units, generator=generator, dtype=torch.float64).to(reader_OC.device)


# by the name of the score that ranks single weights in the same way; each maps (the matrix that reads the units,
# moments of the sides, number of units, seed) to the units' scores
UNIT_SCORES: Mapping[str, Callable[[Tensor, Sequence[Moments], int, int], Tensor]] = {
    "random": random,
    "magnitude": magnitude,
    "wanda": energy,
}


def refit(reader_OC: Tensor, gram_CC: Tensor, keep_C: Tensor) -> Tensor:
    """Return the matrix, float32, that reproduces the output best from the columns that stay; others are zero.

    Least squares over the tokens of the Gram matrix G, K the kept and D the removed columns:
    W'_K = W_K + W_D G_DK (G_KK + damping)^-1. Without damping this is W G_:K (G_KK)^-1; with it, the weights are
    drawn towards W_K and not towards zero, so that nothing changes where nothing is removed. Selection of channels
    and then reconstruction by least squares is He et al.'s method (2017, arXiv 1707.06168).

    Raises SingularHessianError.
    """
    kept_K, removed_D = keep_C.nonzero()[:, 0], (~keep_C).nonzero()[:, 0]
    weight_OC = reader_OC.double()
    gram_KK = gram_CC[kept_K][:, kept_K]
    diagonal_K = gram_KK.diagonal()
    diagonal_K += DAMPING * diagonal_K.mean()
    factor_KK, failed = torch.linalg.cholesky_ex(gram_KK)
    if failed:
        raise SingularHessianError
    reads_OK = weight_OC[:, removed_D] @ gram_CC[removed_D][:, kept_K]
    result_OC = torch.zeros_like(weight_OC)
    result_OC[:, kept_K] = weight_OC[:, kept_K] + torch.cholesky_solve(reads_OK.T, factor_KK).T
    return result_OC.float()
