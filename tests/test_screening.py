"""Screening: which variants are evaluated, by hand-made forecasts."""

import math
import random

import pytest

from mlprune.spec.variants import Allocation, Propagation, Variant
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.screening import choose, forecast_metric


def variant(
    calibration: str | None,
    score: str = "wanda",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    propagation: Propagation = "dense",
    allocation: Allocation = "uniform",
    seed: int = 0,
) -> Variant:
    return parse_variant(calibration, score, sparsity, pattern, propagation, allocation, seed)


def labels(variants: list[Variant]) -> list[str]:
    return [one.label for one in variants]


WANDA, RIA = ([variant(f"mono:{code}", score) for code in ("en", "fr", "de")] for score in ("wanda", "ria"))


def test_rules_take_turns_whatever_their_forecasts() -> None:
    """Each forecast of ria is lower than each of wanda, which means nothing: every rule has its best evaluated."""
    forecasts = dict(zip([*WANDA, *RIA], [0.30, 0.10, 0.20, 0.03, 0.02, 0.01], strict=True))
    wanted = {
        1: ["ria 0.5 mono:de"],
        2: ["wanda 0.5 mono:fr", "ria 0.5 mono:de"],
        3: ["wanda 0.5 mono:fr", "ria 0.5 mono:fr", "ria 0.5 mono:de"],
        4: ["wanda 0.5 mono:fr", "wanda 0.5 mono:de", "ria 0.5 mono:fr", "ria 0.5 mono:de"],
        7: labels([*WANDA, *RIA]),
    }
    assert {count: labels(choose(forecasts, count)) for count in wanted} == wanted


@pytest.mark.parametrize(
    "other",
    [
        variant("mono:en", "ria"),
        variant("mono:en", pattern="2:4"),
        variant("mono:en", allocation="owl"),
        variant("mono:en", propagation="sequential"),
    ],
    ids=str,
)
def test_only_variants_of_one_kind_are_compared(other: Variant) -> None:
    forecasts = dict.fromkeys(WANDA, 0.1) | {other: 9.9}
    assert other in choose(forecasts, 2)


def test_both_sides_of_a_contrast_are_its_text() -> None:
    good, bad = (variant(None, f"contrastive:mono:fr/mono:{code}") for code in ("en", "de"))
    assert choose({bad: 0.2, good: 0.1}, 1) == [good]


def test_each_sparsity_has_its_own_number() -> None:
    sparser = [variant(f"mono:{code}", sparsity=0.7) for code in ("en", "fr", "de")]
    forecasts = dict(zip([*sparser, *WANDA], [0.5, 0.6, 0.4, 0.1, 0.3, 0.2], strict=True))
    assert labels(choose(forecasts, 2)) == [
        "wanda 0.7 mono:en",
        "wanda 0.7 mono:de",
        "wanda 0.5 mono:en",
        "wanda 0.5 mono:de",
    ]


def test_baselines_are_evaluated_and_not_counted() -> None:
    baselines = [variant(None, "magnitude"), variant(None, "random", seed=1)]
    calibrated = variant("mono:en", "magnitude", allocation="owl")  # it reads text: no baseline
    forecasts = {baselines[0]: 0.9, **dict.fromkeys(WANDA, 0.1), baselines[1]: 0.9, calibrated: 0.8}
    assert choose(forecasts, 1) == [baselines[0], WANDA[0], baselines[1]]
    assert choose(forecasts, 2) == [baselines[0], WANDA[0], baselines[1], calibrated]


def test_seeds_are_averaged_and_chosen_together() -> None:
    """English has the best single seed, French the best mean. A failed seed leaves the mean of the others."""
    seeds = {code: [variant(f"mono:{code}", seed=seed) for seed in (0, 1, 2)] for code in ("en", "fr")}
    forecasts = dict(zip(seeds["en"], [0.1, 0.4, 0.4], strict=True))
    forecasts |= dict(zip(seeds["fr"], [0.2, 0.3, 0.2], strict=True))
    assert choose(forecasts, 1) == seeds["fr"]
    del forecasts[seeds["en"][2]], forecasts[seeds["en"][1]]
    assert choose(forecasts, 1) == seeds["en"][:1]


def test_the_choice_does_not_depend_on_the_order_of_trials() -> None:
    draw = random.Random(0)
    forecasts = {
        variant(f"mono:{code}", score, sparsity, seed=seed): draw.random()
        for code in ("en", "fr", "de", "es")
        for score in ("wanda", "ria")
        for sparsity in (0.3, 0.5)
        for seed in (0, 1)
    }
    expected = choose(forecasts, 3)
    assert expected == [one for one in forecasts if one in set(expected)], "in the given order"
    assert len(expected) == 3 * 2 * 2
    for _ in range(5):
        shuffled = dict(draw.sample(list(forecasts.items()), len(forecasts)))
        assert set(choose(shuffled, 3)) == set(expected)


def test_a_forecast_that_is_not_a_number_is_the_worst() -> None:
    for forecasts in ([math.nan, 0.2, 0.1], [0.1, math.nan, 0.2], [0.2, 0.1, math.nan]):
        by_variant = dict(zip(WANDA, forecasts, strict=True))
        assert choose(by_variant, 1) == [one for one, value in by_variant.items() if value == 0.1]


def test_the_forecast_is_that_of_the_objective() -> None:
    for objective, forecast in {
        "loss.mean": "forecast.mean",
        "loss.worst": "forecast.worst",
        "loss.fr": "forecast.fr",
        "xnli.fr": "forecast.mean",
        "bits_per_byte.fr": "forecast.mean",
    }.items():
        assert forecast_metric(objective) == forecast
