"""Forecasts of damage against the measured loss of the same trials: their points and their rank correlation.

Forecasts are computed in `mlprune.pruning.energy` and drawn in `mlprune.analysis.forecast_picture`.
"""

import math
from collections.abc import Sequence

from mlprune.evaluation.loss import loss_metrics
from mlprune.storage.results import Result

MIN_RANKED = 3  # two trials always have a rank correlation of 1 or -1


def with_forecasts(results: Sequence[Result]) -> list[Result]:
    """Return the trials that were both forecast and evaluated; earlier versions made no forecasts."""
    return [one for one in results if {"forecast.mean", "bits_per_byte.mean"} <= one.metrics.keys()]


def forecast_and_loss(dense: Result, result: Result, language: str) -> tuple[float, float]:
    """Return the forecast of a trial for a language, or for `mean` or `worst`, and its measured loss."""
    loss = loss_metrics(result.metrics, dense.metrics)
    return result.metrics[f"forecast.{language}"], loss[f"loss.{language}"]


def forecast_correlation(dense: Result, results: Sequence[Result], language: str) -> float:
    """Return Spearman's rho of forecast and measured loss over trials `with_forecasts`.

    NaN for fewer than three trials with a finite loss, or if forecasts or losses are all equal.
    """
    from scipy.stats import spearmanr

    points = [forecast_and_loss(dense, result, language) for result in results]
    finite = [(forecast, loss) for forecast, loss in points if math.isfinite(loss)]
    if len(finite) < MIN_RANKED or min(len(set(values)) for values in zip(*finite, strict=True)) == 1:
        return math.nan
    return float(spearmanr(finite).statistic)
