"""Outliers: worked examples of the share by which OWL allocates."""

import pytest
import torch
from torch import Tensor

from mlprune.pruning.moments import Moments
from mlprune.pruning.outliers import outlier_share


def norms(*norm: float) -> Moments:
    return Moments(3, torch.tensor(norm, dtype=torch.float64) ** 2)


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
