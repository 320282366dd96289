"""Allocation: worked examples of outliers, and the exact mean sparsity for any layers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlprune.pruning.allocation import outlier_share, owl
from mlprune.pruning.moments import Moments


def norms(*norm: float) -> Moments:
    return Moments(3, torch.tensor(norm, dtype=torch.float64) ** 2)


def mean(ratios: tuple[float, ...], weights: list[int]) -> float:
    return sum(ratio * weight for ratio, weight in zip(ratios, weights, strict=True)) / sum(weights)


# outliers


def test_worked_example_of_outliers() -> None:
    # times the norms 1 2 3 4 and 5 6 7 160: their mean is 23.5, and one of eight is above five times that, 117.5
    weight_OI = torch.tensor([[1.0, -1.0, 3.0, 1.0], [-5.0, 3.0, 7.0, -40.0]])
    assert outlier_share([(weight_OI, norms(1.0, 2.0, 1.0, 4.0))]) == 1 / 8


def test_mean_is_taken_over_all_matrices_of_the_layer() -> None:
    small, large = (torch.ones(3, 10), norms(*[1.0] * 10)), (torch.ones(1, 2), norms(100.0, 100.0))
    # 30 ones and 2 hundreds: the mean is 230 / 32 = 7.2, and each hundred is above five times that
    assert outlier_share([small, large]) == 2 / 32
    assert outlier_share([small]) == outlier_share([large]) == 0, "alone, each matrix has no outlier"
    assert outlier_share([large, small]) == 2 / 32


def test_outlier_is_above_five_times_the_mean() -> None:
    assert outlier_share([(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]), norms(*[1.0] * 5))]) == 0
    assert outlier_share([(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]), norms(*[1.0] * 6))]) == 1 / 6


def test_matrix_without_tokens_is_ignored() -> None:
    seen, unseen = (torch.tensor([[1.0] * 9 + [11.0]]), norms(*[1.0] * 10)), (torch.ones(8, 4), Moments.zeros(4))
    assert outlier_share([seen]) == 1 / 10
    assert outlier_share([unseen, seen, unseen]) == 1 / 10
    assert outlier_share([unseen]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_equal_those_of_all_scores_concatenated(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layer: list[tuple[Tensor, Moments]] = []
    for rows, width in ((30, 40), (50, 40), (40, 60)):
        weight_OI = (torch.randn(rows, width, generator=generator) ** 3).to(dtype)
        layer.append((weight_OI, norms(*torch.rand(width, generator=generator).exp().tolist())))
    scores = torch.cat([(w.double().abs() * seen.sumsq_I.sqrt()).flatten() for w, seen in layer])
    share = float((scores > 5 * scores.mean()).double().mean())
    assert share > 0.01
    assert outlier_share(layer) == share
    assert outlier_share([(weight_OI.T.contiguous().T, seen) for weight_OI, seen in layer]) == share


# sparsities


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
