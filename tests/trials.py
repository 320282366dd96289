"""Trials by hand, for tests of rankings and races: English and French lines, two of each document."""

from collections.abc import Sequence

import numpy as np

from mlprune.evaluation.items import Items
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.ranking import Standing, Trial
from mlprune.sweep.trial import trial_metrics
from tests.runs import likelihood

LINES = 40
DOCUMENTS = np.arange(LINES) // 2
DRAW = np.random.default_rng(0)
SIZE = DRAW.integers(20, 200, (2, LINES))
HARD = DRAW.gamma(9, 0.1, (2, LINES))
FORECAST = {"forecast.mean": 0.1, "forecast.worst": 0.2}


def variant(
    calibration: str | None = "mono:en", score: str = "wanda", sparsity: float = 0.5, seed: int = 0
) -> Variant:
    return parse_variant(calibration, score, sparsity, "unstructured", "dense", "uniform", seed)


EN, FR, DE, ES = (variant(f"mono:{code}") for code in ("en", "fr", "de", "es"))
MAGNITUDE = variant(None, "magnitude")


def seeds_of(one: Variant, *seeds: int) -> list[Variant]:
    return [variant(one.calibration_text, one.score.name, one.sparsity, seed) for seed in seeds]


def texts(harm: Sequence[float], noise: float = 0.0, seed: int = 0) -> list[Items]:
    """Return the likelihoods of English and French lines: `harm` is the change of the nats of each language."""
    extra = 1 + np.array(harm)[:, None] + np.random.default_rng(seed).normal(0, 1, (2, LINES)) * noise
    return [
        likelihood(SIZE[index] * HARD[index] * extra[index], SIZE[index], code, DOCUMENTS)
        for index, code in enumerate(("en", "fr"))
    ]


def trial(
    one: Variant | None, items: Sequence[Items], standing: Standing = Standing.EVALUATED, **metrics: float
) -> Trial:
    values = {**FORECAST, **trial_metrics(items), **metrics}
    key = one.key if one else "dense"
    return Trial(Result(key, one, values, digest=f"masks of {key}"), items, standing)


DENSE = trial(None, texts([0, 0]))
