"""Masks: exact counts per row and group, ties by index, and packing to one bit per weight."""

import hashlib
from collections.abc import Iterator
from decimal import Decimal
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlprune.pruning import masks
from mlprune.pruning.masks import PackedMask, PackedWeights, dropped_per_row, keep_all_but, keep_mask
from mlprune.spec.variants import Pattern

SPARSITIES = (0.0, 0.1, 0.29, 0.3, 0.5, 0.57, 0.7, 0.99)
PATTERNS = ("2:4", "4:8", "1:4", "3:5", "1:2")
UNSTRUCTURED = Pattern()
WITHIN: tuple[Literal["row", "matrix"], ...] = ("row", "matrix")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scores(seed: int, rows: int, width: int, levels: int) -> Tensor:
    """Scores of `levels` different values: few of them, many ties. Every fourth row is of one value."""
    generator = torch.Generator().manual_seed(seed)
    score_OI = torch.randint(0, levels, (rows, width), generator=generator).float() / 7
    score_OI[::4] = 3
    return score_OI


def by_sorting(score_OI: Tensor, drop: int) -> Tensor:
    """The plain rule: sort each row, stably, and drop the first `drop`."""
    keep_OI = torch.ones(score_OI.shape, dtype=torch.bool)
    for row, order in enumerate(score_OI.argsort(dim=1, stable=True)):
        keep_OI[row, order[:drop]] = False
    return keep_OI


def by_sorting_groups(score_OI: Tensor, pattern: Pattern) -> Tensor:
    grouped_XM = score_OI.contiguous().view(-1, pattern.group)
    return by_sorting(grouped_XM, pattern.group - pattern.kept).view(score_OI.shape)


def floor_of(width: int, sparsity: float) -> int:
    """floor(width * sparsity) in decimal arithmetic."""
    return int(Decimal(width) * Decimal(repr(sparsity)))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])
def test_rows_lose_their_smallest_scores_and_the_first_of_ties(sparsity: float, levels: int) -> None:
    for seed, (rows, width) in enumerate([(7, 100), (1, 33), (16, 8), (3, 1)]):
        score_OI = scores(seed, rows, width, levels)
        keep_OI = keep_mask(score_OI, sparsity, UNSTRUCTURED)
        assert keep_OI.dtype == torch.bool
        assert torch.equal(keep_OI, by_sorting(score_OI, floor_of(width, sparsity)))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 70), st.integers(1, 6), st.integers(0, 999))
def test_any_shape_ties_and_sparsity(seed: int, rows: int, width: int, levels: int, mille: int) -> None:
    score_OI = scores(seed, rows, width, levels)
    keep_OI = keep_mask(score_OI, mille / 1000, UNSTRUCTURED)
    assert torch.equal(keep_OI, by_sorting(score_OI, width * mille // 1000))


def test_selection_on_other_devices_gives_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    score_OI = scores(3, 9, 50, 6)
    expected = keep_mask(score_OI, 0.4, UNSTRUCTURED)
    monkeypatch.setattr(masks, "_kth_smallest", lambda score, k: score.kthvalue(k, dim=1).values)
    assert torch.equal(keep_mask(score_OI, 0.4, UNSTRUCTURED), expected)


def test_count_is_exact_for_the_written_decimal() -> None:
    assert 100 * 0.29 < 29  # in binary arithmetic
    assert dropped_per_row(100, 0.29) == 29
    for hundredths in range(100):
        for width in (1, 7, 64, 100, 896, 4864, 11008, 28672):
            assert dropped_per_row(width, hundredths / 100) == width * hundredths // 100


@pytest.mark.parametrize("sparsity", [0.001, 0.3333, 1e-07, 0.999999])
def test_sparsities_of_many_digits(sparsity: float) -> None:
    assert dropped_per_row(11008, sparsity) == floor_of(11008, sparsity)


def test_lowest_and_highest_sparsity() -> None:
    assert bool(keep_mask(scores(0, 5, 20, 3), 0.0, UNSTRUCTURED).all())
    kept_O = keep_mask(scores(0, 5, 100, 3), 0.99, UNSTRUCTURED).sum(1)
    assert kept_O.tolist() == [1] * 5


def test_signed_zeros_and_denormals_are_compared_by_value() -> None:
    score_OI = torch.tensor([[0.0, -0.0, 1e-45, 0.0, 5e-45, -0.0]])
    assert torch.equal(keep_mask(score_OI, 0.5, UNSTRUCTURED), by_sorting(score_OI, 3))
    assert keep_mask(score_OI, 0.5, UNSTRUCTURED).tolist() == [[False, False, True, False, True, True]]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 70), st.integers(1, 6), st.integers(0, 999))
def test_a_matrix_loses_its_smallest_scores(seed: int, rows: int, width: int, levels: int, mille: int) -> None:
    score_OI = scores(seed, rows, width, levels)
    keep_OI = keep_mask(score_OI, mille / 1000, UNSTRUCTURED, within="matrix")
    drop = rows * width * mille // 1000
    assert int((~keep_OI).sum()) == drop
    assert torch.equal(keep_OI, by_sorting(score_OI.view(1, -1), drop).view(rows, width))
    assert torch.equal(keep_OI, keep_all_but(score_OI, drop))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 70), st.integers(1, 6))
def test_rows_lose_an_exact_number_in_all(
    data: st.DataObject, seed: int, rows: int, width: int, levels: int
) -> None:
    score_OI = scores(seed, rows, width, levels)
    drop = data.draw(st.integers(0, rows * width))
    keep_OI = keep_all_but(score_OI, drop, within="row")
    each, further = divmod(drop, rows)
    for row in range(rows):
        expected = by_sorting(score_OI[row : row + 1], each + (row < further))
        assert torch.equal(keep_OI[row : row + 1], expected)


def test_within_a_matrix_rows_may_lose_all_or_nothing() -> None:
    score_OI = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert keep_mask(score_OI, 0.5, UNSTRUCTURED, within="matrix").tolist() == [[False] * 4, [True] * 4]
    assert keep_mask(score_OI, 0.5, UNSTRUCTURED).tolist() == [[False, False, True, True]] * 2
    assert keep_mask(-score_OI, 0.5, UNSTRUCTURED, within="matrix").tolist() == [[True] * 4, [False] * 4]


def test_a_matrix_loses_the_first_ties_in_row_major_order() -> None:
    keep_OI = keep_mask(torch.tensor([[2.0, 1.0, 2.0], [2.0, 2.0, 0.0]]), 0.5, UNSTRUCTURED, within="matrix")
    assert keep_OI.tolist() == [[False, False, True], [True, True, False]]


def test_count_within_a_matrix_is_exact_for_the_decimal() -> None:
    # floor(42 * 0.29 = 12.18), where each of the seven rows alone would lose floor(1.74) = 1
    assert int((~keep_mask(scores(1, 7, 6, 99), 0.29, UNSTRUCTURED, within="matrix")).sum()) == 12
    assert int((~keep_mask(scores(1, 10, 10, 99), 0.29, UNSTRUCTURED, within="matrix")).sum()) == 29


@pytest.mark.parametrize("text", PATTERNS)
def test_groups_do_not_depend_on_within(text: str) -> None:
    pattern = Pattern.parse(text)
    score_OI = scores(2, 9, 6 * pattern.group, 5)
    assert torch.equal(keep_mask(score_OI, 0.5, pattern, within="matrix"), keep_mask(score_OI, 0.5, pattern))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("levels", [1, 2, 4, 10**6])
def test_groups_keep_their_largest_scores_and_the_last_of_ties(text: str, levels: int) -> None:
    pattern = Pattern.parse(text)
    for seed in range(5):
        score_OI = scores(seed, 9, 12 * pattern.group, levels)
        keep_OI = keep_mask(score_OI, 0.99, pattern)  # the pattern sets the count, not the sparsity
        assert torch.equal(keep_OI, by_sorting_groups(score_OI, pattern))
        assert keep_OI.view(9, 12, pattern.group).sum(2).eq(pattern.kept).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 64), st.integers(1, 4), st.data())
def test_any_pattern(seed: int, group: int, levels: int, data: st.DataObject) -> None:
    pattern = Pattern(data.draw(st.integers(1, group - 1)), group)
    score_OI = scores(seed, 3, 2 * group, levels)
    assert torch.equal(keep_mask(score_OI, 0.5, pattern), by_sorting_groups(score_OI, pattern))


@pytest.mark.parametrize("text", ["unstructured", *PATTERNS])
def test_result_does_not_depend_on_the_number_of_threads(text: str) -> None:
    score_OI = scores(11, 300, 640, 40)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(keep_mask(score_OI, 0.37, Pattern.parse(text)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("text", ["unstructured", *PATTERNS])
def test_scores_may_be_a_view(text: str) -> None:
    score_IO = scores(5, 40, 24, 6)
    strided_OI = scores(6, 24, 80, 6)[:, ::2]
    for view_OI in (score_IO.T, strided_OI):
        before = view_OI.clone()
        assert not view_OI.is_contiguous()
        for within in WITHIN:
            expected = keep_mask(view_OI.contiguous(), 0.45, Pattern.parse(text), within)
            assert torch.equal(keep_mask(view_OI, 0.45, Pattern.parse(text), within), expected)
        assert torch.equal(view_OI, before), "scores must not be sorted in place"


SHAPES = [(1, 1), (3, 5), (7, 9), (4, 8), (1, 15), (13, 17), (64, 64), (5, 1)]


def bits(seed: int, shape: tuple[int, int]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_pack_and_unpack_are_inverse(shape: tuple[int, int], seed: int) -> None:
    keep_OI = bits(seed, shape)
    packed = PackedMask.pack(keep_OI)
    assert packed.bits.dtype == torch.uint8
    assert len(packed.bits) == -(-keep_OI.numel() // 8)
    assert torch.equal(packed.unpack(), keep_OI)
    assert packed.unpack().dtype == torch.bool
    assert packed.shape == shape
    assert (packed.kept, packed.dropped) == (int(keep_OI.sum()), int((~keep_OI).sum()))


@pytest.mark.parametrize("shape", SHAPES)
def test_bit_order_is_numpys_little_order(shape: tuple[int, int]) -> None:
    keep_OI = bits(2, shape)
    expected = np.packbits(keep_OI.numpy().reshape(-1), bitorder="little")
    assert PackedMask.pack(keep_OI).bits.tolist() == expected.tolist()


@pytest.mark.parametrize("value", range(256))
def test_every_byte_can_be_packed(value: int) -> None:
    keep_OI = torch.tensor([[bool(value >> bit & 1) for bit in range(8)]])
    packed = PackedMask.pack(keep_OI)
    assert packed.bits.tolist() == [value]
    assert torch.equal(packed.unpack(), keep_OI)


def test_a_transposed_mask_is_packed_by_its_own_rows() -> None:
    keep_OI = bits(4, (11, 6)).T
    packed = PackedMask.pack(keep_OI)
    assert torch.equal(packed.unpack(), keep_OI)
    assert packed.bits.tolist() == PackedMask.pack(keep_OI.contiguous()).bits.tolist()


def test_digest_depends_on_every_bit() -> None:
    keep_OI = bits(5, (9, 7))
    digest = PackedMask.pack(keep_OI).digest()
    assert digest == PackedMask.pack(keep_OI.clone()).digest()
    packed = np.packbits(keep_OI.numpy().reshape(-1), bitorder="little")
    assert digest == hashlib.sha256(packed.tobytes()).hexdigest()
    digests = {digest}
    for flat in range(keep_OI.numel()):
        flipped_OI = keep_OI.clone()
        flipped_OI.view(-1)[flat] ^= True
        digests.add(PackedMask.pack(flipped_OI).digest())
    assert len(digests) == 1 + keep_OI.numel()


# applying masks and changed weights


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(seed: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)  # none is zero


def views(weight_OI: Tensor) -> Iterator[Tensor]:
    """Yield the matrix, and views with the same content: transposed, one expert of three, every other column."""
    rows, width = weight_OI.shape
    yield weight_OI.clone()
    yield torch.empty(width, rows, dtype=weight_OI.dtype).T.copy_(weight_OI)
    yield torch.empty(3, rows, width, dtype=weight_OI.dtype)[1].copy_(weight_OI)
    yield torch.empty(rows, 2 * width, dtype=weight_OI.dtype)[:, ::2].copy_(weight_OI)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_applied_mask_sets_dropped_weights_to_zero(shape: tuple[int, int], dtype: torch.dtype) -> None:
    keep_OI, dense_OI = bits(6, shape), weights(7, shape, dtype)
    for weight_OI in views(dense_OI):
        PackedMask.pack(keep_OI).apply_(weight_OI)
        assert torch.equal(weight_OI[keep_OI], dense_OI[keep_OI])
        assert (weight_OI[~keep_OI] == 0).all()
        assert not weight_OI[~keep_OI].signbit().any(), "+0.0: a checkpoint's bytes depend on it"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_applied_changed_weights_replace_the_dense_weights(shape: tuple[int, int], dtype: torch.dtype) -> None:
    keep_OI, changed_OI = bits(8, shape), weights(9, shape, dtype)
    packed = PackedWeights.pack(keep_OI, changed_OI)
    assert packed.values.dtype == dtype
    assert packed.values.tolist() == [
        v for v, k in zip(changed_OI.flatten().tolist(), keep_OI.flatten().tolist(), strict=True) if k
    ]
    assert (packed.shape, packed.kept, packed.dropped) == (shape, int(keep_OI.sum()), int((~keep_OI).sum()))
    for weight_OI in views(weights(10, shape, dtype)):
        packed.apply_(weight_OI)
        assert torch.equal(weight_OI[keep_OI], changed_OI[keep_OI])
        assert (weight_OI[~keep_OI] == 0).all()
        assert not weight_OI[~keep_OI].signbit().any()


def test_changed_weights_are_written_to_the_parameter_only() -> None:
    keep_OI, changed_OI = bits(11, (6, 4)), weights(12, (6, 4))
    parameter = weights(13, (4, 6))  # [I, O], the layout of Conv1D
    PackedWeights.pack(keep_OI, changed_OI).apply_(parameter.T)
    assert torch.equal(parameter, (changed_OI * keep_OI).T)
    experts = weights(14, (3, 24)).view(3, 6, 4)
    others = experts[[0, 2]].clone()
    PackedWeights.pack(keep_OI, changed_OI).apply_(experts[1])
    assert torch.equal(experts[1], changed_OI * keep_OI)
    assert torch.equal(experts[[0, 2]], others)


def test_changed_weights_of_a_transposed_matrix_are_packed_by_its_own_rows() -> None:
    keep_OI, changed_OI = bits(15, (11, 6)).T, weights(16, (11, 6)).T
    packed = PackedWeights.pack(keep_OI, changed_OI)
    assert torch.equal(packed.values, changed_OI.contiguous()[keep_OI.contiguous()])
    assert packed.digest() == PackedWeights.pack(keep_OI.contiguous(), changed_OI.contiguous()).digest()


@pytest.mark.parametrize("kept", [True, False])
def test_all_or_no_weights_may_be_kept(kept: bool) -> None:
    changed_OI, weight_OI = weights(17, (5, 3)), weights(18, (5, 3))
    packed = PackedWeights.pack(torch.full((5, 3), kept), changed_OI)
    packed.apply_(weight_OI)
    assert torch.equal(weight_OI, changed_OI * kept)
    assert len(packed.digest()) == 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_depends_on_the_mask_and_every_kept_weight(dtype: torch.dtype) -> None:
    keep_OI, changed_OI = bits(19, (4, 6)), weights(20, (4, 6), dtype)
    digest = PackedWeights.pack(keep_OI, changed_OI).digest()
    assert digest == PackedWeights.pack(keep_OI.clone(), changed_OI.clone()).digest()
    assert digest != PackedMask.pack(keep_OI).digest()
    assert digest == PackedWeights.pack(keep_OI, changed_OI * keep_OI).digest(), "dropped weights do not affect it"
    digests = {digest}
    for flat in keep_OI.view(-1).nonzero()[:, 0].tolist():
        other_OI = changed_OI.clone()
        other_OI.view(-1)[flat] *= 1.25
        digests.add(PackedWeights.pack(keep_OI, other_OI).digest())
    assert len(digests) == 1 + int(keep_OI.sum())
    ones_OI = torch.ones(4, 6, dtype=dtype)  # the same values under masks that keep as many
    assert len({PackedWeights.pack(keep, ones_OI).digest() for keep in (keep_OI, keep_OI.flip(0))}) == 2
