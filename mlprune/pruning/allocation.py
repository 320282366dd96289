"""Allocation: how sparse each layer becomes, when the whole is to be `sparsity`.

`uniform`: all the same. `owl` (Yin et al. 2024, arXiv 2310.05175): a layer whose scores hold more outliers stays
denser.

O: output channels (rows). I: input channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlprune.pruning.moments import Moments

OUTLIER = 5  # an outlier is above this many times the mean: the paper's M
LAMBDA = 0.08  # layers differ by twice this at the most: the paper's lambda
# No layer is emptied to spare others, unless so much was asked of them all.
CEILING = 0.99


def outlier_share(matrices: Sequence[tuple[Tensor, Moments]]) -> float:
    """The share of outliers among |W_ij| * ||X_j|| over all matrices of one decoder layer, each [O, I].

    The mean is that of all the matrices together. A matrix that no token reached (of an expert) has no say.
    Scores are made twice, a matrix at a time, rather than held.
    """
    count = sum(weight_OI.numel() for weight_OI, seen in matrices if seen.tokens)
    if not count:
        return 0.0
    total = sum(float(score_OI.sum(dtype=torch.float64)) for score_OI in _scores(matrices))
    threshold = OUTLIER * total / count
    return sum(int((score_OI > threshold).sum()) for score_OI in _scores(matrices)) / count


def _scores(matrices: Sequence[tuple[Tensor, Moments]]) -> Iterator[Tensor]:
    for weight_OI, seen in matrices:
        if seen.tokens:
            yield weight_OI.float().abs() * seen.norm_I


def owl(shares: Sequence[float], weights: Sequence[int], sparsity: float) -> tuple[float, ...]:
    """The sparsity of each layer, from its share of outliers and the number of weights that it has to prune.

    Shares are laid out evenly over 2 * LAMBDA, the layer with the most outliers the densest, and shifted until the
    mean over all weights is `sparsity`. Departs from the authors' code: that mean is weighted by the layers'
    weights (theirs counts layers), no layer leaves [0, 0.99] (or [0, sparsity], if that is more; the others then
    make up for it), and equal shares give all layers the same (theirs: 0 / 0).
    """
    least, most = min(shares), max(shares)
    if least == most:
        return (sparsity,) * len(shares)
    offsets = [-2 * LAMBDA * (share - least) / (most - least) for share in shares]
    ceiling, budget = max(CEILING, sparsity), sparsity * sum(weights)

    def shifted(shift: float) -> tuple[float, ...]:
        return tuple(min(max(offset + shift, 0.0), ceiling) for offset in offsets)

    low, high = 0.0, 1 + 2 * LAMBDA  # all layers at zero, all at the ceiling: what is dropped grows in between
    for _ in range(64):  # to the last bit
        middle = (low + high) / 2
        dropped = sum(one * weight for one, weight in zip(shifted(middle), weights, strict=True))
        low, high = (middle, high) if dropped < budget else (low, middle)
    return shifted(high)
