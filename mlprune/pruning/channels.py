"""Channels of a feed-forward network: how many stay, which are removed, and the repair of what reads them.

A channel is a row of the matrices before the activation (gate and up, or fc1) and a column of the matrix behind it
(down, or fc2). Without its column, nothing reads it, so both can be cut out of the model.

C: channels. O: output channels of the matrix behind the activation.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from mlprune.pruning.moments import Moments
from mlprune.pruning.sparsegpt import SingularHessianError

MULTIPLE = 64  # of a width that matrix products are fast with
DAMPING = 0.01  # share of the Gram matrix's mean diagonal that is added to its diagonal, as SparseGPT does


def kept_channels(width: int, sparsity: float, multiple: int = 0) -> int:
    """Return how many of `width` channels stay: the multiple nearest to width * (1 - sparsity), ties upwards.

    `multiple` 0: 64 if the width is a multiple of it, else 1. May return 0 or `width`.
    """
    multiple = multiple or (MULTIPLE if width % MULTIPLE == 0 else 1)
    exact = width * (1 - Fraction(str(sparsity))) / multiple
    return min(width, int(exact + Fraction(1, 2)) * multiple)


def energy(down_OC: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """Return sum_o W_oc^2 * mean square of channel c: the energy that the output loses without the channel.

    It is Wanda's score, squared and summed over the column; FLAP's (An et al. 2024, arXiv 2312.11983) has the
    variance in place of the mean square. float64 [C].
    """
    (moments,) = sides
    return magnitude(down_OC, (), seed) * (moments.sumsq_I / moments.tokens if moments.tokens else 1.0)


def magnitude(down_OC: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """Return the squared norm of each column. float64 [C]."""
    return down_OC.double().square().sum(0)


def random(down_OC: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """Return uniform numbers, drawn on the CPU. float64 [C]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(down_OC.shape[1], generator=generator, dtype=torch.float64).to(down_OC.device)


# by the name of the score that ranks single weights in the same way
CHANNEL_SCORES: Mapping[str, Callable[[Tensor, Sequence[Moments], int], Tensor]] = {
    "random": random,
    "magnitude": magnitude,
    "wanda": energy,
}


def refit(down_OC: Tensor, gram_CC: Tensor, keep_C: Tensor) -> Tensor:
    """Return the matrix, float32, that reproduces the output best from the channels that stay; others are zero.

    Least squares over the tokens of the Gram matrix G, K the kept and D the removed channels:
    W'_K = W_K + W_D G_DK (G_KK + damping)^-1. Without damping this is W G_:K (G_KK)^-1; with it, the weights are
    drawn towards W_K and not towards zero, so that nothing changes where nothing is removed. Selection of channels
    and then reconstruction by least squares is He et al.'s method (2017, arXiv 1707.06168).

    Raises SingularHessianError.
    """
    kept_K, removed_D = keep_C.nonzero()[:, 0], (~keep_C).nonzero()[:, 0]
    weight_OC = down_OC.double()
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
