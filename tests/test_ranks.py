"""The best rank of a weight over several texts: a worked example, and a plain form on random scores."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import pytest
import torch
from torch import Tensor

from mlprune.pruning.masks import keep_mask
from mlprune.pruning.ranks import best_rank
from mlprune.spec.variants import Pattern

Within = Literal["row", "matrix"]
PLAIN = Pattern()


def plain_best_rank(
    scores: Sequence[tuple[Tensor, Fraction]], pattern: Pattern, within: Within = "row"
) -> list[list[float]]:
    """One weight at a time: u / (1 + how many rank above it)."""
    rows, width = scores[0][0].shape
    best = [[0.0] * width for _ in range(rows)]
    for score_OI, weight in scores:
        flat = score_OI.flatten().tolist()
        for place in range(rows * width):
            if pattern.group:
                start = place // pattern.group * pattern.group
                group = range(start, start + pattern.group)
            else:
                start = place // width * width
                group = range(start, start + width) if within == "row" else range(rows * width)
            above = sum((flat[other], other) > (flat[place], place) for other in group)
            row, column = divmod(place, width)
            best[row][column] = max(best[row][column], float(weight) / (1 + above))
    return best


def test_the_worked_example() -> None:
    """Ranks of the first text 1 2 3 4, of the second 4 2 1 3: the best are 1 2 1 3."""
    first, second = torch.tensor([[9.0, 8.0, 7.0, 6.0]]), torch.tensor([[1.0, 7.0, 9.0, 2.0]])
    half = Fraction(1, 2)
    best = best_rank([(first, half), (second, half)], PLAIN)
    assert (0.5 / best).tolist() == [[1, 2, 1, 3]]
    assert keep_mask(best, 0.5, PLAIN).tolist() == [[True, False, True, False]]
    # four times the weight: 0.8 / (1 2 3 4) and 0.2 / (4 2 1 3)
    best = best_rank([(first, Fraction(4, 5)), (second, Fraction(1, 5))], PLAIN)
    assert best.tolist() == [pytest.approx([0.8, 0.4, 0.8 / 3, 0.2])]


def test_of_equal_scores_the_lower_index_ranks_lower() -> None:
    score = torch.tensor([[3.0, 3.0, 3.0, 5.0]])
    assert (1 / best_rank([(score, Fraction(1))], PLAIN)).round().tolist() == [[4, 3, 2, 1]]


def random_scores(seed: int, shape: tuple[int, int], texts: int) -> list[tuple[Tensor, Fraction]]:
    """Scores with ties and zeros, and weights that differ."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(shape, generator=generator).abs()
    weight_OI[torch.rand(shape, generator=generator) < 0.2] = 0
    weight_OI[:, -1] = weight_OI[:, 0]
    scores = [weight_OI * torch.randn(shape[1], generator=generator).exp() for _ in range(texts)]
    return [(score.round(decimals=1), Fraction(n + 1, 7)) for n, score in enumerate(scores)]


@pytest.mark.parametrize("negative", [False, True], ids=["scores", "negated"])
@pytest.mark.parametrize("texts", [1, 2, 4])
@pytest.mark.parametrize(
    ("pattern", "within"), [("unstructured", "row"), ("unstructured", "matrix"), ("2:4", "row"), ("2:4", "matrix")]
)
def test_equals_the_plain_form(pattern: str, within: Within, texts: int, negative: bool) -> None:
    scores = random_scores(texts, (5, 24), texts)
    if negative:
        scores = [(-score, weight) for score, weight in scores]
    best = best_rank(iter(scores), Pattern.parse(pattern), within)
    plain = torch.tensor(plain_best_rank(scores, Pattern.parse(pattern), within), dtype=torch.float64)
    assert torch.equal(best, plain.float())


def test_rows_that_are_sorted_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(3, (7, 40), 3)
    whole = best_rank(scores, PLAIN)
    monkeypatch.setattr("mlprune.pruning.ranks.BLOCK", 90)
    assert torch.equal(best_rank(scores, PLAIN), whole)


def test_the_mask_is_the_union_of_the_highest_weights_of_each_text() -> None:
    """With equal weights every text keeps its highest k, for one k a row, but for ties of the last rank."""
    scores = [(score, Fraction(1, 3)) for score, _ in random_scores(5, (6, 64), 3)]
    scores = [(score + torch.rand(6, 64), weight) for score, weight in scores]  # no ties
    keep_OI = keep_mask(best_rank(scores, PLAIN), 0.5, PLAIN)
    assert keep_OI.sum(1).tolist() == [32] * 6
    for row in range(6):
        for count in range(65):
            tops = [set(score[row].topk(count).indices.tolist()) for score, _ in scores]
            if len(set.union(*tops)) >= 32:
                break
        fewer = set.union(*(set(score[row].topk(count - 1).indices.tolist()) for score, _ in scores))
        kept = set(keep_OI[row].nonzero()[:, 0].tolist())
        assert fewer <= kept <= set.union(*tops)


def test_inputs_stay_unchanged() -> None:
    scores = random_scores(6, (3, 8), 2)
    copies = [score.clone() for score, _ in scores]
    best_rank(scores, PLAIN)
    assert all(torch.equal(score, copy) for (score, _), copy in zip(scores, copies, strict=True))
