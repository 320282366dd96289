"""Allocation: worked examples of linear ratios, and exact totals for any layers and matrices."""

from functools import partial
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlprune.pruning.allocation import layer_counts, linear_ratios, matrix_counts

owl = partial(linear_ratios, spread=0.16)


def mean(ratios: tuple[float, ...], weights: list[int]) -> float:
    return sum(ratio * weight for ratio, weight in zip(ratios, weights, strict=True)) / sum(weights)


# ratios of layers


def test_worked_example_of_owl() -> None:
    # from 0 to 0.16 in the order of outliers: 0, 0.08, 0.16; shifted to a mean of a half
    assert owl([0.01, 0.03, 0.05], [7, 7, 7], 0.5) == pytest.approx((0.58, 0.5, 0.42), abs=1e-12)
    assert owl([0.05, 0.01, 0.03], [7, 7, 7], 0.5) == pytest.approx((0.42, 0.58, 0.5), abs=1e-12)
    # a layer three times as large as the other: 0.54 * 3 + 0.38 = 2 = 0.5 * 4
    assert owl([0.0, 0.2], [3, 1], 0.5) == pytest.approx((0.54, 0.38), abs=1e-12)


def test_layer_clamped_to_zero_is_compensated_by_the_others() -> None:
    # unclamped 0.11, 0.03, -0.05; the third is 0, and the first two lose its 0.05 in equal parts
    assert owl([0.0, 0.5, 1.0], [1, 1, 1], 0.03) == pytest.approx((0.085, 0.005, 0.0), abs=1e-12)
    # then the second is clamped too, and only the first compensates
    assert owl([0.0, 0.5, 1.0], [1, 1, 1], 0.02) == pytest.approx((0.06, 0.0, 0.0), abs=1e-12)
    assert owl([0.0, 0.5, 1.0], [5, 1, 4], 0.02) == pytest.approx((0.04, 0.0, 0.0), abs=1e-12)


def test_no_layer_is_emptied_to_keep_another_denser() -> None:
    # unclamped 1.04, 0.96, 0.88: 0.05 above 0.99 goes to the other two
    assert owl([0.0, 0.5, 1.0], [1, 1, 1], 0.96) == pytest.approx((0.99, 0.985, 0.905), abs=1e-12)
    # more than 0.99 is requested: all layers are at the ceiling
    assert owl([0.0, 0.5, 1.0], [1, 2, 3], 0.995) == pytest.approx((0.995,) * 3, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.0123])
def test_equal_layers_are_pruned_equally(share: float) -> None:
    assert owl([share] * 4, [1, 2, 3, 4], 0.3) == (0.3,) * 4
    assert owl([share], [5], 0.7) == (0.7,)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=40),
    st.integers(0, 999),
)
def test_mean_is_exact_and_more_outliers_are_never_sparser(layers: list[tuple[float, int]], mille: int) -> None:
    shares, weights, sparsity = [share for share, _ in layers], [weight for _, weight in layers], mille / 1000
    ratios = owl(shares, weights, sparsity)
    assert mean(ratios, weights) == pytest.approx(sparsity, abs=1e-14)
    assert all(0 <= ratio <= max(0.99, sparsity) for ratio in ratios)
    assert max(ratios) - min(ratios) <= 0.16 + 1e-12
    by_share = sorted(zip(shares, ratios, strict=True))
    assert all(fewer[1] >= more[1] for fewer, more in pairwise(by_share))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.integers(170, 830))
def test_shares_are_scaled_linearly_to_the_whole_range(shares: list[float], mille: int) -> None:
    assume(max(shares) - min(shares) > 1e-6)
    ratios = owl(shares, list(range(1, len(shares) + 1)), mille / 1000)  # far enough from both ends for no clamp
    assert max(ratios) - min(ratios) == pytest.approx(0.16, abs=1e-12)
    spread = max(shares) - min(shares)
    for share, ratio in zip(shares, ratios, strict=True):
        assert max(ratios) - ratio == pytest.approx(0.16 * (share - min(shares)) / spread, abs=1e-12)


# whole numbers


def test_worked_example_of_rounding_to_a_total() -> None:
    # 2.5, 1.25 and 2.25 of 5 weights: one more is missing from the floors, and goes to the largest remainder
    assert layer_counts((0.5, 0.25, 0.45), [5, 5, 5], 6) == (3, 1, 2)
    assert layer_counts((0.5, 0.5), [5, 5], 5) == (3, 2), "of equal remainders the first goes up"
    assert layer_counts((0.5, 0.5), [4, 4], 4) == (2, 2)


def test_worked_example_of_the_matrices_of_a_layer() -> None:
    # uniform drops 4 of 10 and 8 of 20
    assert matrix_counts([4, 8], [10, 20], 12) == (4, 8)
    assert matrix_counts([4, 8], [10, 20], 6) == (2, 4)
    assert matrix_counts([4, 8], [10, 20], 21) == (7, 14), "half of what uniform keeps is dropped too"
    assert matrix_counts([4, 8], [10, 20], 0) == (0, 0)
    assert matrix_counts([4, 8], [10, 20], 30) == (10, 20)
    assert matrix_counts([0, 0], [10, 20], 0) == (0, 0)
    assert matrix_counts([0, 8], [1, 20], 9) == (0, 9), "a narrow matrix from which uniform drops nothing"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 10**9)), min_size=1, max_size=40), st.integers(0, 999))
def test_layers_drop_the_total_to_a_weight(layers: list[tuple[float, int]], mille: int) -> None:
    signals, weights = [signal for signal, _ in layers], [weight for _, weight in layers]
    total = sum(weight * mille // 1000 for weight in weights)
    ratios = linear_ratios(signals, weights, total / sum(weights), 0.3)
    counts = layer_counts(ratios, weights, total)
    assert sum(counts) == total
    for count, ratio, weight in zip(counts, ratios, weights, strict=True):
        assert abs(count - ratio * weight) < 1 + 1e-6
        assert 0 <= count <= weight


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.integers(0, 999))
def test_matrices_drop_the_total_of_their_layer_to_a_weight(
    data: st.DataObject, sizes: list[int], mille: int
) -> None:
    uniform = [size * mille // 1000 for size in sizes]
    total = data.draw(st.integers(0, sum(sizes)))
    counts = matrix_counts(uniform, sizes, total)
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert matrix_counts(uniform, sizes, sum(uniform)) == tuple(uniform)
    if total <= sum(uniform):
        assert all(count <= most for count, most in zip(counts, uniform, strict=True))
    else:
        assert all(count >= least for count, least in zip(counts, uniform, strict=True))
