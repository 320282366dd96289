"""A picture of a sweep: the worst language against the mean, with the Pareto front of each sparsity."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from mlprune.analysis.figures import (
    AXIS_LIMIT,
    MARKERS,
    by_sparsity,
    panel_grid,
    short_names,
    sparsity_of,
    write_png,
)
from mlprune.evaluation.significance import Interval
from mlprune.storage.results import Result

Color = NDArray[np.float64] | str

MAX_LABELS = 8
LABEL_GAP = 0.06  # between labels, as a share of the axis


def draw_trade_off(
    dense: Result,
    results: Sequence[Result],
    title: str,
    file: Path,
    changes: Mapping[str, Interval] | None = None,
) -> None:
    """Draw the worst language against the mean, a point per trial, with the Pareto front of each sparsity, as PNG.

    Bits per byte are compared within a sparsity: a front over all sparsities would be that of the lowest. Axes end
    at three times the dense model's values; points beyond are drawn there, hollow. `changes` (see
    `sweep_pictures.draw_pictures`) adds the interval of the mean.
    """
    figure, (panel,) = panel_grid(1, 1, (11.0, 6.0), 1.0)
    groups = by_sparsity([result for result in results if has_likelihood(result)])
    colors = dict(zip(groups, mpl.colormaps["viridis"](np.linspace(0, 0.85, len(groups))), strict=True))
    scores = dict.fromkeys(_score(result) for group in groups.values() for result in group)
    markers = {score: MARKERS[number % len(MARKERS)] for number, score in enumerate(scores)}
    for sparsity, group in groups.items():
        _draw_group(panel, dense, group, colors[sparsity], markers, changes or {})
    panel.plot(*_mean_and_worst(dense), "*", color="black", markersize=11)
    panel.set(xlabel="mean, bits per byte (lower is better)", ylabel="worst language, bits per byte")
    panel.grid(alpha=0.3)
    names = short_names(results)
    labelled = _trials_to_label(groups.values())
    _label(panel, [(names[trial.key], sparsity_of(trial), _position(trial, dense)) for trial in labelled])
    entries = [
        *(_legend_entry(f"sparsity {sparsity:.4g}", color, "s") for sparsity, color in colors.items()),
        *(_legend_entry(score, "0.4", marker) for score, marker in markers.items()),
        _legend_entry("dense model", "black", "*"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(6, len(entries)), frameon=False)
    write_png(figure, title + _note(dense, results), file)


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """Return the trials that no other trial dominates in mean and worst language, the best mean first.

    A trial dominates another if it is as good in both and better in one. Trials with the same two values are all
    on the front; a trial without a finite likelihood never is.
    """
    front: list[Result] = []
    for result in sorted(filter(has_likelihood, results), key=_mean_and_worst):
        mean_worst = _mean_and_worst(result)
        last = _mean_and_worst(front[-1]) if front else (math.inf, math.inf)
        if mean_worst[1] < last[1] or mean_worst == last:
            front.append(result)
    return front


def has_likelihood(result: Result) -> bool:
    """Return whether the mean and the worst language have a finite likelihood."""
    return all(map(math.isfinite, _mean_and_worst(result)))


def _mean_and_worst(result: Result) -> tuple[float, float]:
    return result.metrics["bits_per_byte.mean"], result.metrics["bits_per_byte.worst"]


def _score(result: Result) -> str:
    assert result.variant is not None
    return result.variant.score.name


def _position(result: Result, dense: Result) -> tuple[float, float]:
    """Return where the point of a trial is drawn: at the end of an axis if its value is beyond."""
    (x, y), ends = _mean_and_worst(result), (AXIS_LIMIT * value for value in _mean_and_worst(dense))
    return min(x, next(ends)), min(y, next(ends))


def _note(dense: Result, results: Sequence[Result]) -> str:
    """Return a line for the title that counts the trials which the picture does not show in full."""
    finite = [result for result in results if has_likelihood(result)]
    beyond = sum(_position(result, dense) != _mean_and_worst(result) for result in finite)
    counts = {"beyond the axes (hollow)": beyond, "without a finite likelihood": len(results) - len(finite)}
    line = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"\n{line}" if line else ""


def _legend_entry(label: str, color: Color, marker: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, linestyle="none", label=label)


def _draw_group(
    panel: Axes,
    dense: Result,
    results: Sequence[Result],
    color: Color,
    markers: Mapping[str, str],
    changes: Mapping[str, Interval],
) -> None:
    """Draw the trials of one sparsity, and their front."""
    front = [_position(result, dense) for result in pareto_front(results)]
    panel.plot(*zip(*front, strict=True), color=color, drawstyle="steps-post", linewidth=1)
    for result in results:
        x, y = _position(result, dense)
        within = (x, y) == _mean_and_worst(result)
        marker, face = markers[_score(result)], color if within else "none"
        panel.plot(x, y, marker, color=color, markerfacecolor=face, markersize=6)
        if within and result.key in changes:
            low, high = (dense.metrics["bits_per_byte.mean"] * (1 + end) for end in changes[result.key][1:])
            panel.hlines(y, low, high, color=color, alpha=0.3, linewidth=2)


def _trials_to_label(groups: Iterable[Sequence[Result]]) -> list[Result]:
    """Return the trials to label: each front's best mean, then each front's best worst language, then others."""
    fronts = [pareto_front(group) for group in groups]
    orders = [[front[0], *front[1:][-1:], *front[1:-1]] for front in fronts]
    in_turn = (result for turn in zip_longest(*orders) for result in turn if result is not None)
    return list(in_turn)[:MAX_LABELS]


def _label(panel: Axes, labelled: Sequence[tuple[str, float, tuple[float, float]]]) -> None:
    """Write labels of points (name, sparsity, position) in a column beside the panel, with lines to the points."""
    low, high = panel.get_ylim()
    ordered = sorted(labelled, key=lambda item: item[2][1], reverse=True)
    heights = spread([(position[1] - low) / (high - low) for *_, position in ordered], LABEL_GAP)
    for (name, sparsity, position), height in zip(ordered, heights, strict=True):
        panel.annotate(
            f"{sparsity:.4g} {name}",
            position,
            (1.02, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7},
            zorder=1,  # lines under points
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return heights from the top down, near the wanted ones (highest first), at least `gap` apart, in [0, 1].

    They must fit: (len(wanted) - 1) * gap <= 1.
    """
    heights: list[float] = []
    for height in wanted:
        heights.append(min(height, heights[-1] - gap if heights else 1.0))
    return [max(height, (len(heights) - 1 - index) * gap) for index, height in enumerate(heights)]
