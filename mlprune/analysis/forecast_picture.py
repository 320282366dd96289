"""A picture of a sweep: forecasts of damage against the measured loss, a panel per language.

How forecasts are computed is in `mlprune.pruning.energy`.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scipy.stats import spearmanr

from mlprune.analysis.figures import AXIS_LIMIT, COLUMNS, MARKERS, by_sparsity, panel_grid, sparsity_of, write_png
from mlprune.evaluation.loss import loss_metrics
from mlprune.spec.languages import language_name
from mlprune.storage.results import Result

MIN_TRIALS = 4  # a picture of fewer says nothing
MIN_RANKED = 3  # two trials always have a rank correlation of 1 or -1


def with_forecasts(results: Sequence[Result]) -> list[Result]:
    """Return the trials that were both forecast and evaluated; earlier versions made no forecasts."""
    return [one for one in results if {"forecast.mean", "bits_per_byte.mean"} <= one.metrics.keys()]


def forecast_correlation(dense: Result, results: Sequence[Result], language: str) -> float:
    """Return Spearman's rho of the forecast of a language, or of `mean` or `worst`, and its measured loss.

    NaN for fewer than three trials with a finite loss, or if all of them are equal.
    """
    points = [_point(dense, result, language) for result in results]
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) < MIN_RANKED or min(len(set(values)) for values in zip(*finite, strict=True)) == 1:
        return math.nan
    return float(spearmanr(finite).statistic)


def _point(dense: Result, result: Result, language: str) -> tuple[float, float]:
    """Return the forecast of a trial, and its loss in percent."""
    loss = loss_metrics(result.metrics, dense.metrics)
    return result.metrics[f"forecast.{language}"], 100 * loss[f"loss.{language}"]


def draw_forecasts(
    dense: Result, results: Sequence[Result], languages: Sequence[str], title: str, file: Path
) -> None:
    """Draw the measured loss of each language against its forecast as PNG: a point per trial.

    Colours are sparsities, markers are scores. Above each panel is Spearman's rho over all trials and within each
    sparsity. As in the other pictures, an axis ends at three times the dense model's value; points beyond it are
    drawn there, hollow.
    """
    figure, panels = panel_grid(len(languages), min(COLUMNS, len(languages)), (4.2, 3.5), 1.4)
    groups = by_sparsity(results)
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(groups)))
    colors = {sparsity: mpl.colors.to_hex(shade) for sparsity, shade in zip(groups, shades, strict=True)}
    scores = dict.fromkeys(_score(result) for result in results)
    markers = {score: MARKERS[number % len(MARKERS)] for number, score in enumerate(scores)}
    for panel, language in zip(panels, languages, strict=True):
        for result in results:
            color, marker = colors[sparsity_of(result)], markers[_score(result)]
            _draw_trial(panel, _point(dense, result, language), color, marker)
        panel.set_title(_panel_title(dense, results, language), fontsize="medium")
        panel.set_xlabel("forecast: share of energy dropped")
        panel.grid(alpha=0.3)
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("measured loss, %")
    entries = [
        *(_entry(f"sparsity {sparsity:.4g}", color, "s") for sparsity, color in colors.items()),
        *(_entry(score, "0.4", marker) for score, marker in markers.items()),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(6, len(entries)), frameon=False)
    write_png(figure, title, file)


def _score(result: Result) -> str:
    assert result.variant is not None
    return result.variant.score.name


def _entry(label: str, color: str, marker: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, linestyle="none", label=label)


def _draw_trial(panel: Axes, point: tuple[float, float], color: str, marker: str) -> None:
    (x, y), end = point, 100 * (AXIS_LIMIT - 1)
    face = color if y <= end else "none"
    panel.plot(x, min(y, end), marker, color=color, markerfacecolor=face, markersize=6)


def _panel_title(dense: Result, results: Sequence[Result], language: str) -> str:
    """Return `French: rho 0.98`, and below it rho within each sparsity that has enough trials."""
    groups = {sparsity: group for sparsity, group in by_sparsity(results).items() if len(group) >= MIN_RANKED}
    within = [
        f"{forecast_correlation(dense, group, language):.2f} at {name:.4g}" for name, group in groups.items()
    ]
    first = f"{language_name(language)}: rho {forecast_correlation(dense, results, language):.2f}"
    return "\n".join([first, *(", ".join(within[n : n + 4]) for n in range(0, len(within), 4))])
