"""Combines the moments of several texts at the input of a matrix, so that a mask serves all of them.

`mix` is in `moments`, `rank` in `ranks`. These combinations are ours. A channel's norm is normalised within the
matrix, so that a text whose inputs are larger everywhere does not outweigh the others:

    n_lj = s_lj / sqrt(mean over j of s_lj^2)    s_lj: root mean square of channel j over the tokens of text l

L: texts, each with a weight u_l; the weights sum to 1. I: input channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from mlprune.pruning.moments import Moments, mix
from mlprune.spec.calibrations import Combination

Parts = Sequence[tuple[Moments, Fraction]]


def combine(parts: Parts, combination: Combination) -> Moments:
    """Return moments whose norms combine those of the parts; see the module for n_lj.

    max: the maximum over l of u_l n_lj, relative to the largest weight.
    power=P: (sum over l of u_l n_lj^P)^(1/P). P = 2 is `mix` but for the normalisation.
    variance=LAMBDA: mean + LAMBDA * standard deviation over l, both weighted.

    A part without tokens is ignored. Only `mix` keeps Gram matrices.
    """
    if combination.kind == "mix" or len(parts) == 1:
        return mix(parts)
    seen = [(moments, weight) for moments, weight in parts if moments.tokens]
    if not seen:
        return mix(parts)
    total = sum((weight for _, weight in seen), Fraction(0))
    weight_L1 = seen[0][0].sumsq_I.new_tensor([float(weight / total) for _, weight in seen])[:, None]
    norm_I = _combined(_normalised(seen), weight_L1, combination)
    tokens = sum(moments.tokens for moments, _ in seen)
    return Moments(tokens, norm_I.square() * tokens)


def _normalised(parts: Parts) -> Tensor:
    """Return n_lj, float64 [L, I]; zero for a text whose inputs are all zero."""
    square_LI = torch.stack([moments.sumsq_I / moments.tokens for moments, _ in parts])
    mean_L1 = square_LI.mean(1, keepdim=True)
    return (square_LI / mean_L1.masked_fill(mean_L1 == 0, 1)).sqrt()


def _combined(norm_LI: Tensor, weight_L1: Tensor, combination: Combination) -> Tensor:
    if combination.kind == "max":
        return (norm_LI * weight_L1).amax(0) / weight_L1.max()
    assert combination.parameter is not None
    parameter = float(combination.parameter)
    if combination.kind == "power":
        largest_I = norm_LI.amax(0).clamp(min=torch.finfo(norm_LI.dtype).tiny)  # so that no power overflows
        return (weight_L1 * (norm_LI / largest_I) ** parameter).sum(0) ** (1 / parameter) * largest_I
    mean_I = (weight_L1 * norm_LI).sum(0)
    variance_I = (weight_L1 * (norm_LI - mean_I).square()).sum(0)
    return mean_I + parameter * variance_I.sqrt()
