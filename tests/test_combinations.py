"""Combinations of calibrations: worked examples, and properties that every combination has."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mlprune.pruning.combinations import combine
from mlprune.pruning.masks import keep_mask
from mlprune.pruning.moments import Moments, mix
from mlprune.pruning.scores import wanda
from mlprune.spec.calibrations import Combination
from mlprune.spec.variants import Pattern

HALF = Fraction(1, 2)
ALL = ("mix", "max", "power=2", "power=8", "power=0.5", "variance=0", "variance=1.5")
# mean squares 1 and 3: n = (sqrt(1/2), sqrt(3/2)); mean squares 9 and 1: n = (sqrt(9/5), sqrt(1/5))
FIRST = Moments(2, torch.tensor([2.0, 6.0], dtype=torch.float64))
SECOND = Moments(10, torch.tensor([90.0, 10.0], dtype=torch.float64))


def norms(moments: Moments) -> list[float]:
    root: list[float] = (moments.sumsq_I / moments.tokens).sqrt().tolist()
    return root


def combined(text: str, parts: Sequence[tuple[Moments, Fraction]]) -> Moments:
    return combine(parts, Combination.parse(text))


@pytest.mark.parametrize(
    ("text", "weights", "expected"),
    [
        ("max", (HALF, HALF), [1.8**0.5, 1.5**0.5]),
        ("max", (Fraction(3, 4), Fraction(1, 4)), [0.5**0.5, 1.5**0.5]),  # of the second a third: 0.447 and 0.149
        ("power=2", (HALF, HALF), [1.15**0.5, 0.85**0.5]),
        ("power=1", (HALF, HALF), [(0.5**0.5 + 1.8**0.5) / 2, (1.5**0.5 + 0.2**0.5) / 2]),
        ("power=2", (Fraction(1, 4), Fraction(3, 4)), [1.475**0.5, 0.525**0.5]),
        ("variance=0", (HALF, HALF), [(0.5**0.5 + 1.8**0.5) / 2, (1.5**0.5 + 0.2**0.5) / 2]),
        # of two values, mean plus standard deviation is the larger one
        ("variance=1", (HALF, HALF), [1.8**0.5, 1.5**0.5]),
    ],
)
def test_a_combination_equals_the_worked_example(
    text: str, weights: tuple[Fraction, Fraction], expected: list[float]
) -> None:
    moments = combined(text, [(FIRST, weights[0]), (SECOND, weights[1])])
    assert moments.tokens == 12
    assert norms(moments) == pytest.approx(expected)


def random_parts(seed: int, texts: int) -> list[tuple[Moments, Fraction]]:
    generator = torch.Generator().manual_seed(seed)
    scale_I = torch.logspace(-3, 3, 24)
    parts = [Moments.of(torch.randn(9 + n, 24, generator=generator) * scale_I.roll(n)) for n in range(texts)]
    return [(part, Fraction(1, texts)) for part in parts]


@pytest.mark.parametrize("text", ALL[1:])
def test_the_size_of_a_text_does_not_matter(text: str) -> None:
    """Neither the number of its tokens, nor inputs that are larger everywhere."""
    parts = random_parts(0, 3)
    larger = Moments(parts[0][0].tokens * 7, parts[0][0].sumsq_I * 7 * 100)
    expected = norms(combined(text, parts))
    assert norms(combined(text, [(larger, parts[0][1]), *parts[1:]])) == pytest.approx(expected)


@pytest.mark.parametrize("text", ALL)
def test_a_text_without_tokens_is_ignored(text: str) -> None:
    parts = random_parts(1, 2)
    empty = [(Moments.zeros(24), HALF)]
    weight_OI = torch.randn(6, 24)

    def mask(parts: Sequence[tuple[Moments, Fraction]]) -> Tensor:
        return keep_mask(wanda(weight_OI, [combined(text, parts)], 0), 0.5, Pattern())

    assert torch.equal(mask([*parts, *empty]), mask(parts))
    assert combined(text, [*empty, *empty]).tokens == 0


@pytest.mark.parametrize("text", ALL)
def test_one_text_alone_gives_its_own_mask(text: str) -> None:
    ((moments, _),) = random_parts(2, 1)
    weight_OI = torch.randn(6, 24)
    twice = combined(text, [(moments, HALF), (moments, HALF)])
    masks = [keep_mask(wanda(weight_OI, [one], 0), 0.5, Pattern()) for one in (moments, twice)]
    assert torch.equal(*masks)


def test_the_power_mean_goes_from_the_mean_to_the_maximum() -> None:
    parts = random_parts(3, 3)
    powers = [torch.tensor(norms(combined(f"power={p}", parts))) for p in (0.5, 1, 2, 8, 64, 100)]
    for smaller, larger in pairwise(powers):
        assert (larger >= smaller * (1 - 1e-6)).all()
    largest = torch.tensor(norms(combined("max", parts)))
    assert (powers[-1] / largest - 1).abs().max() < 0.02
    assert norms(combined("power=1", parts)) == pytest.approx(norms(combined("variance=0", parts)))


def test_channels_that_are_always_zero_and_texts_of_zeros() -> None:
    zero = Moments(3, torch.zeros(2, dtype=torch.float64))
    for text in ALL[1:]:
        assert norms(combined(text, [(zero, HALF), (zero, HALF)])) == [0, 0]
        half_dead = Moments(3, torch.tensor([0.0, 3.0], dtype=torch.float64))
        values = norms(combined(text, [(half_dead, HALF), (half_dead, HALF)]))
        assert values == pytest.approx([0, 2**0.5])


def test_mix_is_that_of_the_moments() -> None:
    parts = random_parts(4, 3)
    assert torch.equal(combined("mix", parts).sumsq_I, mix(parts).sumsq_I)
