"""Scores: each against an example worked by hand."""

import pickle

import pytest
import torch

from mlprune.errors import SpecError
from mlprune.pruning.moments import Moments
from mlprune.pruning.scores import SCORES, magnitude, random, score_named, wanda

WEIGHT_OI = torch.tensor([[1.0, -2.0, 0.5], [-3.0, 0.0, 4.0]])
INPUT_TI = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])  # norms 5, 0, 2


def test_magnitude_is_the_absolute_weight() -> None:
    assert magnitude(WEIGHT_OI, None, 0).tolist() == [[1.0, 2.0, 0.5], [3.0, 0.0, 4.0]]


def test_wanda_is_the_absolute_weight_times_its_inputs_norm() -> None:
    score_OI = wanda(WEIGHT_OI, Moments.of(INPUT_TI), 0)
    assert score_OI.tolist() == [[5.0, 0.0, 1.0], [15.0, 0.0, 8.0]]


def test_wandas_norm_goes_along_the_inputs_even_of_a_square_matrix() -> None:
    weight_OI = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert wanda(weight_OI, Moments.of(torch.tensor([[2.0, 7.0]])), 0).tolist() == [[2.0, 7.0], [2.0, 7.0]]


def test_wanda_without_tokens_is_the_absolute_weight() -> None:
    assert torch.equal(wanda(WEIGHT_OI, Moments.zeros(3), 0), WEIGHT_OI.abs())


def test_wanda_without_moments_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        wanda(WEIGHT_OI, None, 0)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_float32_of_the_weights_shape_and_leave_the_weight_alone(name: str, dtype: torch.dtype) -> None:
    weight_OI = WEIGHT_OI.to(dtype)
    score_OI = SCORES[name].function(weight_OI, Moments.of(INPUT_TI), 3)
    assert score_OI.dtype == torch.float32
    assert score_OI.shape == weight_OI.shape
    assert (score_OI >= 0).all()
    assert torch.equal(weight_OI, WEIGHT_OI.to(dtype))


def test_wanda_of_half_precision_is_computed_in_float32() -> None:
    weight_OI = torch.tensor([[1.0078125]], dtype=torch.bfloat16)  # 1 + 2**-7, its last bit
    moments = Moments(1, torch.tensor([1.0078125**2], dtype=torch.float64))
    assert wanda(weight_OI, moments, 0).item() == 1.0078125**2  # 1 + 2**-6 + 2**-14


def test_wanda_of_a_transposed_weight() -> None:
    weight_OI = torch.arange(6.0).reshape(3, 2).T
    assert wanda(weight_OI, Moments.of(INPUT_TI), 0).tolist() == [[0.0, 0.0, 8.0], [5.0, 0.0, 10.0]]


def test_random_is_seeded_and_reads_nothing_else() -> None:
    first = random(WEIGHT_OI, None, 5)
    torch.manual_seed(77)  # the global generator is neither read nor moved
    before = torch.random.get_rng_state()
    assert torch.equal(random(WEIGHT_OI * 3, Moments.of(INPUT_TI), 5), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(random(WEIGHT_OI, None, 6), first)


def test_random_is_uniform() -> None:
    score_OI = random(torch.empty(100, 100), None, 0)
    counts = torch.histc(score_OI, 10, 0, 1)
    assert 0 <= float(score_OI.min()) <= float(score_OI.max()) < 1
    assert counts.min() > 1000 - 5 * 30  # ten bins of 1,000, five standard deviations
    assert counts.max() < 1000 + 5 * 30


def test_what_reads_moments_says_so() -> None:
    assert {name: score.reads_moments for name, score in SCORES.items()} == {
        "random": False,
        "magnitude": False,
        "wanda": True,
    }
    for score in SCORES.values():
        if not score.reads_moments:
            score.function(WEIGHT_OI, None, 0)


def test_an_unknown_score_is_answered_in_one_line() -> None:
    assert score_named("wanda") is SCORES["wanda"]
    with pytest.raises(SpecError) as caught:
        score_named("wnda", "search.score[1]")
    assert str(caught.value) == "search.score[1]: 'wnda': no such score; write one of random, magnitude, wanda"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
