"""The share of a matrix's energy that a mask drops on some text: the forecast of the damage to that text.

O: output channels. I: input channels. L: texts.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**18  # weights whose squares are held at a time: a core's cache, and little memory beside a large matrix


def dropped_energy(weight_OI: Tensor, keep_OI: Tensor, sumsq_LI: Tensor) -> Tensor:
    """Return the sum over dropped (i, j) of w_ij^2 s_lj as a share of the sum over all (i, j): float64 [L].

    `weight_OI` are dense weights; s_lj = `sumsq_LI` (float64) is the sum of squares of input channel j over the
    tokens of text l (their mean would give the same share). NaN for a text without energy: its tokens do not reach
    the matrix, which is an expert's.

    As in moments, sums are float32 within a block of rows, and float64 between blocks.

    The measure is ours. It is the squared change of each output, summed, if input channels were uncorrelated.
    """
    total_I = torch.zeros_like(sumsq_LI[0])
    dropped_I = torch.zeros_like(sumsq_LI[0])
    rows = max(1, BLOCK // weight_OI.shape[1])
    for block_OI, keep in zip(torch.split(weight_OI, rows), torch.split(keep_OI, rows), strict=True):
        squares_OI = block_OI.float().square()
        total_I += squares_OI.sum(0)
        dropped_I += squares_OI.mul_(~keep).sum(0)
    return (sumsq_LI * dropped_I).sum(1) / (sumsq_LI * total_I).sum(1)
