"""Agreement between languages: correlations by hand, and against numpy's on random norms."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mlprune.pruning.agreement import layer_agreement, matrix_agreements


def squares(*norms: list[float]) -> Tensor:
    return torch.tensor(norms, dtype=torch.float64).square()


def test_worked_example() -> None:
    # about their means: (-1, 0, 1), (1, 0, -1), (-1, 1, 0); the third with the first: 1 / 2
    agreements = matrix_agreements(squares([1.0, 2.0, 3.0], [6.0, 5.0, 4.0], [1.0, 3.0, 2.0]))
    assert agreements == pytest.approx([-1.0, 0.5, -0.5], abs=1e-12)
    assert layer_agreement([squares([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])] * 3) == pytest.approx(0.5, abs=1e-12)


def test_the_size_of_a_text_does_not_matter() -> None:
    norms = [[1.0, 2.0, 4.0, 3.0], [2.0, 1.0, 5.0, 3.0]]
    more = squares(*norms) * torch.tensor([[1.0], [50.0]])
    assert matrix_agreements(more) == pytest.approx(matrix_agreements(squares(*norms)), abs=1e-12)


def test_equals_numpy_on_normalised_norms() -> None:
    generator = np.random.default_rng(0)
    layer = [generator.random((4, 30)) ** 2 * 1e6 for _ in range(3)]
    expected = []
    for sumsq_LI in layer:
        norm_LI = np.sqrt(sumsq_LI)
        norm_LI /= np.sqrt((norm_LI**2).mean(1, keepdims=True))
        correlation = np.corrcoef(norm_LI)
        expected += [correlation[a, b] for a in range(4) for b in range(a + 1, 4)]
    measured = layer_agreement(torch.from_numpy(sumsq_LI) for sumsq_LI in layer)
    assert measured == pytest.approx(np.mean(expected), abs=1e-12)


def test_an_expert_that_a_language_does_not_reach_is_left_out() -> None:
    reached = squares([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [3.0, 2.0, 1.0])
    half = squares([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [3.0, 2.0, 1.0])
    assert matrix_agreements(half) == pytest.approx([-1.0], abs=1e-12)
    none = torch.zeros(3, 3, dtype=torch.float64)
    expected = (0.5 - 1 - 0.5 - 1) / 4
    assert layer_agreement([reached, none, half]) == pytest.approx(expected, abs=1e-12)
    assert layer_agreement([none]) == 1.0
