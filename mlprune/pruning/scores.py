"""Scores: the rules that rank the weights of a matrix; the weights with the smallest scores are dropped.

A score is a function of a weight matrix and the moments of its input. To add one, write a function here and a
line in SCORES. Which weights are dropped is decided in `masks`.

`sides` holds the moments of the calibrations that a score reads. Where one of them has no token (no token was
routed to an expert), the score is |W|, and the caller warns. Unlike in the authors' code, padding tokens are
ignored.

O: output channels (rows). I: input channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from mlprune.errors import SpecError
from mlprune.pruning.masks import Within
from mlprune.pruning.moments import Moments
from mlprune.pruning.sparsegpt import sparsegpt
from mlprune.spec.variants import Pattern

# rows that are sorted together: sorting needs five times the memory of its input
SORTED_ROWS = 1024


def random(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """Uniform in [0, 1), from `seed`. Drawn on the CPU, so that the values are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)


def magnitude(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """|W| (Han et al. 2015). Compared within a row here, as Wanda is, so that the two are comparable."""
    return weight_OI.float().abs()


def wanda(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """|W_ij| * ||X_j|| (Sun et al. 2024, arXiv 2306.11695)."""
    (moments,) = sides
    if not moments.tokens:
        return magnitude(weight_OI, (), seed)
    return weight_OI.float().abs() * moments.norm_I


def wanda_alpha(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """Wanda's variant with a sparsity per row (its appendix): a row drops a share alpha of the sum of its scores.

    A weight's score is the share of its row's sum that is reached with it, in order of size. One alpha holds for
    the whole matrix. The shares are compared within the matrix, so alpha is the quantile that drops exactly the
    requested number of weights; the authors bisect alpha to within a thousandth. In a row of zeros every share
    is zero. Shares are float32: in sorted order, the k-th share of a row is at least k / (k - 1) times the one
    before it, so rounding does not change the order.
    """
    score_OI = wanda(weight_OI, sides, seed)
    if not _all_seen(sides):
        return score_OI
    return torch.cat([_shares(part_OI) for part_OI in torch.split(score_OI, SORTED_ROWS)])


def _shares(score_OI: Tensor) -> Tensor:
    """Return for each score the sum of the row's scores up to it, in order of size, divided by the row's sum."""
    sorted_OI, index_OI = score_OI.sort(dim=1, stable=True)
    sum_OI = sorted_OI.cumsum(1, dtype=torch.float64)
    whole_O1 = sum_OI[:, -1:].clone()
    sum_OI /= whole_O1.masked_fill_(whole_O1 == 0, 1)
    return torch.empty_like(score_OI).scatter_(1, index_OI, sum_OI.float())


def contrastive(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """|W_ij| * ||X_keep,j||^2 / ||X_against,j||, of `sides` (keep, against) (Kim et al. 2024, arXiv 2409.16911).

    Departures from the authors' code, in which the order of a Python set decides which side is which, and a zero
    denominator gives inf, or NaN, which is kept:

    - a channel that neither side uses scores zero;
    - a channel that only `keep` uses is divided by the smallest positive norm that `against` has in the matrix,
      or by one if it has none;
    - norms are root mean squares over the tokens, so that sets of different sizes are comparable; this does not
      change the order within a row.
    """
    keep, against = sides
    if not _all_seen(sides):
        return magnitude(weight_OI, (), seed)
    norm_I = (against.sumsq_I / against.tokens).sqrt()
    used = norm_I[norm_I > 0]
    norm_I = norm_I.masked_fill(norm_I == 0, float(used.min()) if len(used) else 1.0)
    return weight_OI.float().abs() * (keep.sumsq_I / keep.tokens / norm_I).float()


def inverse_magnitude(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """-|W|, so that the largest weights are dropped: a control (Kim et al. 2024)."""
    return -magnitude(weight_OI, sides, seed)


def inverse_wanda(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """The negated Wanda score, so that the highest Wanda scores are dropped: a control (Kim et al. 2024)."""
    return -wanda(weight_OI, sides, seed)


def ria(weight_OI: Tensor, sides: Sequence[Moments], seed: int) -> Tensor:
    """(|W_ij| / sum of row i + |W_ij| / sum of column j) * ||X_j||^0.5 (Zhang et al. 2024).

    Compared within the matrix: the authors' default. Departures from their code: rows and columns of zeros score
    zero, not NaN, and channels are not permuted for n:m.
    """
    (moments,) = sides
    if not moments.tokens:
        return magnitude(weight_OI, (), seed)
    abs_OI = weight_OI.float().abs()
    row_O1, column_1I = abs_OI.sum(1, keepdim=True), abs_OI.sum(0, keepdim=True)
    relative_OI = abs_OI / row_O1.masked_fill(row_O1 == 0, 1) + abs_OI / column_1I.masked_fill(column_1I == 0, 1)
    return relative_OI * moments.norm_I.sqrt()


def _all_seen(sides: Sequence[Moments]) -> bool:
    return all(side.tokens for side in sides)


@dataclass(frozen=True)
class Score:
    """A scoring rule by which `keep_mask` selects weights.

    `function` maps (weight_OI, moments of its sides, seed) to score_OI, float32. `sides` is the number of
    calibrations that it reads: none, one, or two (keep, against). `within` is what an unstructured mask compares
    its scores within. `seeded`: the scores depend on the seed.
    """

    function: Callable[[Tensor, Sequence[Moments], int], Tensor]
    sides: int
    within: Within = "row"
    seeded: bool = False


@dataclass(frozen=True)
class Solver:
    """A rule that selects the weights to keep itself, and changes their values.

    `function` maps (weight_OI, moments with a Gram matrix, sparsity, pattern) to (keep_OI bool, new weight_OI,
    float32). `within` is what its number of dropped weights is counted within.
    """

    function: Callable[[Tensor, Moments, float | Fraction, Pattern], tuple[Tensor, Tensor]]
    sides: int = 1
    within: Within = "matrix"


SCORES: dict[str, Score | Solver] = {
    "random": Score(random, sides=0, seeded=True),
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
    """Return the score of this name. Raises SpecError, which names `key`, if there is none."""
    if name not in SCORES:
        raise SpecError(key, repr(name), f"no such score; write one of {', '.join(SCORES)}")
    return SCORES[name]
