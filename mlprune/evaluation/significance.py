"""Whether one run is better than another. Both have results for the same items, so they are compared item by item.

Intervals and p-values are those of `estimates`, from a paired bootstrap over documents or, where items have none,
over items. Right or wrong answers that belong to no documents are tested by McNemar's exact test instead (McNemar
1947): of the items that only one run answered correctly, each run should have half.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mlprune.evaluation.estimates import estimate
from mlprune.evaluation.items import Items, metric_name, outcomes, values_of
from mlprune.evaluation.loss import lower_is_better, shared_items
from mlprune.evaluation.resampling import clusters, metric_samples

LEVEL = 0.05


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
    names_a, names_b = ({(part.kind, part.name): part.name for part in run} for run in (a, b))
    if alone := [name for key, name in (names_a | names_b).items() if key not in names_a or key not in names_b]:
        raise ValueError(f"{', '.join(alone)}: only one of the two runs has it; compare runs of the same tasks")
    shared_a, shared_b = shared_items(a, b)
    return list(zip(shared_a, shared_b, strict=True))


def _differences(a: Items, b: Items) -> list[Difference]:
    """Return one difference per metric, not yet adjusted and without a verdict."""
    # perplexity follows from the same likelihoods as bits per byte
    names = {
        metric: metric_name(a, metric) for metric in a.metrics if a.kind != "likelihood" or metric != "perplexity"
    }
    samples_a, samples_b = (metric_samples([run], names.values()) for run in (a, b))
    values_a, values_b = values_of(a), values_of(b)
    differences = []
    for metric, name in names.items():
        result = estimate([samples_b[name]], clusters([a], [name]), [samples_a[name]])
        p = mcnemar(*_only_one_right(a, b)) if _is_right_or_wrong(a, b) else result.p
        values = (values_a[metric], values_b[metric], values_b[metric] - values_a[metric])
        differences.append(
            Difference(
                a.task, a.language, metric, *values, result.low, result.high, p, adjusted=p, items=len(a.ids)
            )
        )
    return differences


def _is_right_or_wrong(a: Items, b: Items) -> bool:
    """Return whether McNemar's test applies: all outcomes are 0 or 1, and the items are independent."""
    if a.kind not in ("choice", "value") or a.documents:
        return False
    return {*outcomes(a), *outcomes(b)} <= {0.0, 1.0}


def _only_one_right(a: Items, b: Items) -> tuple[int, int]:
    """Return how many items only run a, and how many only run b, answered correctly."""
    pairs = list(zip(outcomes(a), outcomes(b), strict=True))
    return pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))


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
    sign = -1 if lower_is_better(difference.metric) else 1
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
