"""The best rank: keeps the weights that any of several texts needs, each text by its own scores.

It combines calibrations by the ranks of weights, where `combinations` does by the norms of channels. The method is
ours.

O: output channels (rows). I: input channels. X: rows of I weights that are ranked among each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mlprune.spec.variants import Pattern

BLOCK = 2**18  # weights that are sorted together: their keys stay in a core's cache
LOW_32 = 2**32 - 1


def best_rank(
    scores: Iterable[tuple[Tensor, Fraction]], pattern: Pattern, within: Literal["row", "matrix"] = "row"
) -> Tensor:
    """Return the maximum over the texts of u_l / rank_l, float32 [O, I].

    `scores` yields score_OI of each text, float32, and the text's weight u_l. A weight's rank is its place, from
    1, when the weights of its group of n:m, its row or its matrix are sorted by descending score; of equal scores
    the lower index ranks lower. So the union of every text's highest weights is kept, and the number of them is
    proportional to u_l.

    In float32, ranks above 2^23 may round to the same value.
    """
    best_OI: Tensor | None = None
    for score_OI, weight in scores:
        width = pattern.group or (score_OI.numel() if within == "matrix" else score_OI.shape[1])
        if best_OI is None:
            best_OI = torch.zeros_like(score_OI)
        _raise_to_inverse_rank(best_OI.view(-1, width), score_OI.reshape(-1, width), float(weight))
    assert best_OI is not None
    return best_OI


def _raise_to_inverse_rank(best_XI: Tensor, score_XI: Tensor, weight: float) -> None:
    """Raise `best_XI` to weight / rank within each row of scores, in place."""
    width = score_XI.shape[1]
    rank_I = torch.arange(width, 0, -1, device=score_XI.device)  # of weights in ascending order
    value_1I = (weight / rank_I.double()).float()[None]
    rows = max(1, BLOCK // width)
    for best, score in zip(torch.split(best_XI, rows), torch.split(score_XI, rows), strict=True):
        value_XI = torch.empty_like(best).scatter_(1, _ascending(score), value_1I.expand_as(score))
        torch.maximum(best, value_XI, out=best)


def _ascending(score_XI: Tensor) -> Tensor:
    """Return the indices that sort each row, stably, int64 [X, I]."""
    if score_XI.device.type != "cpu":
        return score_XI.sort(dim=1, stable=True).indices
    # A sort of integers that hold score and index is ten times faster than a stable sort of scores: numpy's is
    # vectorised, but not stable. The bits of a float order as a signed integer, once those of a negative one flip.
    bits_XI = score_XI.contiguous().numpy().view(np.int32)
    key_XI = (bits_XI ^ ((bits_XI >> 31) & np.int32(2**31 - 1))).astype(np.int64)
    key_XI <<= 32
    key_XI |= np.arange(score_XI.shape[1])
    key_XI.sort(axis=1)
    key_XI &= LOW_32
    return torch.from_numpy(key_XI)
