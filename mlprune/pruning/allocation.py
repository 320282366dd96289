"""Allocation of a target sparsity to the layers of a model.

`uniform` gives every layer the same sparsity. `owl` (Yin et al. 2024, arXiv 2310.05175) keeps a layer denser if
its scores contain more outliers. Scores and masks are not here.

O: output channels (rows). I: input channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlprune.pruning.moments import Moments

OUTLIER = 5  # an outlier is more than this many times the mean: the paper's M
LAMBDA = 0.08  # two layers' sparsities differ by at most twice this: the paper's lambda
# No layer is emptied to keep others denser, unless the requested sparsity is higher still.
CEILING = 0.99


def outlier_share(matrices: Sequence[tuple[Tensor, Moments]]) -> float:
    """Return the share of outliers among |W_ij| * ||X_j|| over all matrices of one decoder layer, each [O, I].

    The mean is taken over all the matrices together. An expert's matrix that no token reached is ignored. To save
    memory, scores are computed twice, one matrix at a time, and not kept.
    """
    count = sum(weight_OI.numel() for weight_OI, moments in matrices if moments.tokens)
    if not count:
        return 0.0
    total = sum(float(score_OI.sum(dtype=torch.float64)) for score_OI in _scores(matrices))
    threshold = OUTLIER * total / count
    return sum(int((score_OI > threshold).sum()) for score_OI in _scores(matrices)) / count


def _scores(matrices: Sequence[tuple[Tensor, Moments]]) -> Iterator[Tensor]:
    for weight_OI, moments in matrices:
        if moments.tokens:
            yield weight_OI.float().abs() * moments.norm_I


def owl(shares: Sequence[float], weights: Sequence[int], sparsity: float) -> tuple[float, ...]:
    """Return the sparsity of each layer, from its share of outliers and the number of its prunable weights.

    The shares are scaled linearly to a range of 2 * LAMBDA, with the most outliers giving the lowest sparsity, and
    shifted until the mean over all weights is `sparsity`. Departures from the authors' code:

    - the mean is weighted by the layers' numbers of weights (theirs counts layers);
    - every layer stays within [0, 0.99], or [0, sparsity] if that is wider, and the other layers compensate;
    - equal shares give all layers the same sparsity (theirs: 0 / 0).
    """
    least, most = min(shares), max(shares)
    if least == most:
        return (sparsity,) * len(shares)
    offsets = [-2 * LAMBDA * (share - least) / (most - least) for share in shares]
    ceiling, budget = max(CEILING, sparsity), sparsity * sum(weights)

    def shifted(shift: float) -> tuple[float, ...]:
        return tuple(min(max(offset + shift, 0.0), ceiling) for offset in offsets)

    # at `low` all layers are at zero, at `high` all are at the ceiling; the number dropped grows with the shift
    low, high = 0.0, 1 + 2 * LAMBDA
    for _ in range(64):  # enough halvings for the last bit of a float64
        middle = (low + high) / 2
        dropped = sum(ratio * weight for ratio, weight in zip(shifted(middle), weights, strict=True))
        low, high = (middle, high) if dropped < budget else (low, middle)
    return shifted(high)
