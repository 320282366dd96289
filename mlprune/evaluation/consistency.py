"""Consistency: whether a model answers parallel items alike in two languages, be the answers right or wrong.

It is computed from the scores of the labels, for choice tasks only.

RankC: Qi, Fernández and Bisazza, "Cross-Lingual Consistency of Factual Knowledge in Multilingual Language Models"
(EMNLP 2023, arXiv 2310.10378). The code of Kim et al. (arXiv 2409.16911) sorts the labels by rising score, so it
compares the least likely labels first; here, as in the paper by Qi et al., the most likely labels come first.

N: items. L: labels.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mlprune.evaluation.items import Items, chosen_labels

Array = NDArray[np.float64]


def rank_consistency(a: Items, b: Items) -> float:
    """Return RankC: the mean of `rank_overlaps` over items."""
    return float(rank_overlaps(a, b).sum()) / len(a.ids)


def rank_overlaps(a: Items, b: Items) -> Array:
    """Return the weighted overlap of the j most likely labels, over every j, for each item: [N], from 0 to 1.

    The weight of j is a softmax over L - j. Among equal scores the label of lower index comes first. An item with
    a NaN score has no ranking and counts as 0. `a` and `b` must have the same ids. Raises ValueError when an item
    has different numbers of labels in the two languages.
    """
    assert a.ids == b.ids
    labels = [len(scores) for scores in a.columns["scores"]]
    if labels != [len(scores) for scores in b.columns["scores"]]:
        raise ValueError(f"{a.name} and {b.name}: an item has different numbers of labels in the two")
    overlap_N = np.empty(len(labels))
    for size in set(labels):
        indices = [index for index, count in enumerate(labels) if count == size]
        score_a_NL, score_b_NL = (np.array([x.columns["scores"][n] for n in indices], float) for x in (a, b))
        overlap_N[indices] = _overlap(score_a_NL, score_b_NL)
    return overlap_N


def _overlap(score_a_NL: Array, score_b_NL: Array) -> Array:
    """Return the RankC of each item, [N], when all have the same number of labels."""
    known_N = ~(np.isnan(score_a_NL) | np.isnan(score_b_NL)).any(1)
    depth_L = np.arange(1, score_a_NL.shape[1] + 1)
    # a label is among the first j of both languages if the larger of its two rank numbers is below j
    rank_NL = np.maximum(_ranks(score_a_NL), _ranks(score_b_NL))
    shared_NL = (rank_NL[:, :, None] < depth_L).sum(1) / depth_L
    weight_L = np.exp(-depth_L)
    overlap_N: Array = shared_NL @ weight_L / weight_L.sum()
    return np.where(known_N, overlap_N, 0.0)


def _ranks(score_NL: Array) -> NDArray[np.int64]:
    """Return the rank of each label by falling score, [N, L]: 0 for the highest score."""
    return np.argsort(np.argsort(-score_NL, axis=1, kind="stable"), axis=1, kind="stable")


def same_answers(a: Items, b: Items) -> float:
    """Return the share of items with the same chosen label: the mean of `agreements`."""
    return float(agreements(a, b).sum()) / len(a.ids)


def agreements(a: Items, b: Items) -> Array:
    """Return 1.0 for each item with the same chosen label, else 0.0: [N]. NaN scores never agree.

    `a` and `b` must have the same ids.
    """
    assert a.ids == b.ids
    pairs = zip(chosen_labels(a), chosen_labels(b), strict=True)
    return np.array([float(label_a == label_b >= 0) for label_a, label_b in pairs])


def language_pairs(items: Sequence[Items]) -> dict[str, tuple[Items, Items]]:
    """Return the pairs of languages of each choice task by name, e.g. `xnli.en-fr`.

    Each pair occurs once, in order of appearance. Languages whose ids differ are not parallel, so they are left
    out.
    """
    return {
        f"{a.task}.{a.language}-{b.language}": (a, b)
        for a, b in combinations([part for part in items if part.kind == "choice"], 2)
        if a.task == b.task and a.ids == b.ids
    }


def consistency(items: Sequence[Items]) -> dict[str, float]:
    """Return `rankc.xnli.en-fr` and `agreement.xnli.en-fr` for each of the `language_pairs`."""
    metrics: dict[str, float] = {}
    for name, (a, b) in language_pairs(items).items():
        metrics |= {f"rankc.{name}": rank_consistency(a, b), f"agreement.{name}": same_answers(a, b)}
    return metrics
