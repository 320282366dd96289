"""Is one run better than another? Both answered the same items, so they are compared item by item.

Intervals are of a paired bootstrap (Efron 1979; for BLEU Koehn, EMNLP 2004): items are drawn with replacement, the
same ones for both runs. Every metric here is a function of sums over items, so a resample is a vector of counts,
and all of them are one matrix product. That gives what `scipy.stats.bootstrap(paired=True)` does, to which a test
holds it, in a fraction of the time. Intervals are percentiles, not BCa: percentiles exist when all resamples are
equal, and agree with the p that comes from the same resamples.

Right or wrong answers are tested by McNemar's exact test instead (McNemar 1947): of the items that only one run
answered rightly, each run should have half. A percentile interval of few items is too narrow, about as
sqrt((N - 1) / N); and lines of one document count as independent, which makes intervals narrower than they should
be.

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
RESAMPLES = 2000
SEED = 0  # fixed: the same two runs are told the same
LEVEL = 0.05
LOWER_IS_BETTER = ("bits_per_byte", "perplexity", "word_perplexity", "byte_perplexity", "brier_score", "ter")
TEXTS = {"likelihood": "bytes", "choice": "answer", "translation": "reference"}  # columns that no run changes


Interval = tuple[float, float, float]  # a value, and the low and high end of its 95% confidence interval


@dataclass(frozen=True)
class Difference:
    """How run b differs from run a in one metric of one task in one language."""

    task: str
    language: str
    metric: str
    a: float
    b: float
    difference: float  # b - a
    low: float  # 95% interval of the difference
    high: float
    p: float  # of no difference, two-sided, paired; NaN, as is the interval, where a or b is not finite
    adjusted: float  # p after Holm, over the languages of the task
    items: int
    verdict: Literal["better", "worse", "no difference shown"] = "no difference shown"  # of b, at 0.05 after Holm


def compare(a: Sequence[Items], b: Sequence[Items]) -> list[Difference]:
    """Every metric of every task and language, in the order of `a`.

    That is bits_per_byte, accuracy, a harness task's own metric, or bleu and chrf. Only items that both runs have
    are compared. Raises ValueError, naming it, for a task and language that one run lacks, of which the runs share
    no item, or of which their texts differ.
    """
    found = [difference for pair in _pairs(a, b) for difference in _differences(*pair)]
    families: dict[tuple[str, str], list[int]] = {}
    for place, each in enumerate(found):
        families.setdefault(family_of(each), []).append(place)
    for places in families.values():
        for place, adjusted in zip(places, holm([found[place].p for place in places]), strict=True):
            found[place] = _judged(replace(found[place], adjusted=adjusted))
    return found


def _pairs(a: Sequence[Items], b: Sequence[Items]) -> list[tuple[Items, Items]]:
    """The items that both runs have of each task and language."""
    all_a, all_b = ({(x.task, x.language, x.kind, x.metric): x for x in run} for run in (a, b))
    assert (len(all_a), len(all_b)) == (len(a), len(b)), "a task and language twice in one run"
    alone = [x.name for key, x in (all_a | all_b).items() if key not in all_a or key not in all_b]
    if alone:
        raise ValueError(f"{', '.join(alone)}: only one of the two runs has it; compare runs of the same tasks")
    return [_shared(each, all_b[key]) for key, each in all_a.items()]


def _shared(a: Items, b: Items) -> tuple[Items, Items]:
    if a.ids != b.ids:
        of_b = set(b.ids)
        ids = [name for name in a.ids if name in of_b]
        if not ids:
            raise ValueError(f"{a.name}: the two runs have no item in common")
        a, b = a.at(ids), b.at(ids)
    if a.kind != "value" and a.columns[TEXTS[a.kind]] != b.columns[TEXTS[a.kind]]:
        raise ValueError(f"{a.name}: the two runs have other texts under the same names of items")
    return a, b


def _differences(a: Items, b: Items) -> list[Difference]:
    """One a metric, not yet adjusted or judged."""
    values_a, values_b = values_of(a), values_of(b)
    if a.kind == "likelihood":
        del values_a["perplexity"], values_b["perplexity"]  # the same likelihoods once more
    finite = all(math.isfinite(value) for values in (values_a, values_b) for value in values.values())
    tests = _tests(a, b) if finite else dict.fromkeys(values_a, (math.nan, math.nan, math.nan))
    return [
        Difference(
            a.task, a.language, metric, one, values_b[metric], values_b[metric] - one, low, high, p, p, len(a.ids)
        )
        for metric, one in values_a.items()
        for low, high, p in [tests[metric]]
    ]


def _tests(a: Items, b: Items) -> dict[str, tuple[float, float, float]]:
    """Metric -> low, high, p."""
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
    """BLEU and chrF are functions of counts of n-grams summed over segments; sacrebleu counts, once a segment.

    Its own paired test uses the same two methods, which are not public; it gives no interval of the
    difference, and its seed comes from the environment.
    """
    found = {}
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
        found[metric] = (*_interval(delta_R), p)
    return found


def _column(items: Items, name: str) -> Array:
    return np.array(items.columns[name], float)


@functools.lru_cache(maxsize=1)  # the next language, or trial, mostly has as many items
def _resamples(items: int, stream: int = 0) -> Array:
    """[R, N] How often each resample draws each item. Another stream, other draws."""
    draw = np.random.default_rng((SEED, stream))
    counts_RN = np.empty((RESAMPLES, items))
    for count_N in counts_RN:
        count_N[:] = np.bincount(draw.integers(items, size=items), minlength=items)
    return counts_RN


def _interval(value_R: Array) -> tuple[float, float]:
    low, high = np.quantile(value_R, (0.025, 0.975))
    return float(low), float(high)


def _bootstrap_p(delta_R: Array, differing: int) -> float:
    """Twice the share of resamples beyond zero on the rarer side, itself counted among them (+1).

    Never below 2 / (R + 1) = 0.001, so over more than 50 languages none can be shown to differ. Nor below
    2^(1 - n) when n items differ: if signs were chance, all n would point one way that often. A bootstrap cannot
    know: two items of the same sign never resample to zero.
    """
    beyond = min((delta_R <= 0).sum(), (delta_R >= 0).sum())
    return min(1.0, max(2 * (int(beyond) + 1) / (len(delta_R) + 1), 2.0 ** (1 - differing)))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p when `only_a` items were right in run a alone, `only_b` in run b alone."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """p adjusted for the number of tests (Holm 1979). A NaN was no test, stays, and does not count."""
    tested = sorted((place for place, p in enumerate(ps) if not math.isnan(p)), key=ps.__getitem__)
    adjusted, highest = [math.nan] * len(ps), 0.0
    for rank, place in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * ps[place]))
        adjusted[place] = highest
    return adjusted


def family_of(found: Difference) -> tuple[str, str]:
    """A task in all its languages, and a metric: what Holm's correction is over.

    A harness has a task a language, named for it: `xnli_fr` is of the family `xnli`.
    """
    return found.task.removesuffix(f"_{found.language}") if found.language else found.task, found.metric


def gain(found: Difference) -> float:
    """How much better b is than a, in the metric's units; a b that is not finite is the least."""
    sign = -1 if found.metric in LOWER_IS_BETTER else 1
    return sign * found.difference if math.isfinite(found.b) else -math.inf


def _judged(found: Difference) -> Difference:
    """A value that is not finite is worse than any that is: the model is in pieces."""
    if math.isfinite(found.a) and math.isfinite(found.b):
        if not found.adjusted < LEVEL:
            return found
        better = gain(found) > 0
    elif math.isfinite(found.a) or math.isfinite(found.b):
        better = math.isfinite(found.b)
    else:
        return found
    return replace(found, verdict="better" if better else "worse")


def mean_ratio_interval(a: Sequence[Items], b: Sequence[Items]) -> Interval:
    """How much higher run b's mean bits per byte over languages is than run a's (0.04: 4%), low and high of 95%.

    Languages with the same ids are parallel text: a resample draws the same lines of all. Others are
    drawn independently. The interval is NaN where a likelihood is not finite. Raises ValueError as `compare` does.
    """
    pairs = _pairs(*([x for x in run if x.kind == "likelihood"] for run in (a, b)))
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
        nll_NL, bytes_NL = (np.stack([_column(one, name) for one, _ in group], 1) for name in ("nll", "bytes"))
        delta_NL = np.stack([_column(other, "nll") for _, other in group], 1) - nll_NL
        bytes_RL = counts_RN @ bytes_NL
        bits_R += (counts_RN @ nll_NL / bytes_RL).sum(1)
        delta_R += (counts_RN @ delta_NL / bytes_RL).sum(1)
    return (ratio, *_interval(delta_R / bits_R))
