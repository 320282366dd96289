"""Moments: sums compared with float64, merging by addition, and mixtures with given weights."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlprune.pruning.moments import Moments, mix

HALF = Fraction(1, 2)

# float32 keeps 24 bits. A square is rounded once and a cascade of additions of positive numbers rounds
# each partial sum about log2(tokens) times: 2**-24 * (1 + 12) for 4,096 tokens, doubled for the blocks that
# are summed one after another inside the cascade.
FLOAT32_SUM = 2**-24 * 2 * (1 + 12)


def tokens(seed: int, count: int, channels: int = 16) -> Tensor:
    """Inputs whose channels differ a thousandfold in size, as those of language models do."""
    generator = torch.Generator().manual_seed(seed)
    scale_I = torch.logspace(-2, 1, channels)
    return torch.randn(count, channels, generator=generator) * scale_I


def reference(input_TI: Tensor) -> Tensor:
    return torch.from_numpy(np.square(input_TI.double().numpy()).sum(0))


def close(actual: Tensor, expected: Tensor, relative: float) -> bool:
    return bool(((actual - expected).abs() <= relative * expected.abs()).all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 3, 100, 4096])
def test_moments_are_the_count_and_the_sum_of_squares(seed: int, count: int) -> None:
    input_TI = tokens(seed, count)
    moments = Moments.of(input_TI)
    assert moments.tokens == count
    assert moments.sumsq_I.dtype == torch.float64
    assert close(moments.sumsq_I, reference(input_TI), FLOAT32_SUM)
    assert moments.norm_I.dtype == torch.float32
    assert close(moments.norm_I.double(), reference(input_TI).sqrt(), FLOAT32_SUM)


def test_worked_example() -> None:
    moments = Moments.of(torch.tensor([[3.0, 0.0, -1.0], [-4.0, 0.0, 2.0]]))
    assert moments.tokens == 2
    assert moments.sumsq_I.tolist() == [25.0, 0.0, 5.0]
    assert moments.norm_I.tolist() == [5.0, 0.0, torch.tensor(5.0).sqrt().item()]


def test_no_tokens_give_zero_moments() -> None:
    for moments in (Moments.zeros(3), Moments.of(torch.empty(0, 3))):
        assert moments.tokens == 0
        assert moments.sumsq_I.dtype == torch.float64
        assert moments.sumsq_I.tolist() == [0.0] * 3


@pytest.mark.parametrize("pieces", [1, 2, 7, 64])
def test_merged_pieces_equal_the_whole(pieces: int) -> None:
    input_TI = tokens(pieces, 4096)
    merged = Moments.zeros(16)
    for piece in input_TI.tensor_split(pieces):
        merged = merged + Moments.of(piece)
    assert merged.tokens == 4096
    # between pieces the sum is float64 and adds nothing to float32's error within the longest piece
    assert close(merged.sumsq_I, reference(input_TI), FLOAT32_SUM)
    assert close(merged.sumsq_I, Moments.of(input_TI).sumsq_I, 2 * FLOAT32_SUM)


def test_between_micro_batches_the_sum_is_float64() -> None:
    """Each addend is too small beside 2**24: float32 would lose all of them."""
    merged = Moments(1, torch.tensor([2.0**24], dtype=torch.float64))
    for _ in range(1000):
        merged = merged + Moments.of(torch.tensor([[0.5]]))
    assert merged.sumsq_I.item() == 2**24 + 250.0
    assert merged.tokens == 1001


def test_merging_does_not_change_its_parts() -> None:
    first, second = Moments.of(tokens(0, 5)), Moments.of(tokens(1, 7))
    before = first.sumsq_I.clone(), second.sumsq_I.clone()
    assert torch.equal((first + second).sumsq_I, before[0] + before[1])
    assert torch.equal(first.sumsq_I, before[0])
    assert torch.equal(second.sumsq_I, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_summed_in_half_precision(dtype: torch.dtype) -> None:
    ones = Moments.of(torch.ones(3000, 2, dtype=dtype))
    assert ones.sumsq_I.tolist() == [3000.0, 3000.0]  # bfloat16 stops at 256, float16 at 2048
    input_TI = tokens(9, 2000).to(dtype)
    assert close(Moments.of(input_TI).sumsq_I, reference(input_TI), FLOAT32_SUM)
    assert Moments.of(torch.full((2, 1), 300.0, dtype=dtype)).sumsq_I.isfinite().all()  # float16 ends at 65504


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=5), st.integers(0, 10**6))
def test_weights_that_are_token_shares_give_the_plain_sum(counts: list[int], seed: int) -> None:
    parts = [Moments.of(tokens(seed + n, count, 5)) for n, count in enumerate(counts)]
    mixture = mix([(part, Fraction(part.tokens, sum(counts))) for part in parts])
    plain = Moments.zeros(5)
    for part in parts:
        plain = plain + part
    assert mixture.tokens == plain.tokens
    assert torch.equal(mixture.sumsq_I, plain.sumsq_I)


def test_halves_have_equal_weight_whatever_their_tokens() -> None:
    few, many = Moments.of(torch.full((10, 1), 2.0)), Moments.of(torch.full((990, 1), 3.0))
    mixture = mix([(few, HALF), (many, HALF)])
    assert mixture.tokens == 1000
    # the mean square of a token is the mean of the two parts' mean squares: (4 + 9) / 2
    assert mixture.sumsq_I.item() / mixture.tokens == pytest.approx(6.5, rel=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 99)), min_size=2, max_size=4), st.integers(0, 99))
def test_a_mixture_is_the_weighted_mean_of_mean_squares(shape: list[tuple[int, int]], seed: int) -> None:
    whole = sum(weight for _, weight in shape)
    parts = [
        (Moments.of(tokens(seed + n, count, 4)), Fraction(weight, whole))
        for n, (count, weight) in enumerate(shape)
    ]
    mixture = mix(parts)
    means = [float(weight) * part.sumsq_I / part.tokens for part, weight in parts]
    # one float64 product and sum per part: a few times 2**-53
    assert close(mixture.sumsq_I / mixture.tokens, torch.stack(means).sum(0), 1e-14)


def test_a_single_part_is_returned_unchanged() -> None:
    moments = Moments.of(tokens(0, 8))
    assert mix([(moments, Fraction(1))]) is moments
    assert mix([(moments, Fraction(999, 1000))]) is moments


def test_a_part_without_tokens_adds_nothing() -> None:
    moments, nothing = Moments.of(tokens(1, 8)), Moments.zeros(16)
    mixture = mix([(moments, HALF), (nothing, HALF)])
    assert mixture.tokens == 8
    assert torch.equal(mixture.sumsq_I, moments.sumsq_I * 0.5)  # one factor for all channels: the same masks
    empty = mix([(nothing, HALF), (nothing, HALF)])
    assert (empty.tokens, empty.sumsq_I.tolist()) == (0, [0.0] * 16)


def test_mixing_does_not_change_its_parts() -> None:
    parts = [(Moments.of(tokens(n, 5 + n)), HALF) for n in range(2)]
    before = [part.sumsq_I.clone() for part, _ in parts]
    mix(parts)
    assert all(torch.equal(part.sumsq_I, old) for (part, _), old in zip(parts, before, strict=True))


# Gram matrices


def integers(seed: int, count: int, channels: int = 6) -> Tensor:
    """Small whole numbers: every sum of their products is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (count, channels), generator=generator).float()


def gram(moments: Moments) -> Tensor:
    assert moments.gram_II is not None
    return moments.gram_II


def test_worked_example_of_a_gram_matrix() -> None:
    moments = Moments.of(torch.tensor([[3.0, 0.0, -1.0], [-4.0, 0.0, 2.0]]), gram=True)
    assert gram(moments).dtype == torch.float64
    # 3 * -1 + -4 * 2 = -11 off the diagonal, the sums of squares on it
    assert gram(moments).tolist() == [[25.0, 0.0, -11.0], [0.0, 0.0, 0.0], [-11.0, 0.0, 5.0]]


def test_gram_matrix_is_computed_only_on_request() -> None:
    first, second = Moments.of(tokens(0, 5)), Moments.of(tokens(1, 7))
    for moments in (Moments.zeros(3), first, first + second, mix([(first, HALF), (second, HALF)])):
        assert moments.gram_II is None
        assert moments.to(torch.device("cpu")).gram_II is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 3000])
def test_gram_matrix_is_the_sum_of_products(count: int, dtype: torch.dtype) -> None:
    input_TI = tokens(count, count).to(dtype)
    exact = input_TI.double()
    # each entry is a float32 sum of `count` products, however they are grouped
    bound = (count + 1) * 2**-24 * (exact.abs().T @ exact.abs())
    assert ((gram(Moments.of(input_TI, gram=True)) - exact.T @ exact).abs() <= bound).all()


@pytest.mark.parametrize("count", [1, 100, 4097])
def test_other_sums_are_bit_identical_with_a_gram_matrix(count: int) -> None:
    plain, with_gram = Moments.of(tokens(count, count)), Moments.of(tokens(count, count), gram=True)
    assert torch.equal(plain.sumsq_I, with_gram.sumsq_I)
    assert plain.tokens == with_gram.tokens
    assert torch.equal((plain + plain).sumsq_I, (with_gram + with_gram).sumsq_I)
    parts = [(Moments.of(tokens(n, 9), gram=True), Fraction(1, 3)) for n in range(3)]
    assert torch.equal(
        mix([(Moments.of(tokens(n, 9)), w) for n, (_, w) in enumerate(parts)]).sumsq_I, mix(parts).sumsq_I
    )


def test_merged_gram_matrices_equal_the_whole() -> None:
    input_TI = integers(3, 500)
    merged = Moments.zeros(6, gram=True)
    for piece in input_TI.tensor_split(7):
        merged = merged + Moments.of(piece, gram=True)
    assert torch.equal(gram(merged), gram(Moments.of(input_TI, gram=True)))
    assert torch.equal(gram(merged.to(torch.device("cpu"))), gram(merged))


def test_between_micro_batches_gram_matrices_are_summed_in_float64() -> None:
    merged = Moments(1, torch.tensor([2.0**24]), torch.tensor([[2.0**24]], dtype=torch.float64))
    for _ in range(1000):
        merged = merged + Moments.of(torch.tensor([[0.5]]), gram=True)
    assert gram(merged).item() == 2**24 + 250.0


def test_merging_needs_gram_matrices_in_all_parts_or_in_none() -> None:
    without, with_gram = Moments.of(tokens(0, 5)), Moments.of(tokens(1, 7), gram=True)
    for first, second in ((without, with_gram), (with_gram, without)):
        with pytest.raises(AssertionError, match="either all"):
            first + second
        with pytest.raises(ValueError):
            mix([(first, HALF), (second, HALF)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 99)), min_size=2, max_size=4), st.integers(0, 99))
def test_mixture_scales_gram_matrices_like_squares(shape: list[tuple[int, int]], seed: int) -> None:
    whole = sum(weight for _, weight in shape)
    parts = [
        (Moments.of(integers(seed + n, count), gram=True), Fraction(weight, whole))
        for n, (count, weight) in enumerate(shape)
    ]
    mixture = mix(parts)
    assert torch.equal(gram(mixture).diagonal(), mixture.sumsq_I), "the same factors, bit-identical"
    total = sum(count for count, _ in shape)
    means = [float(weight) * gram(part) / part.tokens for part, weight in parts if part.tokens]
    expected = torch.stack(means).sum(0) * total if means else torch.zeros(6, 6, dtype=torch.float64)
    # rounded once per product and sum, relative to the squares: products of both signs cancel
    assert ((gram(mixture) - expected).abs() <= 1e-14 * total * 100).all()


def test_mixing_does_not_change_gram_matrices_of_its_parts() -> None:
    parts = [(Moments.of(tokens(n, 5 + n), gram=True), HALF) for n in range(2)]
    before = [gram(part).clone() for part, _ in parts]
    mix(parts)
    parts[0][0] + parts[1][0]
    assert all(torch.equal(gram(part), old) for (part, _), old in zip(parts, before, strict=True))
