"""What is summed over a calibration set at the input of one matrix.

I: input channels. T: tokens, pads left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Tokens seen, and each channel's sum of squares over them (float64). Merged by addition.

    Within a micro-batch the sum is float32 (torch adds pairwise), between micro-batches float64: the
    order of micro-batches is fixed by the calibration set, so the sum does not depend on the shards.
    """

    tokens: int
    sumsq_I: Tensor

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu") -> Moments:
        return cls(0, torch.zeros(channels, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, input_TI: Tensor) -> Moments:
        values = input_TI.float()
        return cls(len(values), (values * values).sum(0).double())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.tokens + other.tokens, self.sumsq_I + other.sumsq_I)

    def to(self, device: torch.device) -> Moments:
        return Moments(self.tokens, self.sumsq_I.to(device))

    @property
    def norm_I(self) -> Tensor:
        """||X_j||, the L2 norm of each channel over the tokens, float32."""
        return self.sumsq_I.sqrt().float()


def mixed(parts: Sequence[tuple[Moments, Fraction]]) -> Moments:
    """The moments of a mixture: each part counts for its weight, whatever its number of tokens.

    A part of n tokens out of N is scaled by weight * N / n: by 1 when the weights are the parts' shares of
    the tokens, so that such a mixture is the plain sum. A part that saw no token adds nothing.
    """
    if len(parts) == 1:
        return parts[0][0]
    total = sum(moments.tokens for moments, _ in parts)
    sumsq_I = torch.zeros_like(parts[0][0].sumsq_I)
    for moments, weight in parts:
        if moments.tokens:
            sumsq_I += moments.sumsq_I * float(weight * total / moments.tokens)
    return Moments(total, sumsq_I)
