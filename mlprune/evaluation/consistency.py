"""Does a model answer alike in two languages? From the scores of the labels of parallel items, right or wrong.

RankC: Qi, Fernández and Bisazza, "Cross-Lingual Consistency of Factual Knowledge in Multilingual Language Models"
(EMNLP 2023, arXiv 2310.10378). The code of Kim et al. (arXiv 2409.16911) sorts the labels by rising score, so it
compares the least likely ones first; here, as in the paper, the most likely ones come first.

N: items. L: labels.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mlprune.evaluation.items import Items, chosen


def rank_consistency(a: Items, b: Items) -> float:
    """RankC, from 0 to 1: mean over items of the weighted overlap of the j most likely labels, for every j.

    The weight of j is a softmax over L - j. Of equal scores the label of lower index comes first. An item with a
    NaN score has no ranking, and counts 0. `a` and `b` have the same ids. Raises ValueError when an item has not
    as many labels in one language as in the other.
    """
    assert a.ids == b.ids
    labels = [len(scores) for scores in a.columns["scores"]]
    if labels != [len(scores) for scores in b.columns["scores"]]:
        raise ValueError(f"{a.name} and {b.name}: an item has not as many labels in one as in the other")
    total = 0.0
    for size in set(labels):
        of_size = [place for place, found in enumerate(labels) if found == size]
        score_a_NL, score_b_NL = (np.array([x.columns["scores"][n] for n in of_size], float) for x in (a, b))
        total += float(_overlap(score_a_NL, score_b_NL).sum())
    return total / len(labels)


def _overlap(score_a_NL: NDArray[np.float64], score_b_NL: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] RankC of each item."""
    known_N = ~(np.isnan(score_a_NL) | np.isnan(score_b_NL)).any(1)
    depth_L = np.arange(1, score_a_NL.shape[1] + 1)
    # a label is among the first j of both languages when the lower of its two ranks is
    rank_NL = np.maximum(_ranks(score_a_NL), _ranks(score_b_NL))
    shared_NL = (rank_NL[:, :, None] < depth_L).sum(1) / depth_L
    weight_L = np.exp(-depth_L)
    overlap_N: NDArray[np.float64] = shared_NL @ weight_L / weight_L.sum()
    return np.where(known_N, overlap_N, 0.0)


def _ranks(score_NL: NDArray[np.float64]) -> NDArray[np.int64]:
    """[N, L] The place of each label when sorted by falling score: 0 the highest."""
    return np.argsort(np.argsort(-score_NL, axis=1, kind="stable"), axis=1, kind="stable")


def same_answers(a: Items, b: Items) -> float:
    """The share of items with the same label chosen. `a` and `b` have the same ids; a NaN score is no answer."""
    assert a.ids == b.ids
    alike = sum(one == other >= 0 for one, other in zip(chosen(a), chosen(b), strict=True))
    return alike / len(a.ids)


def consistency(items: Sequence[Items]) -> dict[str, float]:
    """`rankc.xnli.en-fr` and `agreement.xnli.en-fr` of each pair of languages of each choice task.

    A pair stands once, in order of appearance. Languages whose ids differ are not parallel, and left out: there is
    nothing to compare.
    """
    found: dict[str, float] = {}
    for a, b in combinations([each for each in items if each.kind == "choice"], 2):
        if a.task == b.task and a.ids == b.ids:
            name = f"{a.task}.{a.language}-{b.language}"
            found |= {f"rankc.{name}": rank_consistency(a, b), f"agreement.{name}": same_answers(a, b)}
    return found
