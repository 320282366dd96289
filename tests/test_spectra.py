"""Spectra: Hill's estimate by hand, on the singular values by which a matrix is made."""

import math

import pytest
import torch
from torch import Tensor

from mlprune.pruning.spectra import layer_exponent, tail_exponent


def with_singular_values(values: list[float], rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(values))
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0] for n in (rows, width))
    middle = torch.zeros(rows, width, dtype=torch.float64)
    middle.diagonal()[: len(values)] = torch.tensor(values, dtype=torch.float64)
    product: Tensor = left @ middle @ right
    return product


def test_worked_example() -> None:
    # squared: 1 4 16 64; the upper half is 16 and 64: 1 + 2 / (log 1 + log 4)
    expected = 1 + 2 / math.log(4)
    assert tail_exponent(torch.diag(torch.tensor([8.0, 1.0, 4.0, 2.0]))) == pytest.approx(expected, rel=1e-12)
    # of five values the upper three: 1 + 3 / (log 1 + log 4 + log 16)
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert tail_exponent(matrix) == pytest.approx(1 + 3 / math.log(64), rel=1e-12)


@pytest.mark.parametrize(("rows", "width"), [(6, 6), (6, 9), (9, 6)])
def test_of_any_shape_orientation_and_scale(rows: int, width: int) -> None:
    values = [0.3, 1.0, 1.5, 2.5, 4.0, 9.0]
    matrix = with_singular_values(values, rows, width)
    expected = 1 + 3 / sum(2 * math.log(value / 2.5) for value in values[3:])
    for one in (matrix, matrix.T, 100 * matrix, matrix.float()):
        assert tail_exponent(one) == pytest.approx(expected, rel=1e-6)


def test_equals_the_plain_form_on_singular_values() -> None:
    for seed in range(5):
        weight_OI = torch.randn(17, 40, generator=torch.Generator().manual_seed(seed)) ** 3
        squares = torch.linalg.svdvals(weight_OI.double()).square().sort().values[8:]
        expected = 1 + len(squares) / float((squares / squares[0]).log().sum())
        assert tail_exponent(weight_OI) == pytest.approx(expected, rel=1e-9)


def test_a_heavier_tail_has_a_smaller_exponent() -> None:
    generator = torch.Generator().manual_seed(0)
    light = torch.randn(64, 64, generator=generator)
    heavy = light + 3 * torch.outer(light[0], light[1]) + 2 * torch.outer(light[2], light[3])
    assert layer_exponent([heavy]) < layer_exponent([light])


def test_zeros_and_flat_spectra_are_defined() -> None:
    assert tail_exponent(torch.zeros(4, 6)) is None
    assert layer_exponent([torch.zeros(4, 6)]) == 0
    rank_two = with_singular_values([3.0, 1.0], 5, 7)
    assert tail_exponent(rank_two) == pytest.approx(1e9, rel=1e-6), "the upper half is one value: no tail at all"
    assert tail_exponent(torch.eye(4)) == pytest.approx(1e9, rel=1e-6)


def test_a_layer_is_the_mean_of_its_matrices() -> None:
    one, other = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0])), torch.diag(torch.tensor([1.0, 1.0, 3.0, 9.0]))
    exponents = [1 + 2 / math.log(4), 1 + 2 / math.log(9)]
    assert layer_exponent([one, torch.zeros(2, 2), other]) == pytest.approx(sum(exponents) / 2, rel=1e-9)
