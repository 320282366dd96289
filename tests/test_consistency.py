"""Consistency between languages: RankC's worked cases, and a literal one on random scores."""

import math
import random

import pytest

from mlprune.evaluation.consistency import consistency, rank_consistency, same_answers
from mlprune.evaluation.items import Items

NAN = math.nan


def answers(*scores: list[float], language: str = "en", task: str = "xnli", first: int = 0) -> Items:
    ids = tuple(str(first + number) for number in range(len(scores)))
    return Items(task, language, "choice", ids, {"scores": scores, "answer": (0,) * len(scores)})


def literally(a: Items, b: Items) -> float:
    """RankC as the paper writes it: for each query, the sum over j of w_j * P@j."""
    total = 0.0
    for one, other in zip(a.columns["scores"], b.columns["scores"], strict=True):
        N = len(one)
        best = [sorted(range(N), key=lambda label: (-scores[label], label)) for scores in (one, other)]
        for j in range(1, N + 1):
            weight = math.exp(N - j) / sum(math.exp(N - k) for k in range(1, N + 1))
            total += weight * len(set(best[0][:j]) & set(best[1][:j])) / j
    return total / len(a.ids)


def test_worked_cases() -> None:
    """Three labels weigh e^2, e, 1 over their sum 11.107: 0.6652, 0.2447, 0.0900."""
    base = answers([3.0, 2.0, 1.0])
    # the same first, the tail swapped: P@1 = 1, P@2 = 1/2, P@3 = 1; 0.6652 + 0.1224 + 0.0900
    assert rank_consistency(base, answers([3.0, 1.0, 2.0])) == pytest.approx(0.8776, abs=5e-5)
    # the first two swapped: P@1 = 0, P@2 = 1, P@3 = 1; 0.2447 + 0.0900
    assert rank_consistency(base, answers([2.0, 3.0, 1.0])) == pytest.approx(0.3348, abs=5e-5)
    # another first, from the end: P@1 = 0, P@2 = 1/2, P@3 = 1; 0.1224 + 0.0900
    assert rank_consistency(base, answers([1.0, 2.0, 3.0])) == pytest.approx(0.2124, abs=5e-5)
    assert rank_consistency(base, answers([-1.0, -2.0, -3.0])) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_as_the_paper_writes_it(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 7) for _ in range(40)]
    # few values, so that many scores tie
    a, b = (answers(*([draw.randint(0, 4) / 3 for _ in range(size)] for size in sizes)) for _ in range(2))
    assert rank_consistency(a, b) == pytest.approx(literally(a, b), abs=1e-12)
    assert rank_consistency(a, b) == pytest.approx(rank_consistency(b, a), abs=1e-12)


def test_a_nan_agrees_with_nothing() -> None:
    a = answers([3.0, 2.0], [NAN, 2.0], [NAN, 2.0], [2.0, 3.0])
    b = answers([3.0, 2.0], [1.0, 2.0], [NAN, 2.0], [2.0, NAN])
    assert rank_consistency(a, b) == pytest.approx(1 / 4, abs=1e-15)
    assert same_answers(a, b) == 1 / 4


def test_infinite_scores_have_ranks() -> None:
    a, b = answers([-math.inf, 2.0, math.inf]), answers([1.0, 2.0, 3.0])
    assert rank_consistency(a, b) == pytest.approx(1, abs=1e-15)


def test_agreement_is_of_the_first_choice_right_or_wrong() -> None:
    a = answers([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 0.0])
    b = answers([3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 0.0, 0.0])
    assert same_answers(a, b) == 2 / 3


def test_each_pair_of_parallel_languages_once() -> None:
    en, fr = answers([3.0, 2.0, 1.0]), answers([3.0, 1.0, 2.0], language="fr")
    reviews = [answers([2.0, 1.0], language=code, task="reviews") for code in ("en", "de")]
    apart = answers([1.0, 2.0, 3.0], language="sw", first=7)
    nll = Items("xnli", "es", "likelihood", ("0",), {"nll": (1.0,), "tokens": (1,), "bytes": (1,)})
    found = consistency([fr, reviews[0], en, nll, apart, reviews[1]])
    assert found == pytest.approx(
        {
            "rankc.xnli.fr-en": 0.8776,
            "agreement.xnli.fr-en": 1.0,
            "rankc.reviews.en-de": 1.0,
            "agreement.reviews.en-de": 1.0,
        },
        abs=5e-5,
    )


def test_items_with_other_labels_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"xnli en and xnli fr: .*labels"):
        rank_consistency(answers([1.0, 2.0]), answers([1.0, 2.0, 3.0], language="fr"))
