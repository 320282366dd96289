"""Pictures of a sweep: which calibration serves which language, and what the mean costs the worst language.

N: trials. C: columns, the mean and then the languages.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from mlprune.analysis.pictures import BEYOND, MARKERS, draw_sweep, grid, short_names, write
from mlprune.evaluation.significance import Interval
from mlprune.storage.results import Result

CELL = (0.52, 0.27)  # inches
WIDEST = 11.0  # inches of panels side by side: MLflow shrinks what is wider
NARROWEST = 6.0  # inches that a title needs
ROWS = 40  # of a heat map's panel at most, the best ones
SPAN = 2.0  # percent that colours span at least, so that what is alike looks alike
FAR = 5.0  # times the median's distance from the least: colours end there, so that one huge value hides nothing
LABELS = 8
GAP = 0.06  # between labels, of the axis


def pictures_of(
    dense: Result,
    results: Sequence[Result],
    languages: Sequence[str],
    title: str,
    folder: Path,
    stem: str,
    changes: Mapping[str, Interval] | None = None,
) -> list[Path]:
    """Draw all that say something of the sweep, the lines first; the PNG files.

    `changes`: result key -> change of the mean against the dense model's, 0.2 for 20% more.
    """
    lines, heat, trade = (folder / f"{stem}{kind}.png" for kind in ("", "-calibrations", "-languages"))
    draw_sweep(dense, results, languages, title, lines)
    drawn = [lines]
    if len(languages) > 1 and _of_several_calibrations(results):
        draw_heat_map(dense, results, languages, title, heat)
        drawn.append(heat)
    if len(languages) > 1 and sum(map(_has_likelihood, results)) > 1:
        draw_trade(dense, results, title, trade, changes)
        drawn.append(trade)
    return drawn


def draw_heat_map(
    dense: Result, results: Sequence[Result], languages: Sequence[str], title: str, file: Path
) -> None:
    """What each calibration does to each language, a panel a sparsity of several calibrations; PNG.

    A row is a calibration (and score, and what else differs), the best mean first. Figures are percents.
    """
    panels_of = _of_several_calibrations(results)
    names = short_names(results)
    count = min(ROWS, max(map(len, panels_of.values())))
    width = CELL[0] * (len(languages) + 1) + 0.075 * max(map(len, names.values())) + 1.3
    columns = max(1, min(len(panels_of), int(WIDEST // width)))
    width = max(width, NARROWEST / columns)
    figure, panels = grid(len(panels_of), columns, (width, CELL[1] * count + 0.8), 0.8)
    for panel, (sparsity, some) in zip(panels, panels_of.items(), strict=True):
        order, change_NC = changes_of(dense, some, languages)
        _draw_changes(panel, [names[key] for key in order[:ROWS]], ["mean", *languages], change_NC[:ROWS])
        best = f", the best {ROWS} of {len(order)}" if len(order) > ROWS else ""
        panel.set_title(f"sparsity {sparsity:.4g}{best}", fontsize="medium")
    write(figure, f"{title}\nchange of bits per byte against the dense model, % (lower is better)", file)


def changes_of(
    dense: Result, results: Sequence[Result], languages: Sequence[str]
) -> tuple[list[str], NDArray[np.float64]]:
    """Keys of results, the best mean first; and their change against the dense model in percent, [N, C]."""

    def change(result: Result, of: str) -> float:
        return 100 * (result.metrics[f"bits_per_byte.{of}"] / dense.metrics[f"bits_per_byte.{of}"] - 1)

    rows = [(result.key, [change(result, of) for of in ("mean", *languages)]) for result in results]
    rows.sort(key=lambda row: (math.isnan(row[1][0]), row[1][0]))
    return [key for key, _ in rows], np.array([values for _, values in rows])


def colour_limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """Where colours begin and end: at the least finite value, and at the largest unless that is far from all."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, SPAN
    low, median, high = (float(value) for value in np.quantile(finite, (0, 0.5, 1)))
    return low, max(min(high, low + FAR * (median - low)) if median > low else high, low + SPAN)


def _draw_changes(
    panel: Axes, rows: Sequence[str], columns: Sequence[str], change_NC: NDArray[np.float64]
) -> None:
    low, high = colour_limits(change_NC)
    colors = mpl.colormaps["YlOrRd"].with_extremes(bad="0.85")
    shown = np.ma.masked_invalid(change_NC)
    image = panel.imshow(shown, cmap=colors, vmin=low, vmax=high, aspect=CELL[1] / CELL[0])
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    panel.set_xticks(range(len(columns)), columns, fontsize=8)
    panel.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    panel.axvline(0.5, color="white", linewidth=4)
    extend = "max" if shown.max() > high else "neither"
    panel.figure.colorbar(image, ax=panel, extend=extend, shrink=0.9, pad=0.02)
    for (row, column), value in np.ndenumerate(change_NC):
        dark = math.isfinite(value) and value - low > 0.65 * (high - low)
        color = "white" if dark else "black"
        panel.text(column, row, percent_text(value), ha="center", va="center", fontsize=7, color=color)


def percent_text(value: float) -> str:
    """A change in at most five characters: `+3.1`, `+148`, `+2e6`, `nan`."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 9.95:
        return f"{value:+.1f}"
    return f"{value:+.0f}" if abs(value) < 9999.5 else f"{value:+.0e}".replace("e+0", "e").replace("e+", "e")


def _of_several_calibrations(results: Sequence[Result]) -> dict[float, list[Result]]:
    """The results of each sparsity that was reached by more than one calibration, the lowest first."""
    found = _by_sparsity(results)
    return {
        sparsity: some
        for sparsity, some in found.items()
        if len({r.variant.sides for r in some if r.variant and r.variant.sides}) > 1
    }


def _by_sparsity(results: Sequence[Result]) -> dict[float, list[Result]]:
    found: dict[float, list[Result]] = {}
    for result in results:
        found.setdefault(_sparsity(result), []).append(result)
    return dict(sorted(found.items()))


def _sparsity(result: Result) -> float:
    assert result.variant is not None
    return result.variant.sparsity


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """Those with no other as good in mean and worst language and better in one of them; the best mean first.

    Of several with the same two values each is on it; one without a finite likelihood never is.
    """
    front: list[Result] = []
    for result in sorted(filter(_has_likelihood, results), key=_mean_and_worst):
        mean_worst = _mean_and_worst(result)
        last = _mean_and_worst(front[-1]) if front else (math.inf, math.inf)
        if mean_worst[1] < last[1] or mean_worst == last:
            front.append(result)
    return front


def _mean_and_worst(result: Result) -> tuple[float, float]:
    return result.metrics["bits_per_byte.mean"], result.metrics["bits_per_byte.worst"]


def _has_likelihood(result: Result) -> bool:
    return all(map(math.isfinite, _mean_and_worst(result)))


def draw_trade(
    dense: Result,
    results: Sequence[Result],
    title: str,
    file: Path,
    changes: Mapping[str, Interval] | None = None,
) -> None:
    """The worst language against the mean, a point a trial, with the Pareto front of each sparsity; PNG.

    Bits per byte compare within a sparsity, so a front over all would be the lowest sparsity's. Axes end at
    three times the dense model's values; what is beyond is drawn there, hollow. With `changes` (see
    `pictures_of`) the mean has its interval.
    """
    figure, (panel,) = grid(1, 1, (11.0, 6.0), 1.0)
    groups = _by_sparsity([result for result in results if _has_likelihood(result)])
    colors = dict(zip(groups, mpl.colormaps["viridis"](np.linspace(0, 0.85, len(groups))), strict=True))
    scores = dict.fromkeys(_score(result) for some in groups.values() for result in some)
    markers = {score: MARKERS[number % len(MARKERS)] for number, score in enumerate(scores)}
    for sparsity, some in groups.items():
        _draw_group(panel, dense, some, colors[sparsity], markers, changes or {})
    panel.plot(*_mean_and_worst(dense), "*", color="black", markersize=11)
    panel.set(xlabel="mean, bits per byte (lower is better)", ylabel="worst language, bits per byte")
    panel.grid(alpha=0.3)
    names = short_names(results)
    _label(panel, [(names[r.key], _sparsity(r), _place(r, dense)) for r in _most_telling(groups.values())])
    looks = [
        *(_look(f"sparsity {sparsity:.4g}", color, "s") for sparsity, color in colors.items()),
        *(_look(score, "0.4", marker) for score, marker in markers.items()),
        _look("dense model", "black", "*"),
    ]
    figure.legend(handles=looks, loc="outside lower center", ncols=min(6, len(looks)), frameon=False)
    write(figure, title + _left_out(dense, results), file)


def _left_out(dense: Result, results: Sequence[Result]) -> str:
    """A line for the title, where the picture does not show everything."""
    finite = [result for result in results if _has_likelihood(result)]
    beyond = sum(_place(result, dense) != _mean_and_worst(result) for result in finite)
    told = {"beyond the axes (hollow)": beyond, "without a finite likelihood": len(results) - len(finite)}
    line = ", ".join(f"{count} {what}" for what, count in told.items() if count)
    return f"\n{line}" if line else ""


def _look(label: str, color: Any, marker: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, linestyle="none", label=label)


def _draw_group(
    panel: Axes,
    dense: Result,
    results: Sequence[Result],
    color: Any,
    markers: Mapping[str, str],
    changes: Mapping[str, Interval],
) -> None:
    """The trials of one sparsity, and their front."""
    front = [_place(result, dense) for result in pareto_front(results)]
    panel.plot(*zip(*front, strict=True), color=color, drawstyle="steps-post", linewidth=1)
    for result in results:
        x, y = _place(result, dense)
        within = (x, y) == _mean_and_worst(result)
        marker, face = markers[_score(result)], color if within else "none"
        panel.plot(x, y, marker, color=color, markerfacecolor=face, markersize=6)
        if within and result.key in changes:
            low, high = (dense.metrics["bits_per_byte.mean"] * (1 + end) for end in changes[result.key][1:])
            panel.hlines(y, low, high, color=color, alpha=0.3, linewidth=2)


def _score(result: Result) -> str:
    assert result.variant is not None
    return result.variant.score.name


def _place(result: Result, dense: Result) -> tuple[float, float]:
    (x, y), ends = _mean_and_worst(result), (BEYOND * value for value in _mean_and_worst(dense))
    return min(x, next(ends)), min(y, next(ends))


def _most_telling(groups: Iterable[Sequence[Result]]) -> list[Result]:
    """Whom to label: of each sparsity's front the best mean, then the best worst language, then the others."""
    fronts = [pareto_front(some) for some in groups]
    turns = [[front[0], *front[1:][-1:], *front[1:-1]] for front in fronts]
    return [result for turn in zip_longest(*turns) for result in turn if result is not None][:LABELS]


def _label(panel: Axes, labelled: Sequence[tuple[str, float, tuple[float, float]]]) -> None:
    """Name, sparsity and place of points: their labels in a column beside the panel, with lines to them."""
    low, high = panel.get_ylim()
    order = sorted(labelled, key=lambda item: item[2][1], reverse=True)
    heights = spread([(place[1] - low) / (high - low) for *_, place in order], GAP)
    for (name, sparsity, place), height in zip(order, heights, strict=True):
        panel.annotate(
            f"{sparsity:.4g} {name}",
            place,
            (1.02, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7},
            zorder=1,  # lines under points
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights from the top down, each near to the one wanted (highest first), `gap` apart and in [0, 1].

    There must be room: (len(wanted) - 1) * gap <= 1.
    """
    heights: list[float] = []
    for height in wanted:
        heights.append(min(height, heights[-1] - gap if heights else 1.0))
    return [max(height, (len(heights) - 1 - place) * gap) for place, height in enumerate(heights)]
