"""Whether one run is better than another. Both have results for the same items, so they are compared item by item.

Intervals come from a paired bootstrap (Efron 1979; for BLEU Koehn, EMNLP 2004): items are drawn with replacement,
the same items for both runs. Every metric here is a function of sums over items, so a resample is a vector of
counts, and all resamples are one matrix product. The result is that of `scipy.stats.bootstrap(paired=True)`, as a
test verifies, in a fraction of the time. Intervals are percentile intervals, not BCa: percentiles exist when all
resamples are equal, and agree with the p-value, which comes from the same resamples.

Right or wrong answers are tested by McNemar's exact test instead (McNemar 1947): of the items that only one run
answered correctly, each run should have half. A percentile interval of few items is too narrow, by a factor of
about sqrt((N - 1) / N); and lines of one document count as independent, which also makes intervals narrower than
they should be.

N: items. R: resamples. C: columns of sums. L: languages.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlprune.evaluation.items import Items, outcomes, translation_scorers, values_of

Array = NDArray[np.float64]
Interval = tuple[float, float, float]  # a value, and the low and high end of its 95% confidence interval
RESAMPLES = 2000
SEED = 0  # fixed, so that comparing the same two runs always gives the same numbers
LEVEL = 0.05
LOWER_IS_BETTER = ("bits_per_byte", "perplexity", "word_perplexity", "byte_perplexity", "brier_score", "ter")
TEXTS = {"likelihood": "bytes", "choice": "answer", "translation": "reference"}  # columns equal in all runs


@dataclass(frozen=True)
class Difference:
    """The difference between run b and run a in one metric of one task in one language."""

    task: str
    language: str
    metric: str
    a: float
    b: float
    difference: float  # b - a
    low: float  # lower end of the difference's 95% interval
    high: float
    p: float  # two-sided, paired, for no difference; NaN, like the interval, where a or b is not finite
    adjusted: float  # p after Holm's correction over the languages of the task
    items: int
    # on b, at level 0.05 after Holm's correction
    verdict: Literal["better", "worse", "no difference shown"] = "no difference shown"


def compare(a: Sequence[Items], b: Sequence[Items]) -> list[Difference]:
    """Compare every metric of every task and language, in the order of `a`.

    The metrics are bits_per_byte, accuracy, a harness task's own metric, or bleu and chrf. Only items that both
    runs have are compared. Raises ValueError, naming the task and language, when one run lacks it, the runs share
    none of its items, or their texts differ.
    """
    differences = [difference for pair in _pairs(a, b) for difference in _differences(*pair)]
    families: dict[tuple[str, str], list[int]] = {}
    for index, difference in enumerate(differences):
        families.setdefault(family_of(difference), []).append(index)
    for indices in families.values():
        for index, adjusted in zip(indices, holm([differences[index].p for index in indices]), strict=True):
            differences[index] = _with_verdict(replace(differences[index], adjusted=adjusted))
    return differences


def _pairs(a: Sequence[Items], b: Sequence[Items]) -> list[tuple[Items, Items]]:
    """Return, for each task and language, the items that both runs have."""
    all_a, all_b = ({(x.task, x.language, x.kind, x.metric): x for x in run} for run in (a, b))
    assert (len(all_a), len(all_b)) == (len(a), len(b)), "a task and language is repeated in one run"
    alone = [x.name for key, x in (all_a | all_b).items() if key not in all_a or key not in all_b]
    if alone:
        raise ValueError(f"{', '.join(alone)}: only one of the two runs has it; compare runs of the same tasks")
    return [_shared(part, all_b[key]) for key, part in all_a.items()]


def _shared(a: Items, b: Items) -> tuple[Items, Items]:
    if a.ids != b.ids:
        ids_b = set(b.ids)
        ids = [name for name in a.ids if name in ids_b]
        if not ids:
            raise ValueError(f"{a.name}: the two runs have no item in common")
        a, b = a.select(ids), b.select(ids)
    if a.kind != "value" and a.columns[TEXTS[a.kind]] != b.columns[TEXTS[a.kind]]:
        raise ValueError(f"{a.name}: the two runs have different texts under the same item ids")
    return a, b


def _differences(a: Items, b: Items) -> list[Difference]:
    """Return one difference per metric, not yet adjusted and without a verdict."""
    values_a, values_b = values_of(a), values_of(b)
    if a.kind == "likelihood":
        del values_a["perplexity"], values_b["perplexity"]  # it follows from the same likelihoods
    finite = all(math.isfinite(value) for values in (values_a, values_b) for value in values.values())
    tests = _tests(a, b) if finite else dict.fromkeys(values_a, (math.nan, math.nan, math.nan))
    return [
        Difference(
            task=a.task,
            language=a.language,
            metric=metric,
            a=value,
            b=values_b[metric],
            difference=values_b[metric] - value,
            low=low,
            high=high,
            p=p,
            adjusted=p,
            items=len(a.ids),
        )
        for metric, value in values_a.items()
        for low, high, p in [tests[metric]]
    ]


def _tests(a: Items, b: Items) -> dict[str, tuple[float, float, float]]:
    """Return metric -> (low, high, p)."""
    counts_RN = _resamples(len(a.ids))
    if a.kind == "likelihood":
        delta_N = _column(b, "nll") - _column(a, "nll")
        delta_R = (counts_RN @ delta_N) / (counts_RN @ _column(a, "bytes")) / math.log(2)
        return {"bits_per_byte": (*_interval(delta_R), _bootstrap_p(delta_R, int(np.count_nonzero(delta_N))))}
    if a.kind == "translation":
        return _translation_tests(a, b, counts_RN)
    value_a_N, value_b_N = np.array(outcomes(a)), np.array(outcomes(b))
    delta_N = value_b_N - value_a_N
    delta_R = counts_RN @ delta_N / len(delta_N)
    if np.isin([value_a_N, value_b_N], (0.0, 1.0)).all():
        p = mcnemar(int((delta_N < 0).sum()), int((delta_N > 0).sum()))
    else:
        p = _bootstrap_p(delta_R, int(np.count_nonzero(delta_N)))
    return {a.metric or "accuracy": (*_interval(delta_R), p)}


def _translation_tests(a: Items, b: Items, counts_RN: Array) -> dict[str, tuple[float, float, float]]:
    """Return the tests of BLEU and chrF, which are functions of n-gram counts summed over segments.

    sacrebleu counts once per segment. Its own paired test uses the same two methods, which are not public; we do
    not use that test because it gives no interval of the difference, and its seed comes from the environment.
    """
    tests = {}
    for metric, scorer in translation_scorers(a.language).items():
        sums_a_NC, sums_b_NC = (
            np.array(scorer._extract_corpus_statistics(x.columns["output"], [x.columns["reference"]]), float)
            for x in (a, b)
        )
        score_a_R, score_b_R = (
            np.array([scorer._compute_score_from_stats(row).score for row in (counts_RN @ sums_NC).tolist()])
            for sums_NC in (sums_a_NC, sums_b_NC)
        )
        delta_R = score_b_R - score_a_R
        p = _bootstrap_p(delta_R, int((sums_a_NC != sums_b_NC).any(1).sum()))
        tests[metric] = (*_interval(delta_R), p)
    return tests


def _column(items: Items, name: str) -> Array:
    return np.array(items.columns[name], float)


@functools.lru_cache(maxsize=1)  # the next language, or trial, usually has the same number of items
def _resamples(items: int, stream: int = 0) -> Array:
    """Return how often each resample draws each item, [R, N]. Each stream has its own draws."""
    draw = np.random.default_rng((SEED, stream))
    counts_RN = np.empty((RESAMPLES, items))
    for count_N in counts_RN:
        count_N[:] = np.bincount(draw.integers(items, size=items), minlength=items)
    return counts_RN


def _interval(value_R: Array) -> tuple[float, float]:
    low, high = np.quantile(value_R, (0.025, 0.975))
    return float(low), float(high)


def _bootstrap_p(delta_R: Array, differing: int) -> float:
    """Return twice the share of resamples beyond zero on the rarer side, counting the observed sample (+1).

    It is never below 2 / (R + 1) = 0.001, so with more than 50 languages no difference can be significant. It is
    also never below 2^(1 - n) when n items differ: if the signs were random, all n would point in one direction
    that often. The bootstrap alone cannot show that: two items of the same sign never resample to zero.
    """
    beyond = min((delta_R <= 0).sum(), (delta_R >= 0).sum())
    return min(1.0, max(2 * (int(beyond) + 1) / (len(delta_R) + 1), 2.0 ** (1 - differing)))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p when `only_a` items were right only in run a, and `only_b` only in run b."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the number of tests (Holm 1979). NaN means no test: it stays, uncounted."""
    tested = sorted((index for index, p in enumerate(ps) if not math.isnan(p)), key=ps.__getitem__)
    adjusted, highest = [math.nan] * len(ps), 0.0
    for rank, index in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted


def family_of(difference: Difference) -> tuple[str, str]:
    """Return the family of tests for Holm's correction: a task in all its languages, and a metric.

    The harness has one task per language, named after it: `xnli_fr` belongs to the family `xnli`.
    """
    task, language = difference.task, difference.language
    return task.removesuffix(f"_{language}") if language else task, difference.metric


def gain(difference: Difference) -> float:
    """Return how much better b is than a, in the metric's units; -inf for a b that is not finite."""
    sign = -1 if difference.metric in LOWER_IS_BETTER else 1
    return sign * difference.difference if math.isfinite(difference.b) else -math.inf


def _with_verdict(difference: Difference) -> Difference:
    """Add the verdict. A value that is not finite is worse than any finite one: the model is broken."""
    if math.isfinite(difference.a) and math.isfinite(difference.b):
        if not difference.adjusted < LEVEL:
            return difference
        better = gain(difference) > 0
    elif math.isfinite(difference.a) or math.isfinite(difference.b):
        better = math.isfinite(difference.b)
    else:
        return difference
    return replace(difference, verdict="better" if better else "worse")


def mean_ratio_interval(a: Sequence[Items], b: Sequence[Items]) -> Interval:
    """Return the ratio of run b's mean bits per byte over languages to run a's, minus 1, and its 95% interval.

    0.04 means 4% more than run a. Languages with the same ids are parallel text: a resample draws the same lines
    of all of them. Other languages are drawn independently. The interval is NaN where a likelihood is not finite.
    Raises ValueError as `compare` does.
    """
    pairs = _pairs(*([part for part in run if part.kind == "likelihood"] for run in (a, b)))
    bits_a, bits_b = (sum(values_of(pair[run])["bits_per_byte"] for pair in pairs) for run in (0, 1))
    ratio = bits_b / bits_a - 1
    if not (math.isfinite(bits_a) and math.isfinite(bits_b)):
        return ratio, math.nan, math.nan
    parallel: dict[tuple[str, ...], list[tuple[Items, Items]]] = {}
    for pair in pairs:
        parallel.setdefault(pair[0].ids, []).append(pair)
    bits_R, delta_R = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for stream, group in enumerate(parallel.values()):
        counts_RN = _resamples(len(group[0][0].ids), stream)
        nll_NL, bytes_NL = (
            np.stack([_column(part_a, name) for part_a, _ in group], 1) for name in ("nll", "bytes")
        )
        delta_NL = np.stack([_column(part_b, "nll") for _, part_b in group], 1) - nll_NL
        bytes_RL = counts_RN @ bytes_NL
        bits_R += (counts_RN @ nll_NL / bytes_RL).sum(1)
        delta_R += (counts_RN @ delta_NL / bytes_RL).sum(1)
    return (ratio, *_interval(delta_R / bits_R))
