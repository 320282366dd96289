"""SparseGPT: a worked example, and a textbook implementation that inverts the Hessian for every column."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlprune.pruning.masks import keep_mask
from mlprune.pruning.moments import Moments
from mlprune.pruning.scores import wanda
from mlprune.pruning.sparsegpt import SingularHessianError, sparsegpt
from mlprune.spec.variants import Pattern

UNSTRUCTURED = Pattern()
NAN, INF = float("nan"), float("inf")
PATTERNS = ("1:2", "2:4", "4:8", "3:5", "4:10", "7:64", "1:33")


def weights(seed: int, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int, tokens: int, channels: int) -> Tensor:
    """Correlated channels that differ tenfold in size, in random order."""
    generator = torch.Generator().manual_seed(seed)
    scale_I = torch.logspace(-0.5, 0.5, channels)[torch.randperm(channels, generator=generator)]
    few_TK = torch.randn(tokens, max(1, channels // 4), generator=generator)
    mixed_TI = few_TK @ torch.randn(few_TK.shape[1], channels, generator=generator) / few_TK.shape[1] ** 0.5
    input_TI: Tensor = (mixed_TI + 0.5 * torch.randn(tokens, channels, generator=generator)) * scale_I
    return input_TI


def seen(input_TI: Tensor) -> Moments:
    return Moments.of(input_TI, gram=True)


def error(weight_OI: Tensor, pruned_OI: Tensor, input_TI: Tensor) -> float:
    """Return the change of the output: the squared norm of X (W - W')^T."""
    return float((input_TI.double() @ (weight_OI - pruned_OI).double().T).square().sum())


def textbook(
    weight_OI: Tensor, moments: Moments, drops: list[int], pattern: Pattern, width: int
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgery from left to right in float64, with a new inverse Hessian for every column.

    Each column's error is passed to all columns to its right at once. `drops` is the number of weights that each
    block of `width` columns loses; an n:m pattern selects group by group.
    """
    assert moments.gram_II is not None
    hessian_II = 2 / moments.tokens * moments.gram_II
    damping, dead_I = 0.01 * hessian_II.diagonal().mean(), hessian_II.diagonal() == 0
    hessian_II = hessian_II + torch.diag(damping * ~dead_I + dead_I)
    weight_OI = weight_OI.double() * ~dead_I
    keep_OI = torch.ones(weight_OI.shape, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian_II[column:, column:]) for column in range(len(hessian_II))]
    step = pattern.group or width
    for column, inverse_II in enumerate(inverses):
        if column % step == 0:
            chosen = slice(column, column + step)
            cost_OI = weight_OI[:, chosen] ** 2 / torch.stack([left[0, 0] for left in inverses[chosen]])
            if pattern.group:
                for row, cost_I in enumerate(cost_OI):
                    keep_OI[row, column + cost_I.argsort()[: pattern.group - pattern.kept]] = False
            else:
                places = cost_OI.flatten().argsort()[: drops[column // width]]
                block_OI = torch.ones_like(cost_OI, dtype=torch.bool)
                block_OI.view(-1)[places] = False
                keep_OI[:, chosen] = block_OI
        removed_O = weight_OI[:, column] * ~keep_OI[:, column]
        weight_OI[:, column:] -= torch.outer(removed_O / inverse_II[0, 0], inverse_II[0])
        weight_OI[~keep_OI[:, column], column] = 0
    return keep_OI, weight_OI


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(actual[0], expected[0])
    # the elimination is float32: a few hundred additions, each rounded relative to the largest of the row
    largest_O1 = expected[1].abs().amax(1, keepdim=True)
    assert ((actual[1].double() - expected[1]).abs() <= 2e-5 * largest_O1).all()
    assert (actual[1][~actual[0]] == 0).all()
    assert not actual[1][~actual[0]].signbit().any()


def test_a_worked_example() -> None:
    # 2 X X^T / n is [[1, 0.5], [0.5, 1]], its mean diagonal 1: H = [[1.01, 0.5], [0.5, 1.01]]
    gram_II = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    moments = Moments(4, gram_II.diagonal(), gram_II)
    # The first column costs w^2 (1.01 - 0.5^2 / 1.01) = 0.7625 w^2; the second, not compensated, 1.01 w^2.
    # 0.7625 < 4.04: the first goes, and the second takes over 0.5 / 1.01 of it
    keep_OI, changed_OI = sparsegpt(torch.tensor([[1.0, 2.0]]), moments, 0.5, UNSTRUCTURED)
    assert keep_OI.tolist() == [[False, True]]
    assert changed_OI[0].tolist() == [0.0, pytest.approx(2 + 0.5 / 1.01, rel=1e-6)]
    # 3.05 > 1.01: the second goes, and nothing is to its right
    keep_OI, changed_OI = sparsegpt(torch.tensor([[2.0, 1.0]]), moments, 0.5, UNSTRUCTURED)
    assert keep_OI.tolist() == [[True, False]]
    assert changed_OI.tolist() == [[2.0, 0.0]]
    # 1.1^2 * 0.7625 = 0.9226 < 1.01, though 1.1 > 1: a weight that others can compensate is cheaper
    keep_OI, changed_OI = sparsegpt(torch.tensor([[1.1, 1.0]]), moments, 0.5, UNSTRUCTURED)
    assert keep_OI.tolist() == [[False, True]]
    assert changed_OI[0].tolist() == [0.0, pytest.approx(1 + 1.1 * 0.5 / 1.01, rel=1e-6)]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_one_block_equals_the_textbook(seed: int, sparsity: float) -> None:
    weight_OI, moments = weights(seed, 9, 50), seen(inputs(seed, 300, 50))
    expected = textbook(weight_OI, moments, [int(450 * sparsity)], UNSTRUCTURED, 50)
    assert_same(sparsegpt(weight_OI, moments, sparsity, UNSTRUCTURED), expected)


@pytest.mark.parametrize("sparsity", [0.29, 0.5])
def test_blocks_pass_on_their_errors_as_in_the_textbook(sparsity: float) -> None:
    weight_OI, moments = weights(5, 7, 300), seen(inputs(5, 900, 300))
    # 7 * 128 * 0.29 = 259.84, 7 * 256 * 0.29 = 519.68, 7 * 300 * 0.29 = 609: floors of all so far
    drops = {0.29: [259, 519 - 259, 609 - 519], 0.5: [448, 448, 154]}[sparsity]
    assert_same(
        sparsegpt(weight_OI, moments, sparsity, UNSTRUCTURED),
        textbook(weight_OI, moments, drops, UNSTRUCTURED, 128),
    )


@pytest.mark.parametrize("text", PATTERNS)
def test_groups_equal_the_textbook(text: str) -> None:
    pattern = Pattern.parse(text)
    width = 150 // pattern.group * pattern.group  # more than one block, and none of 128 where groups would be cut
    weight_OI, moments = weights(6, 5, width), seen(inputs(6, 400, width))
    keep_OI, changed_OI = sparsegpt(weight_OI, moments, 0.5, pattern)
    assert (keep_OI.reshape(5, -1, pattern.group).sum(2) == pattern.kept).all()
    assert_same((keep_OI, changed_OI), textbook(weight_OI, moments, [], pattern, width))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 300), st.integers(0, 999))
def test_number_of_dropped_weights_is_exact(seed: int, rows: int, width: int, mille: int) -> None:
    weight_OI = weights(seed, rows, width).round()  # ties, and zeros
    keep_OI, changed_OI = sparsegpt(weight_OI, seen(inputs(seed, 5, width)), mille / 1000, UNSTRUCTURED)
    assert int((~keep_OI).sum()) == rows * width * mille // 1000
    assert changed_OI.isfinite().all()
    assert (changed_OI[~keep_OI] == 0).all()


def test_first_of_ties_is_dropped() -> None:
    alike = Moments(2, torch.ones(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    keep_OI, _ = sparsegpt(torch.ones(2, 4), alike, 0.625, UNSTRUCTURED)
    assert keep_OI.tolist() == [[False] * 4, [False, True, True, True]]
    keep_OI, _ = sparsegpt(torch.ones(2, 4), alike, 0.5, Pattern.parse("2:4"))
    assert keep_OI.tolist() == [[False, False, True, True]] * 2


def test_sparsity_zero_changes_nothing() -> None:
    weight_OI = weights(1, 6, 200)
    keep_OI, changed_OI = sparsegpt(weight_OI, seen(inputs(1, 300, 200)), 0.0, UNSTRUCTURED)
    assert keep_OI.all()
    assert torch.equal(changed_OI, weight_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_weight_and_moments_are_not_modified(dtype: torch.dtype) -> None:
    stored_IO = weights(2, 40, 8).to(dtype)
    for weight_OI in (stored_IO.T, stored_IO.T.contiguous(), torch.stack([stored_IO.T] * 2)[1]):
        moments = seen(inputs(2, 100, 40))
        assert moments.gram_II is not None
        before = weight_OI.clone(), moments.gram_II.clone()
        keep_OI, changed_OI = sparsegpt(weight_OI, moments, 0.5, UNSTRUCTURED)
        assert torch.equal(weight_OI, before[0])
        assert torch.equal(moments.gram_II, before[1])
        assert (keep_OI.dtype, changed_OI.dtype) == (torch.bool, torch.float32)
        assert keep_OI.shape == changed_OI.shape == weight_OI.shape
        expected = sparsegpt(weight_OI.float().contiguous(), moments, 0.5, UNSTRUCTURED)
        assert torch.equal(keep_OI, expected[0])
        assert torch.equal(changed_OI, expected[1])


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_output_changes_less_than_with_wanda(text: str, sparsity: float) -> None:
    for seed in range(3):
        weight_OI, input_TI, pattern = weights(seed, 32, 256), inputs(seed, 800, 256), Pattern.parse(text)
        keep_OI, changed_OI = sparsegpt(weight_OI, seen(input_TI), sparsity, pattern)
        wanda_OI = keep_mask(wanda(weight_OI, [seen(input_TI)], 0), sparsity, pattern)
        not_updated = error(weight_OI, weight_OI * keep_OI, input_TI)
        updated, wandas = error(weight_OI, changed_OI, input_TI), error(weight_OI, weight_OI * wanda_OI, input_TI)
        assert updated < 0.8 * wandas
        assert updated < not_updated, "the kept weights compensate for the dropped ones"


def test_channel_that_was_always_zero_loses_its_weights_first() -> None:
    weight_OI, input_TI = weights(3, 6, 20), inputs(3, 100, 20)
    input_TI[:, [4, 11]] = 0
    keep_OI, changed_OI = sparsegpt(weight_OI, seen(input_TI), 0.55, UNSTRUCTURED)
    assert (changed_OI[:, [4, 11]] == 0).all()
    assert not keep_OI[:, [4, 11]].any(), "they cost nothing, so they are dropped first"
    assert_same((keep_OI, changed_OI), textbook(weight_OI, seen(input_TI), [66], UNSTRUCTURED, 20))


def test_result_does_not_depend_on_the_scale_or_number_of_inputs() -> None:
    weight_OI, input_TI = weights(4, 6, 40), inputs(4, 100, 40)
    input_TI[:, 7] = 0
    expected = sparsegpt(weight_OI, seen(input_TI), 0.5, UNSTRUCTURED)
    for other_TI in (input_TI * 2**-10, input_TI * 2**10, input_TI.repeat(4, 1)):
        actual = sparsegpt(weight_OI, seen(other_TI), 0.5, UNSTRUCTURED)
        assert torch.equal(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)


def test_fewer_tokens_than_channels_are_enough() -> None:
    weight_OI, input_TI = weights(7, 6, 64), inputs(7, 3, 64)
    _, changed_OI = sparsegpt(weight_OI, seen(input_TI), 0.5, UNSTRUCTURED)
    assert changed_OI.isfinite().all()
    nothing_TI = torch.zeros(3, 64)
    keep_OI, changed_OI = sparsegpt(weight_OI, seen(nothing_TI), 0.5, UNSTRUCTURED)
    assert not changed_OI.any()
    assert int(keep_OI.sum()) == 192


@pytest.mark.parametrize("gram", [[[1.0, 2.0], [2.0, 1.0]], [[1.0, NAN], [NAN, 1.0]], [[INF, 0.0], [0.0, 1.0]]])
@pytest.mark.parametrize("text", ["unstructured", "1:2"])
def test_hessian_that_cannot_be_factorised_is_an_error(gram: list[list[float]], text: str) -> None:
    gram_II = torch.tensor(gram, dtype=torch.float64)
    with pytest.raises(SingularHessianError, match="positive definite"):
        sparsegpt(torch.ones(3, 2), Moments(5, gram_II.diagonal(), gram_II), 0.5, Pattern.parse(text))


def test_caller_must_pass_a_gram_matrix_of_some_token() -> None:
    with pytest.raises(AssertionError, match="without a Gram matrix"):
        sparsegpt(torch.ones(3, 2), Moments.of(torch.ones(4, 2)), 0.5, UNSTRUCTURED)
    with pytest.raises(AssertionError, match="without a token"):
        sparsegpt(torch.ones(3, 2), Moments.zeros(2, gram=True), 0.5, UNSTRUCTURED)
