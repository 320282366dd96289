"""A picture of a sweep: the largest loss of a language against the mean loss, with Pareto fronts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from mlprune.analysis.figures import (
    MARKERS,
    Color,
    by_sparsity,
    legend_entry,
    panel_grid,
    short_names,
    sparsity_of,
    write_png,
)
from mlprune.evaluation.estimates import Estimate
from mlprune.storage.results import Result

MAX_LABELS = 8
MOST_LOSS = 200.0  # percent; three times the bits per byte of the dense model
LABEL_GAP = 0.06  # between labels, as a share of the axis


def draw_trade_off(
    results: Sequence[Result],
    title: str,
    file: Path,
    losses: Mapping[str, Estimate] | None = None,
) -> None:
    """Draw the largest loss of a language against the mean loss, with the Pareto front of each sparsity, as PNG.

    Losses are compared within a sparsity: a front over all sparsities would be that of the lowest. Axes end at a
    loss of 200%; points beyond are drawn there, hollow. `losses` (see `sweep_pictures.draw_pictures`) adds the
    interval of the mean.
    """
    figure, (panel,) = panel_grid(1, 1, (11.0, 6.0), 1.0)
    groups = by_sparsity([result for result in results if has_likelihood(result)])
    colors = dict(zip(groups, mpl.colormaps["viridis"](np.linspace(0, 0.85, len(groups))), strict=True))
    scores = dict.fromkeys(_score(result) for group in groups.values() for result in group)
    markers = {score: MARKERS[number % len(MARKERS)] for number, score in enumerate(scores)}
    for sparsity, group in groups.items():
        _draw_group(panel, group, colors[sparsity], markers, losses or {})
    panel.set(xlabel="mean loss over languages, % (lower is better)", ylabel="largest loss of a language, %")
    panel.grid(alpha=0.3)
    names = short_names(results)
    labelled = _trials_to_label(groups.values())
    _label(panel, [(names[trial.key], sparsity_of(trial), _position(trial)) for trial in labelled])
    entries = [
        *(legend_entry(f"sparsity {sparsity:.4g}", color, "s") for sparsity, color in colors.items()),
        *(legend_entry(score, "0.4", marker) for score, marker in markers.items()),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(6, len(entries)), frameon=False)
    write_png(figure, title + _note(results), file)


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
    return 100 * result.metrics["loss.mean"], 100 * result.metrics["loss.worst"]


def _score(result: Result) -> str:
    assert result.variant is not None
    return result.variant.score.name


def _position(result: Result) -> tuple[float, float]:
    """Return where the point of a trial is drawn: at the end of an axis if its value is beyond."""
    x, y = _mean_and_worst(result)
    return min(x, MOST_LOSS), min(y, MOST_LOSS)


def _note(results: Sequence[Result]) -> str:
    """Return a line for the title that counts the trials which the picture does not show in full."""
    finite = [result for result in results if has_likelihood(result)]
    beyond = sum(_position(result) != _mean_and_worst(result) for result in finite)
    counts = {"beyond the axes (hollow)": beyond, "without a finite likelihood": len(results) - len(finite)}
    line = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"\n{line}" if line else ""


def _draw_group(
    panel: Axes,
    results: Sequence[Result],
    color: Color,
    markers: Mapping[str, str],
    losses: Mapping[str, Estimate],
) -> None:
    """Draw the trials of one sparsity, and their front."""
    front = [_position(result) for result in pareto_front(results)]
    panel.plot(*zip(*front, strict=True), color=color, drawstyle="steps-post", linewidth=1)
    for result in results:
        x, y = _position(result)
        within = (x, y) == _mean_and_worst(result)
        marker, face = markers[_score(result)], color if within else "none"
        panel.plot(x, y, marker, color=color, markerfacecolor=face, markersize=6)
        if within and result.key in losses:
            panel.hlines(
                y, 100 * losses[result.key].low, 100 * losses[result.key].high, color=color, alpha=0.3, linewidth=2
            )


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
