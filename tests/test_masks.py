"""Masks: the right count in every row and group, ties by index, and one bit a weight that comes back."""

import hashlib
from collections.abc import Iterator
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlprune.pruning import masks
from mlprune.pruning.masks import PackedMask, dropped_per_row, keep_mask
from mlprune.variants import Pattern

SPARSITIES = (0.0, 0.1, 0.29, 0.3, 0.5, 0.57, 0.7, 0.99)
PATTERNS = ("2:4", "4:8", "1:4", "3:5", "1:2")
UNSTRUCTURED = Pattern()


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
def test_rows_lose_their_smallest_and_of_ties_the_first(sparsity: float, levels: int) -> None:
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


def test_the_branch_for_other_devices_finds_the_same_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    score_OI = scores(3, 9, 50, 6)
    expected = keep_mask(score_OI, 0.4, UNSTRUCTURED)
    monkeypatch.setattr(masks, "_kth_smallest", lambda score, k: score.kthvalue(k, dim=1).values)
    assert torch.equal(keep_mask(score_OI, 0.4, UNSTRUCTURED), expected)


def test_the_count_is_that_of_the_decimal_that_was_written() -> None:
    assert 100 * 0.29 < 29  # what binary makes of it
    assert dropped_per_row(100, 0.29) == 29
    for hundredths in range(100):
        for width in (1, 7, 64, 100, 896, 4864, 11008, 28672):
            assert dropped_per_row(width, hundredths / 100) == width * hundredths // 100


@pytest.mark.parametrize("sparsity", [0.001, 0.3333, 1e-07, 0.999999])
def test_sparsities_of_many_digits(sparsity: float) -> None:
    assert dropped_per_row(11008, sparsity) == floor_of(11008, sparsity)


def test_nothing_is_dropped_at_zero_and_one_weight_stays_at_the_most() -> None:
    assert bool(keep_mask(scores(0, 5, 20, 3), 0.0, UNSTRUCTURED).all())
    kept_O = keep_mask(scores(0, 5, 100, 3), 0.99, UNSTRUCTURED).sum(1)
    assert kept_O.tolist() == [1] * 5


def test_signed_zeros_and_the_smallest_numbers_are_told_apart_by_value_only() -> None:
    score_OI = torch.tensor([[0.0, -0.0, 1e-45, 0.0, 5e-45, -0.0]])
    assert torch.equal(keep_mask(score_OI, 0.5, UNSTRUCTURED), by_sorting(score_OI, 3))
    assert keep_mask(score_OI, 0.5, UNSTRUCTURED).tolist() == [[False, False, True, False, True, True]]


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("levels", [1, 2, 4, 10**6])
def test_groups_keep_their_largest_and_of_ties_the_last(text: str, levels: int) -> None:
    pattern = Pattern.parse(text)
    for seed in range(5):
        score_OI = scores(seed, 9, 12 * pattern.group, levels)
        keep_OI = keep_mask(score_OI, 0.99, pattern)  # the pattern says how many, not the sparsity
        assert torch.equal(keep_OI, by_sorting_groups(score_OI, pattern))
        assert keep_OI.view(9, 12, pattern.group).sum(2).eq(pattern.kept).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 64), st.integers(1, 4), st.data())
def test_any_pattern(seed: int, group: int, levels: int, data: st.DataObject) -> None:
    pattern = Pattern(data.draw(st.integers(1, group - 1)), group)
    score_OI = scores(seed, 3, 2 * group, levels)
    assert torch.equal(keep_mask(score_OI, 0.5, pattern), by_sorting_groups(score_OI, pattern))


@pytest.mark.parametrize("text", ["unstructured", *PATTERNS])
def test_the_number_of_threads_changes_nothing(text: str) -> None:
    score_OI = scores(11, 300, 640, 40)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(keep_mask(score_OI, 0.37, Pattern.parse(text)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("text", ["unstructured", *PATTERNS])
def test_scores_may_be_a_view(text: str) -> None:
    score_IO = scores(5, 40, 24, 6)
    strided_OI = scores(6, 24, 80, 6)[:, ::2]
    for view_OI in (score_IO.T, strided_OI):
        before = view_OI.clone()
        assert not view_OI.is_contiguous()
        expected = keep_mask(view_OI.contiguous(), 0.45, Pattern.parse(text))
        assert torch.equal(keep_mask(view_OI, 0.45, Pattern.parse(text)), expected)
        assert torch.equal(view_OI, before), "scores are read, not sorted in place"


SHAPES = [(1, 1), (3, 5), (7, 9), (4, 8), (1, 15), (13, 17), (64, 64), (5, 1)]


def bits(seed: int, shape: tuple[int, int]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_packed_mask_comes_back(shape: tuple[int, int], seed: int) -> None:
    keep_OI = bits(seed, shape)
    packed = PackedMask.pack(keep_OI)
    assert packed.bits.dtype == torch.uint8
    assert len(packed.bits) == -(-keep_OI.numel() // 8)
    assert torch.equal(packed.unpack(), keep_OI)
    assert packed.unpack().dtype == torch.bool
    assert packed.shape == shape
    assert (packed.kept, packed.dropped) == (int(keep_OI.sum()), int((~keep_OI).sum()))


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_lie_as_numpy_packs_them(shape: tuple[int, int]) -> None:
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


def test_the_digest_is_of_the_bits() -> None:
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
