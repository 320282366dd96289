"""Scores: a weight and the moments of its input in, the importance of each weight out; the smallest are dropped.

O: output channels (rows). I: input channels. A new score is one function here and one line in SCORES. It is given
the moments of as many calibrations as it reads (`sides`). Where one of them saw no token (an expert that nothing
was routed to) the score is |W|: the caller warns of it. Unlike in the authors' code, pads count for nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlprune.errors import SpecError
from mlprune.pruning.moments import Moments
from mlprune.pruning.sparsegpt import sparsegpt
from mlprune.spec.variants import Pattern

# rows that are sorted at a time: sorting takes five times the memory of what is sorted
SORTED_ROWS = 1024


def random(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """Uniform in [0, 1), from `seed`; drawn on the CPU, so that every device draws the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)


def magnitude(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """|W| (Han et al. 2015). Compared within a row here, as Wanda is, to compare like with like."""
    return weight_OI.float().abs()


def wanda(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """|W_ij| * ||X_j|| (Sun et al. 2024, arXiv 2306.11695)."""
    (seen,) = sides
    if not seen.tokens:
        return magnitude(weight_OI, (), seed)
    return weight_OI.float().abs() * seen.norm_I


def wanda_alpha(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """The variant in Wanda's appendix: a row drops its smallest scores while their sum is within alpha of its own.

    A weight's score is the share of its row's sum that is reached with it. One alpha serves the matrix: compared
    within the matrix, it is the quantile that drops just as many as asked, where the authors bisect to within a
    thousandth. A row of zeros has shares of zero. Shares are float32: sorted, the k-th of a row is at least
    k / (k - 1) times the one before it, so rounding changes no order.
    """
    score_OI = wanda(weight_OI, sides, seed)
    if not _all_seen(sides):
        return score_OI
    return torch.cat([_shares(part_OI) for part_OI in torch.split(score_OI, SORTED_ROWS)])


def _shares(score_OI: Tensor) -> Tensor:
    """For each score the sum of its row up to it, in order of size, over the row's sum."""
    sorted_OI, place_OI = score_OI.sort(dim=1, stable=True)
    sum_OI = sorted_OI.cumsum(1, dtype=torch.float64)
    whole_O1 = sum_OI[:, -1:].clone()
    sum_OI /= whole_O1.masked_fill_(whole_O1 == 0, 1)
    return torch.empty_like(score_OI).scatter_(1, place_OI, sum_OI.float())


def contrastive(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """|W_ij| * ||X_keep,j||^2 / ||X_against,j||, of `sides` (keep, against) (Kim et al. 2024, arXiv 2409.16911).

    Departs from the authors' code, where the order of a set decides which side is which, and a zero denominator
    makes inf, or NaN, which is kept. Here a channel that neither side uses scores zero, and one that only `keep`
    uses is divided by the smallest norm above zero that `against` has in the matrix, by one if it has none. Norms
    are root mean squares over the tokens, so that sets of any size compare; within a row that changes no order.
    """
    keep, against = sides
    if not _all_seen(sides):
        return magnitude(weight_OI, (), seed)
    norm_I = (against.sumsq_I / against.tokens).sqrt()
    used = norm_I[norm_I > 0]
    norm_I = norm_I.masked_fill(norm_I == 0, float(used.min()) if len(used) else 1.0)
    return weight_OI.float().abs() * (keep.sumsq_I / keep.tokens / norm_I).float()


def inverse_magnitude(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """-|W|, so that the largest go: a control (Kim et al. 2024)."""
    return -magnitude(weight_OI, sides, seed)


def inverse_wanda(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """Wanda's score negated, so that the largest go: a control (Kim et al. 2024)."""
    return -wanda(weight_OI, sides, seed)


def ria(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """(|W_ij| / sum of row i + |W_ij| / sum of column j) * ||X_j||^0.5 (Zhang et al. 2024).

    Compared within the matrix: the authors' default. Departs from their code in that rows and columns of zeros
    score zero, not NaN, and channels are not permuted for n:m.
    """
    (seen,) = sides
    if not seen.tokens:
        return magnitude(weight_OI, (), seed)
    abs_OI = weight_OI.float().abs()
    row_O1, column_1I = abs_OI.sum(1, keepdim=True), abs_OI.sum(0, keepdim=True)
    relative_OI = abs_OI / row_O1.masked_fill(row_O1 == 0, 1) + abs_OI / column_1I.masked_fill(column_1I == 0, 1)
    return relative_OI * seen.norm_I.sqrt()


def _all_seen(sides: Sequence[Moments]) -> bool:
    return all(side.tokens for side in sides)


@dataclass(frozen=True)
class Score:
    """A scoring rule: (weight_OI, moments of its sides, seed) -> score_OI, float32. `keep_mask` chooses by it.

    `sides` is how many calibrations it reads: none, one, or two (keep, against). `within` is what its scores are
    compared within.
    """

    function: Callable[[Tensor, Sequence[Moments], int], Tensor]
    sides: int
    within: Literal["row", "matrix"] = "row"


@dataclass(frozen=True)
class Solver:
    """A rule that chooses by itself and changes what it keeps.

    (weight_OI, moments with a gram, sparsity, pattern) -> (keep_OI bool, weight_OI changed, float32).
    """

    function: Callable[[Tensor, Moments, float, Pattern], tuple[Tensor, Tensor]]
    sides: int = 1


SCORES: dict[str, Score | Solver] = {
    "random": Score(random, sides=0),
    "magnitude": Score(magnitude, sides=0),
    "wanda": Score(wanda, sides=1),
    "wanda-alpha": Score(wanda_alpha, sides=1, within="matrix"),
    "contrastive": Score(contrastive, sides=2),
    "inverse-magnitude": Score(inverse_magnitude, sides=0),
    "inverse-wanda": Score(inverse_wanda, sides=1),
    "ria": Score(ria, sides=1, within="matrix"),
    "sparsegpt": Solver(sparsegpt),
}


def find_score(name: str, key: str = "score") -> Score | Solver:
    if name not in SCORES:
        raise SpecError(key, repr(name), f"no such score; write one of {', '.join(SCORES)}")
    return SCORES[name]
