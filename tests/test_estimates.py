"""Estimates: by hand, against the t-test of means, and how often the interval holds the truth."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats

from mlprune.evaluation import resampling
from mlprune.evaluation.estimates import Estimate, estimate, rank_correlation
from mlprune.evaluation.items import Items
from mlprune.evaluation.loss import loss_samples
from mlprune.evaluation.resampling import Samples, clusters, metric_samples
from tests.runs import Array, likelihood, value

NAN, INF = math.nan, math.inf


def samples_of(values: Sequence[float] | Array) -> Samples:
    return metric_samples([value(values)], ["squad.f1"])["squad.f1"]


def test_one_seed_is_the_t_test_of_the_differences() -> None:
    draw = np.random.default_rng(0)
    a = draw.uniform(size=12)
    b = a + draw.normal(0.05, 0.2, 12)
    ours = estimate([samples_of(b)], 12, [samples_of(a)])
    theirs = scipy.stats.ttest_rel(b, a)
    low, high = theirs.confidence_interval()
    assert ours.value == pytest.approx(b.mean() - a.mean())
    assert ours.p == pytest.approx(theirs.pvalue, rel=0.1)
    assert [ours.low, ours.high] == pytest.approx([low, high], abs=0.02 * (high - low))
    alone = estimate([samples_of(b)], 12)
    assert alone.value == pytest.approx(b.mean())
    assert alone.p == pytest.approx(scipy.stats.ttest_1samp(b, 0).pvalue, rel=0.3)


def test_lines_and_seeds_by_hand() -> None:
    """Resamples -1, 0, 1 of every seed: variance 1, times 3/2 for three clusters. Seeds 1, 3, 8: SD^2 13, S 3."""
    seeds = [np.array([mean, mean - 1, mean, mean + 1.0]) for mean in (1.0, 3.0, 8.0)]
    lines, between = 1.5, 13 / 3
    freedom = (lines + between) ** 2 / (lines**2 / 2 + between**2 / 2)
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(lines + between)
    p = 2 * scipy.stats.t.sf(4 / math.sqrt(lines + between), freedom)
    result = estimate(seeds, 3)
    assert [*vars(result).values()] == pytest.approx([4, 4 - half, 4 + half, p])
    assert estimate(seeds, 3, [np.zeros(4)]) == result, "one baseline for all seeds"
    paired = estimate(seeds, 3, [seed - 2 for seed in seeds])
    assert vars(paired) == pytest.approx({"value": 2, "low": 2, "high": 2, "p": 0}), "the seeds all differ by 2"


def test_samples_of_seeds_are_averaged_before_their_error() -> None:
    """Opposite errors cancel: the lines' error is that of the mean over seeds, not of one of them."""
    seeds = [np.array([1.0, 0.0, 2.0]), np.array([1.0, 2.0, 0.0])]
    assert estimate(seeds, 5) == Estimate(1.0, 1.0, 1.0, 0.0)


def test_what_cannot_be_said() -> None:
    one = np.array([2.0, 2.0, 2.0])
    assert estimate([one], 1) == Estimate(2.0, -INF, INF, 1.0)
    assert estimate([one], 7, [one]) == estimate([one], 1, [one]) == Estimate(0.0, 0.0, 0.0, 1.0)
    assert estimate([one], 7, [one * (1 + 2e-16)]) == Estimate(0.0, 0.0, 0.0, 1.0), "rounding is no difference"
    for broken in (np.array([INF, 1.0, INF]), np.array([NAN, NAN, 1.0]), np.array([1.0, NAN, 1.0])):
        assert repr(estimate([one, broken], 5)) == repr(Estimate(float((2 + broken[0]) / 2), NAN, NAN, NAN))
    infinite = np.array([INF, INF, INF])
    assert repr(estimate([infinite], 5, [infinite])) == repr(Estimate(NAN, NAN, NAN, NAN))


def estimate_losses(draw: np.random.Generator, documents: int, seeds: int) -> Estimate:
    """Estimate the mean loss, of truth 0.05, on documents of 1 to 11 lines, which share most of the harm."""
    document_N = np.repeat(np.arange(documents), draw.integers(1, 12, documents))
    count = len(document_N)
    harm_D, harm_S = draw.normal(0.05, 0.03, documents), draw.normal(0, 0.02 if seeds > 1 else 0, seeds)
    dense: list[Items] = []
    runs: list[list[Items]] = [[] for _ in range(seeds)]
    for language in ("en", "fr"):
        size = draw.integers(20, 200, count)
        nll = size * draw.lognormal(0, 0.2, documents)[document_N]
        harm_N = (harm_D + draw.normal(0, 0.01, documents))[document_N]
        dense.append(likelihood(nll, size, language, document_N))
        for run, harm in zip(runs, harm_S, strict=True):
            more = 1 + harm_N + harm + draw.normal(0, 0.01, count)
            run.append(likelihood(nll * more, size, language, document_N))
    samples = [loss_samples(run, dense, ["loss.mean"])["loss.mean"] for run in runs]
    return estimate(samples, clusters(dense, ["loss.mean"]))


@pytest.mark.parametrize(("documents", "seeds"), [(5, 1), (10, 1), (30, 1), (10, 3)])
def test_the_interval_holds_the_truth(documents: int, seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 800 intervals of 95%, between 92 and 98% hold the truth, also with few documents."""
    resampling._draws.cache_clear()
    monkeypatch.setattr(resampling, "RESAMPLES", 400)
    draw = np.random.default_rng(documents)
    results = [estimate_losses(draw, documents, seeds) for _ in range(800)]
    resampling._draws.cache_clear()
    held = sum(result.low <= 0.05 <= result.high for result in results) / 800
    assert 0.92 <= held <= 0.98


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [2, 4, 6, 9]) == pytest.approx((1, 2 / 24))
    assert rank_correlation([1, 2, NAN, 3], [9, 8, 100, 7])[0] == pytest.approx(-1)
    assert all(map(math.isnan, rank_correlation([1, 2, 3], [5, 5, 5])))
    assert all(map(math.isnan, rank_correlation([1, NAN], [NAN, 1])))
