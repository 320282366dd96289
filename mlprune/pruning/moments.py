"""Moments: sums over the tokens of a calibration set at the input of one matrix.

How the inputs are observed is in `models.matrices`. I: input channels. T: tokens, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """The number of tokens, and each channel's sum of squares over them (float64). Merged by addition.

    `gram_II`, the Gram matrix, is the sum over the tokens of x x^T (float64). It is computed only on request,
    because it is as large as a weight matrix. When moments are added or mixed, either all or none of them have
    it.

    Sums are float32 within a micro-batch (torch adds squares pairwise; a Gram matrix is one product) and float64
    between micro-batches. The calibration set fixes the order of micro-batches, so no sum depends on the shards.
    """

    tokens: int
    sumsq_I: Tensor
    gram_II: Tensor | None = None

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu", gram: bool = False) -> Moments:
        """Return the moments of no token."""
        sumsq_I = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(0, sumsq_I, sumsq_I.new_zeros(channels, channels) if gram else None)

    @classmethod
    def of(cls, input_TI: Tensor, gram: bool = False) -> Moments:
        """Return the moments of one micro-batch of inputs."""
        values = input_TI.float()
        # squares are not taken from the Gram matrix, so that they are bit-identical with and without one
        sumsq_I = (values * values).sum(0).double()
        return cls(len(values), sumsq_I, (values.T @ values).double() if gram else None)

    def __add__(self, other: Moments) -> Moments:
        tokens, sumsq_I = self.tokens + other.tokens, self.sumsq_I + other.sumsq_I
        if self.gram_II is None or other.gram_II is None:
            assert self.gram_II is other.gram_II, "either all moments have a Gram matrix, or none"
            return Moments(tokens, sumsq_I)
        return Moments(tokens, sumsq_I, self.gram_II + other.gram_II)

    def to(self, device: torch.device) -> Moments:
        """Return the moments on a device."""
        gram_II = None if self.gram_II is None else self.gram_II.to(device)
        return Moments(self.tokens, self.sumsq_I.to(device), gram_II)

    @property
    def norm_I(self) -> Tensor:
        """Return ||X_j||, the L2 norm of each channel over the tokens, float32."""
        return self.sumsq_I.sqrt().float()


def mix(parts: Sequence[tuple[Moments, Fraction]]) -> Moments:
    """Return the moments of a mixture. Each part has the given weight, whatever its number of tokens.

    A part of n tokens out of N is scaled by weight * N / n. If the weights are the parts' shares of the tokens,
    that factor is 1 and the mixture is the plain sum. A part without tokens adds nothing.
    """
    if len(parts) == 1:
        return parts[0][0]
    total = sum(moments.tokens for moments, _ in parts)
    factors = [float(weight * total / moments.tokens) if moments.tokens else 0.0 for moments, weight in parts]
    grams = [moments.gram_II for moments, _ in parts if moments.gram_II is not None]
    sumsq_I = _scaled_sum([moments.sumsq_I for moments, _ in parts], factors)
    return Moments(total, sumsq_I, _scaled_sum(grams, factors) if grams else None)


def _scaled_sum(sums: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    total = torch.zeros_like(sums[0])
    for part, factor in zip(sums, factors, strict=True):
        total += part * factor
    return total
