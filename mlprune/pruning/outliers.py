"""Outliers among a layer's scores, by which `owl` allocates (Yin et al. 2024, arXiv 2310.05175).

The signal only; what a layer drops because of it is in `allocation`.

O: output channels (rows). I: input channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlprune.pruning.moments import Moments

OUTLIER = 5  # an outlier is more than this many times the mean: the paper's M
SPREAD = 0.16  # between the sparsest and the densest layer: twice the paper's lambda


def outlier_share(matrices: Sequence[tuple[Tensor, Moments]]) -> float:
    """Return the share of outliers among |W_ij| * ||X_j|| over all matrices of one decoder layer, each [O, I].

    The mean is taken over all the matrices together. An expert's matrix that no token reached is ignored. To save
    memory, scores are computed twice, one matrix at a time, and not kept. Departures from the authors' code are in
    `allocation.linear_ratios`: the mean sparsity is weighted by the layers' numbers of weights (theirs counts
    layers), every layer stays within bounds, and layers with equal shares are pruned equally (theirs: 0 / 0).
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
