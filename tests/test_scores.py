"""Scores: each is compared with a worked example."""

import pickle
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlprune.errors import SpecError
from mlprune.pruning.masks import keep_mask
from mlprune.pruning.moments import Moments
from mlprune.pruning.scores import (
    SCORES,
    Score,
    Solver,
    contrastive,
    find_score,
    inverse_magnitude,
    inverse_wanda,
    magnitude,
    random,
    ria,
    wanda,
    wanda_alpha,
)
from mlprune.pruning.sparsegpt import sparsegpt
from mlprune.spec.variants import Pattern

WEIGHT_OI = torch.tensor([[1.0, -2.0, 0.5], [-3.0, 0.0, 4.0]])
INPUT_TI = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])  # norms 5, 0, 2
SEEN = Moments.of(INPUT_TI)
RULES = {name: rule for name, rule in SCORES.items() if isinstance(rule, Score)}
CALIBRATED = {name: rule for name, rule in RULES.items() if rule.sides}
UNSTRUCTURED = Pattern()


def of_squares(tokens: int, *sumsq: float) -> Moments:
    return Moments(tokens, torch.tensor(sumsq, dtype=torch.float64))


def weights(seed: int, rows: int, width: int) -> Tensor:
    """Normal, with some zeros, a row and a column of them, and some weights that tie."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, width, generator=generator)
    weight_OI[torch.rand(rows, width, generator=generator) < 0.1] = 0
    weight_OI[rows // 2], weight_OI[:, width // 3] = 0, 0
    weight_OI[:, -1] = weight_OI[:, 0]
    return weight_OI


def inputs(seed: int, tokens: int, channels: int) -> Moments:
    """Channels of very different sizes; every fifth is always zero."""
    generator = torch.Generator().manual_seed(seed)
    input_TI = torch.randn(tokens, channels, generator=generator) * torch.logspace(-2, 2, channels)
    input_TI[:, seed % 5 :: 5] = 0
    return Moments.of(input_TI)


def test_magnitude_is_the_absolute_weight() -> None:
    assert magnitude(WEIGHT_OI, (), 0).tolist() == [[1.0, 2.0, 0.5], [3.0, 0.0, 4.0]]


def test_wanda_is_the_absolute_weight_times_its_inputs_norm() -> None:
    assert wanda(WEIGHT_OI, [SEEN], 0).tolist() == [[5.0, 0.0, 1.0], [15.0, 0.0, 8.0]]


def test_wandas_norm_applies_to_inputs_also_in_a_square_matrix() -> None:
    weight_OI = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert wanda(weight_OI, [Moments.of(torch.tensor([[2.0, 7.0]]))], 0).tolist() == [[2.0, 7.0], [2.0, 7.0]]


def test_wanda_of_half_precision_is_computed_in_float32() -> None:
    weight_OI = torch.tensor([[1.0078125]], dtype=torch.bfloat16)  # 1 + 2**-7, its last bit
    assert wanda(weight_OI, [of_squares(1, 1.0078125**2)], 0).item() == 1.0078125**2  # 1 + 2**-6 + 2**-14


def test_wanda_of_a_transposed_weight() -> None:
    weight_OI = torch.arange(6.0).reshape(3, 2).T
    assert wanda(weight_OI, [SEEN], 0).tolist() == [[0.0, 0.0, 8.0], [5.0, 0.0, 10.0]]


def test_controls_are_the_negated_scores() -> None:
    assert inverse_magnitude(WEIGHT_OI, (), 0).tolist() == [[-1.0, -2.0, -0.5], [-3.0, 0.0, -4.0]]
    assert inverse_wanda(WEIGHT_OI, [SEEN], 0).tolist() == [[-5.0, 0.0, -1.0], [-15.0, 0.0, -8.0]]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_control_drops_what_its_score_keeps(pattern: str) -> None:
    weight_OI, sides = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)), [inputs(1, 50, 20)]
    for name, score_sides in (("magnitude", []), ("wanda", sides)):
        keep_OI, inverse_OI = (
            keep_mask(RULES[score].function(weight_OI, score_sides, 0)[:, 2:18], 0.5, Pattern.parse(pattern))
            for score in (name, f"inverse-{name}")
        )
        used_I = torch.ones(16, dtype=torch.bool) if name == "magnitude" else sides[0].sumsq_I[2:18] > 0
        differs_OI = keep_OI != inverse_OI
        assert differs_OI[:, used_I].float().mean() > 0.7  # unused channels tie at zero, and shift the middle
        if name == "magnitude":
            assert differs_OI.all()


# wanda-alpha


def test_worked_example_of_wanda_alpha() -> None:
    # sorted, the rows are 0, 1, 5 (sum 6) and 0, 8, 15 (sum 23); summed up 0, 1, 6 and 0, 8, 23
    expected_OI = torch.tensor([[6 / 6, 0.0, 1 / 6], [23 / 23, 0.0, 8 / 23]])
    assert torch.equal(wanda_alpha(WEIGHT_OI, [SEEN], 0), expected_OI)
    # alpha between 1/6 and 8/23 drops three of the six: two of the first row, one of the second
    keep_OI = keep_mask(expected_OI, 0.5, UNSTRUCTURED, SCORES["wanda-alpha"].within)
    assert keep_OI.tolist() == [[True, False, False], [True, False, True]]


def by_alpha(score_OI: Tensor, alpha: float) -> Tensor:
    """The definition: drop the smallest scores of a row while their sum is at most alpha times the row's sum."""
    drop_OI = torch.zeros(score_OI.shape, dtype=torch.bool)
    for row, score_I in enumerate(score_OI.double()):
        so_far, whole = 0.0, float(score_I.sum())
        for place in score_I.argsort(stable=True).tolist():
            so_far += float(score_I[place])
            if so_far > alpha * whole:
                break
            drop_OI[row, place] = True
    return drop_OI


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("seed", range(3))
def test_wanda_alpha_equals_bisection(seed: int, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # rows that differ in how evenly their weights are spread, so that they are not all cut at one place
    weight_OI = torch.randn(12, 30, generator=generator) ** torch.arange(1, 13)[:, None]
    sides = [Moments.of(torch.randn(40, 30, generator=generator))]
    score_OI = wanda(weight_OI, sides, 0)
    target = int(360 * sparsity)
    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        low, high = (alpha, high) if by_alpha(score_OI, alpha).sum() < target else (low, alpha)
    drop_OI = by_alpha(score_OI, high)
    assert int(drop_OI.sum()) == target
    keep_OI = keep_mask(wanda_alpha(weight_OI, sides, 0), sparsity, UNSTRUCTURED, "matrix")
    assert torch.equal(~keep_OI, drop_OI)
    assert len(set(drop_OI.sum(1).tolist())) > 1, "rows must lose different numbers, unlike with Wanda"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 60))
def test_shares_increase_with_the_score_within_a_row(seed: int, rows: int, width: int) -> None:
    weight_OI, sides = weights(seed, rows, width), [inputs(seed, 9, width)]
    score_OI, share_OI = wanda(weight_OI, sides, 0), wanda_alpha(weight_OI, sides, 0)
    place_OI = score_OI.argsort(dim=1, stable=True)
    sorted_OI, rising_OI = score_OI.gather(1, place_OI), share_OI.gather(1, place_OI)
    assert (share_OI[score_OI == 0] == 0).all()
    assert (rising_OI.diff(dim=1)[sorted_OI[:, 1:] > 0] > 0).all(), "strictly: there are no new ties"
    assert set(rising_OI[:, -1].tolist()) <= {0.0, 1.0}, "one for the largest score; zero if the row is zero"
    assert torch.equal(rising_OI[:, -1] == 0, score_OI.sum(1) == 0)


def test_shares_of_rows_as_wide_as_models_have_are_rounded_once() -> None:
    weight_OI = torch.rand(2, 57344, generator=torch.Generator().manual_seed(0)) + 0.5
    share_OI = wanda_alpha(weight_OI, [of_squares(1, *[1.0] * 57344)], 0)
    assert [len(row.unique()) for row in share_OI] == [57344, 57344]
    sum_OI = weight_OI.double().sort(dim=1).values.cumsum(1)
    expected_OI = sum_OI / sum_OI[:, -1:]
    assert ((share_OI.sort(dim=1).values - expected_OI).abs() <= 1.0001 * 2**-24 * expected_OI).all()


def test_rows_sorted_in_later_chunks_are_treated_alike() -> None:
    weight_OI = weights(3, 7, 11).repeat(400, 1)
    share_OI = wanda_alpha(weight_OI, [inputs(2, 9, 11)], 0)
    assert torch.equal(share_OI, share_OI[:7].repeat(400, 1))


# contrastive


def test_worked_example_of_contrastive() -> None:
    weight_OI = torch.tensor([[1.0, -2.0, 1.0], [-3.0, 0.0, 4.0]])
    keep = of_squares(2, 8.0, 18.0, 0.0)  # a token: 4, 9, 0
    against = of_squares(4, 16.0, 36.0, 100.0)  # a token: 4, 9, 25; their roots 2, 3, 5
    # 4/2 = 2, 9/3 = 3, 0/5 = 0
    assert contrastive(weight_OI, [keep, against], 0).tolist() == [[2.0, 6.0, 0.0], [6.0, 0.0, 0.0]]


def test_channels_that_only_keep_uses_stay_and_unused_ones_are_dropped() -> None:
    weight_OI = torch.ones(1, 4)
    keep = of_squares(1, 4.0, 9.0, 0.0, 1.0)
    against = of_squares(1, 16.0, 0.0, 0.0, 4.0)  # norms 4, 0, 0, 2
    # 4/4, 9/2 (2 is the smallest above zero), 0, 1/2
    assert contrastive(weight_OI, [keep, against], 0).tolist() == [[1.0, 4.5, 0.0, 0.5]]
    # `against` uses nothing: divided by one
    assert contrastive(weight_OI, [keep, of_squares(7, 0.0, 0.0, 0.0, 0.0)], 0).tolist() == [[4.0, 9.0, 0.0, 1.0]]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_contrastive_is_finite_for_unused_channels(a: int, b: int, width: int, first: int, second: int) -> None:
    weight_OI, keep, against = weights(a, 4, width), inputs(a, first, width), inputs(b, second, width)
    score_OI = contrastive(weight_OI, [keep, against], 0)
    assert score_OI.isfinite().all()
    assert torch.equal(score_OI == 0, (weight_OI == 0) | (keep.sumsq_I == 0))
    both_I = (keep.sumsq_I > 0) & (against.sumsq_I > 0)
    mean_I, norm_I = keep.sumsq_I / first, (against.sumsq_I / second).sqrt()
    expected_OI = (weight_OI.double().abs() * mean_I / norm_I)[:, both_I]
    # rounded to float32 twice: the factor and the product
    assert ((score_OI[:, both_I] - expected_OI).abs() <= 2**-23 * expected_OI).all()


def test_channel_unused_by_both_sides_is_dropped() -> None:
    """The paper's code makes NaN of 0/0, which sorts as the largest, and keeps the dead channel."""
    weight_OI = torch.ones(3, 4)
    keep, against = of_squares(1, 5.0, 0.0, 3.0, 4.0), of_squares(1, 1.0, 0.0, 1.0, 1.0)
    keep_OI = keep_mask(contrastive(weight_OI, [keep, against], 0), 0.25, UNSTRUCTURED)
    assert keep_OI.tolist() == [[True, False, True, True]] * 3


def test_first_side_is_kept_and_second_is_penalised() -> None:
    """In the paper's code, the order of a set of strings decides, which differs between processes."""
    keep, against = of_squares(1, 16.0, 1.0), of_squares(1, 1.0, 16.0)
    assert contrastive(torch.ones(1, 2), [keep, against], 0).tolist() == [[16.0, 0.25]]
    assert contrastive(torch.ones(1, 2), [against, keep], 0).tolist() == [[0.25, 16.0]]


def test_contrastive_uses_means_per_token() -> None:
    weight_OI = weights(0, 5, 12)
    generator = torch.Generator().manual_seed(4)
    keep_TI, against_TI = torch.randn(10, 12, generator=generator), torch.randn(6, 12, generator=generator)
    score_OI = contrastive(weight_OI, [Moments.of(keep_TI), Moments.of(against_TI)], 0)
    longer = [Moments.of(keep_TI.repeat(4, 1)), Moments.of(against_TI.repeat(16, 1))]
    torch.testing.assert_close(contrastive(weight_OI, longer, 0), score_OI, rtol=1e-6, atol=0)


# relative importance


def test_worked_example_of_relative_importance() -> None:
    weight_OI = torch.tensor([[1.0, -2.0, 1.0], [-3.0, 0.0, 1.0]])  # rows sum to 4 and 4, columns to 4, 2, 2
    seen = of_squares(9, 16.0, 81.0, 1.0)  # norms 4, 9, 1; their roots 2, 3, 1
    # (1/4 + 1/4) * 2, (2/4 + 2/2) * 3, (1/4 + 1/2) * 1; (3/4 + 3/4) * 2, 0, (1/4 + 1/2) * 1
    assert ria(weight_OI, [seen], 0).tolist() == [[1.0, 4.5, 0.75], [3.0, 0.0, 0.75]]


def test_rows_and_columns_of_zeros_score_zero() -> None:
    weight_OI = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    # (1/4 + 1/1) * 1, 0, (3/4 + 3/3) * 1
    assert ria(weight_OI, [of_squares(1, 1.0, 1.0, 1.0)], 0).tolist() == [[0.0, 0.0, 0.0], [1.25, 0.0, 1.75]]


def test_relative_importance_does_not_depend_on_row_size() -> None:
    weight_OI = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    seen = [of_squares(1, 1.0, 1.0)]
    # (2/3 + 2/2001) against (2000/3000 + 2000/2001) once the second row is a thousand times as large
    score_OI = ria(weight_OI * torch.tensor([[1.0], [1000.0]]), seen, 0)
    expected_OI = torch.tensor([[2 / 3 + 2 / 1002, 1 / 3 + 1 / 2001], [1 / 3 + 1000 / 1002, 2 / 3 + 2000 / 2001]])
    torch.testing.assert_close(score_OI, expected_OI, rtol=1e-6, atol=0)


# all


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_float32_and_inputs_are_not_modified(name: str, dtype: torch.dtype) -> None:
    rule, weight_OI = RULES[name], WEIGHT_OI.to(dtype)
    sides = [Moments.of(INPUT_TI), Moments.of(INPUT_TI[1:])][: rule.sides]
    before = [side.sumsq_I.clone() for side in sides]
    score_OI = rule.function(weight_OI, sides, 3)
    assert score_OI.dtype == torch.float32
    assert score_OI.shape == weight_OI.shape
    assert (score_OI <= 0 if name.startswith("inverse-") else score_OI >= 0).all()
    assert torch.equal(weight_OI, WEIGHT_OI.to(dtype))
    assert all(torch.equal(side.sumsq_I, old) for side, old in zip(sides, before, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_scores_of_a_view_equal_those_of_the_matrix(name: str) -> None:
    rule, weight_OI = RULES[name], weights(8, 6, 10)
    sides = [inputs(1, 9, 10), inputs(2, 9, 10)][: rule.sides]
    view_OI = weight_OI.T.contiguous().T
    score_OI, expected_OI = (rule.function(weight, sides, 0) for weight in (view_OI, weight_OI))
    torch.testing.assert_close(score_OI, expected_OI, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CALIBRATED)
def test_score_without_tokens_is_the_absolute_weight(name: str) -> None:
    rule = CALIBRATED[name]
    sign = -1 if name.startswith("inverse-") else 1
    for empty in range(rule.sides):
        sides = [Moments.zeros(3) if side == empty else SEEN for side in range(rule.sides)]
        assert torch.equal(rule.function(WEIGHT_OI, sides, 0), sign * WEIGHT_OI.abs())


@pytest.mark.parametrize("name", CALIBRATED)
def test_number_of_sides_must_match_the_score(name: str) -> None:
    rule = CALIBRATED[name]
    wrong: Sequence[Sequence[Moments]] = ([], [SEEN] * (rule.sides + 1))
    for sides in wrong:
        with pytest.raises(ValueError, match="to unpack"):
            rule.function(WEIGHT_OI, sides, 0)


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinite_sums_give_infinite_scores(name: str, value: float) -> None:
    """Overflowed sums are visible in the scores, so that the caller can refuse them."""
    rule = CALIBRATED[name]
    sides = [of_squares(4, value, 1.0, 4.0), SEEN][: rule.sides]
    assert not rule.function(WEIGHT_OI, sides, 0).isfinite().all()


def test_random_depends_on_the_seed_alone() -> None:
    first = random(WEIGHT_OI, (), 5)
    torch.manual_seed(77)  # the global generator is neither read nor advanced
    before = torch.random.get_rng_state()
    assert torch.equal(random(WEIGHT_OI * 3, [SEEN], 5), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(random(WEIGHT_OI, (), 6), first)


def test_random_is_uniform() -> None:
    score_OI = random(torch.empty(100, 100), (), 0)
    counts = torch.histc(score_OI, 10, 0, 1)
    assert 0 <= float(score_OI.min()) <= float(score_OI.max()) < 1
    assert counts.min() > 1000 - 5 * 30  # ten bins of 1,000, five standard deviations
    assert counts.max() < 1000 + 5 * 30


def test_sides_and_comparison_of_each_score() -> None:
    assert {name: (rule.sides, rule.within) for name, rule in RULES.items()} == {
        "random": (0, "row"),
        "magnitude": (0, "row"),
        "wanda": (1, "row"),
        "wanda-alpha": (1, "matrix"),
        "contrastive": (2, "row"),
        "inverse-magnitude": (0, "row"),
        "inverse-wanda": (1, "row"),
        "ria": (1, "matrix"),
    }
    solvers = {name: rule for name, rule in SCORES.items() if name not in RULES}
    assert solvers == {"sparsegpt": Solver(sparsegpt, sides=1)}


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.999])
@pytest.mark.parametrize("name", RULES)
def test_number_of_dropped_weights_is_exact(name: str, sparsity: float) -> None:
    rule = RULES[name]
    sides = [inputs(1, 9, 100), inputs(2, 9, 100)][: rule.sides]
    weight_OI = weights(5, 10, 100).round(decimals=1)  # many ties
    keep_OI = keep_mask(rule.function(weight_OI, sides, 0), sparsity, UNSTRUCTURED, rule.within)
    in_rows = {0.0: 0, 0.29: 290, 0.5: 500, 0.999: 990}[sparsity]
    assert int((~keep_OI).sum()) == (999 if rule.within == "matrix" and sparsity == 0.999 else in_rows)


def test_unknown_score_is_reported_in_one_line() -> None:
    assert find_score("wanda") is SCORES["wanda"]
    with pytest.raises(SpecError) as caught:
        find_score("wnda", "search.score[1]")
    assert str(caught.value) == (
        "search.score[1]: 'wnda': no such score; write one of random, magnitude, wanda, wanda-alpha, contrastive, "
        "inverse-magnitude, inverse-wanda, ria, sparsegpt"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
