"""Differences between runs, with intervals and tests that allow for few documents and for seeds.

Samples come from `resampling` and `loss`. An interval is that of Student's t around the difference. Percentiles
of the resamples are not used: with few documents they are far too narrow, and p-values taken from R resamples are
never below 2 / (R + 1), so that none would survive a correction over dozens of trials.

S: seeds. R: resamples, after the run itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlprune.evaluation.resampling import Samples

ROUNDING = 1e-12  # values of equal runs differ by less: the order of a sum depends on what else is summed


@dataclass(frozen=True)
class Estimate:
    """A difference, its 95% confidence interval, and the two-sided p-value for no difference."""

    value: float
    low: float
    high: float
    p: float


def estimate(samples: Sequence[Samples], clusters: int, against: Sequence[Samples] | None = None) -> Estimate:
    """Return the difference between the means over seeds of `samples` and of `against`.

    `samples`: one per seed. `against`: as many, paired with them; or one, for all seeds; None: zero. `clusters`:
    the effective number D of independent units (see `resampling.clusters`). Documents of unequal length must not
    count in full: intervals would be too narrow (of 95%, 90% held the truth for ten lognormal lengths).

    The squared standard error is the sum of two parts. Lines: the bootstrap's variance of the difference, times
    D / (D - 1), because the bootstrap's variance is (D - 1) / D of the sample's. Seeds: the variance of the
    difference between seeds, divided by S. With one seed the second part is 0: the estimate then says nothing
    about other seeds. The degrees of freedom are those of Welch and Satterthwaite, from D - 1 and S - 1. The
    interaction of seeds and lines is in both parts, so the interval is rather too wide than too narrow.

    One cluster says nothing: the interval is infinite and p is 1. Runs that do not differ have an interval without
    width, and p is 1. Interval and p are NaN where a sample is not finite.
    """
    with np.errstate(invalid="ignore"):  # of two broken models
        difference_SR = np.array(samples) - (0.0 if against is None else np.array(against))
    value = float(difference_SR[:, 0].mean())
    if not np.isfinite(difference_SR).all():
        return Estimate(value, math.nan, math.nan, math.nan)
    difference_SR[abs(difference_SR) < ROUNDING] = 0.0
    if not difference_SR.any():
        return Estimate(0.0, 0.0, 0.0, 1.0)
    if clusters == 1:
        return Estimate(value, -math.inf, math.inf, 1.0)
    seeds = len(difference_SR)
    variances = [float(difference_SR[:, 1:].mean(0).var(ddof=1)) * clusters / (clusters - 1)]
    freedoms = [clusters - 1]
    if seeds > 1:
        variances.append(float(difference_SR[:, 0].var(ddof=1)) / seeds)
        freedoms.append(seeds - 1)
    return _student(value, variances, freedoms)


def _student(value: float, variances: Sequence[float], freedoms: Sequence[int]) -> Estimate:
    """Return the estimate with a variance that is a sum of variances, each with its degrees of freedom."""
    from scipy.stats import t

    variance = sum(variances)
    if not variance:
        return Estimate(value, value, value, 0.0)
    freedom = variance**2 / sum(part**2 / own for part, own in zip(variances, freedoms, strict=True))
    error = math.sqrt(variance)
    half = float(t.ppf(0.975, freedom)) * error
    return Estimate(value, value - half, value + half, float(2 * t.sf(abs(value) / error, freedom)))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return Kendall's tau-b and its two-sided p-value. Pairs with a NaN are left out.

    Both are NaN if fewer than two pairs remain, or all values of `a` or of `b` are equal.
    """
    from scipy.stats import kendalltau

    pairs = np.array([a, b]).T
    pairs = pairs[~np.isnan(pairs).any(1)]
    if len(pairs) < 2:
        return math.nan, math.nan
    result = kendalltau(pairs[:, 0], pairs[:, 1])
    return float(result.statistic), float(result.pvalue)
