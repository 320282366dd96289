"""A picture of a sweep: forecasts of damage against the measured loss, a panel per language.

Forecasts are computed in `mlprune.pruning.energy`, correlations in `mlprune.evaluation.forecasts`.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from mlprune.analysis.figures import (
    AXIS_LIMIT,
    COLUMNS,
    MARKERS,
    by_sparsity,
    legend_entry,
    panel_grid,
    sparsity_of,
    write_png,
)
from mlprune.evaluation.forecasts import MIN_RANKED, forecast_and_loss, forecast_correlation
from mlprune.spec.languages import language_name
from mlprune.storage.results import Result

MIN_TRIALS = 4  # a picture of fewer says nothing


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
            _draw_trial(panel, forecast_and_loss(dense, result, language), color, marker)
        panel.set_title(_panel_title(dense, results, language), fontsize="medium")
        panel.set_xlabel("forecast: share of energy dropped")
        panel.grid(alpha=0.3)
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("measured loss, %")
    entries = [
        *(legend_entry(f"sparsity {sparsity:.4g}", color, "s") for sparsity, color in colors.items()),
        *(legend_entry(score, "0.4", marker) for score, marker in markers.items()),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(6, len(entries)), frameon=False)
    write_png(figure, title, file)


def _score(result: Result) -> str:
    assert result.variant is not None
    return result.variant.score.name


def _draw_trial(panel: Axes, point: tuple[float, float], color: str, marker: str) -> None:
    x, y, end = point[0], 100 * point[1], 100 * (AXIS_LIMIT - 1)
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
