"""Scores: a weight and the moments of its input in, the importance of each weight out.

O: output channels (rows). I: input channels. A new score is one function here and one line in SCORES.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlprune.errors import SpecError
from mlprune.pruning.moments import Moments


def random(weight_OI: Tensor, moments: Moments | None, seed: int) -> Tensor:
    """Uniform in [0, 1), from `seed`; drawn on the CPU, so that every device draws the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)


def magnitude(weight_OI: Tensor, moments: Moments | None, seed: int) -> Tensor:
    """|W| (Han et al. 2015). Compared within a row here, as Wanda is, to compare like with like."""
    return weight_OI.float().abs()


def wanda(weight_OI: Tensor, moments: Moments | None, seed: int) -> Tensor:
    """|W_ij| * ||X_j|| (Sun et al. 2024, arXiv 2306.11695).

    Departs from the authors' code in that pads count for nothing. Where no token was seen (an expert that
    nothing was routed to) every norm counts as one, which leaves |W|: the caller warns of it.
    """
    assert moments is not None
    if not moments.tokens:
        return magnitude(weight_OI, None, seed)
    return weight_OI.float().abs() * moments.norm_I


@dataclass(frozen=True)
class Score:
    """A scoring rule; one that reads no moments needs no calibration."""

    function: Callable[[Tensor, Moments | None, int], Tensor]
    reads_moments: bool


SCORES = {
    "random": Score(random, reads_moments=False),
    "magnitude": Score(magnitude, reads_moments=False),
    "wanda": Score(wanda, reads_moments=True),
}


def score_named(name: str, key: str = "score") -> Score:
    if name not in SCORES:
        raise SpecError(key, repr(name), f"no such score; write one of {', '.join(SCORES)}")
    return SCORES[name]
