"""A picture of a sweep: what each calibration does to each language, as a heat map.

N: trials. C: columns, the mean and then the languages.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mlprune.analysis.figures import by_sparsity, panel_grid, short_names, write_png
from mlprune.storage.results import Result

CELL = (0.52, 0.27)  # width and height in inches
MAX_WIDTH = 11.0  # inches of panels side by side: MLflow shrinks what is wider
MIN_WIDTH = 6.0  # inches that a title needs
MAX_ROWS = 40  # rows of a panel; the best trials are drawn
MIN_SPAN = 2.0  # the colours span at least this many percent, so that similar values look similar
# Colours end at this multiple of the median's distance from the least, so that one huge value hides nothing.
OUTLIER = 5.0


def draw_heat_map(results: Sequence[Result], languages: Sequence[str], title: str, file: Path) -> None:
    """Draw the change of each language by each calibration, a panel per sparsity, as PNG.

    Only sparsities of several calibrations are drawn. A row is a calibration (and score, and what else differs),
    the best mean first. Numbers are percents.
    """
    groups = several_calibrations(results)
    names = short_names(results)
    rows = min(MAX_ROWS, max(map(len, groups.values())))
    width = CELL[0] * (len(languages) + 1) + 0.075 * max(map(len, names.values())) + 1.3
    columns = max(1, min(len(groups), int(MAX_WIDTH // width)))
    width = max(width, MIN_WIDTH / columns)
    figure, panels = panel_grid(len(groups), columns, (width, CELL[1] * rows + 0.8), 0.8)
    for panel, (sparsity, group) in zip(panels, groups.items(), strict=True):
        keys, change_NC = losses(group, languages)
        row_names = [names[key] for key in keys[:MAX_ROWS]]
        _draw_changes(panel, row_names, ["mean", *languages], change_NC[:MAX_ROWS])
        best = f", the best {MAX_ROWS} of {len(keys)}" if len(keys) > MAX_ROWS else ""
        panel.set_title(f"sparsity {sparsity:.4g}{best}", fontsize="medium")
    write_png(figure, f"{title}\nchange of bits per byte against the dense model, % (lower is better)", file)


def several_calibrations(results: Sequence[Result]) -> dict[float, list[Result]]:
    """Return the trials of each sparsity that has more than one calibration, the lowest sparsity first."""
    return {
        sparsity: group
        for sparsity, group in by_sparsity(results).items()
        if len({r.variant.sides for r in group if r.variant and r.variant.sides}) > 1
    }


def losses(results: Sequence[Result], languages: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """Return the trials' keys, the best mean first, and their losses in percent, [N, C]."""
    columns = [f"loss.{column}" for column in ("mean", *languages)]
    rows = [(result.key, [100 * result.metrics[column] for column in columns]) for result in results]
    rows.sort(key=lambda row: (math.isnan(row[1][0]), row[1][0]))
    return [key for key, _ in rows], np.array([values for _, values in rows])


def colour_limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the values of the first and the last colour.

    These are the least finite value and the largest, or less where the largest is an outlier.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, MIN_SPAN
    low, median, high = (float(value) for value in np.quantile(finite, (0, 0.5, 1)))
    return low, max(min(high, low + OUTLIER * (median - low)) if median > low else high, low + MIN_SPAN)


def _draw_changes(
    panel: Axes, rows: Sequence[str], columns: Sequence[str], change_NC: NDArray[np.float64]
) -> None:
    low, high = colour_limits(change_NC)
    colors = mpl.colormaps["YlOrRd"].with_extremes(bad="0.85")
    displayed = np.ma.masked_invalid(change_NC)
    image = panel.imshow(displayed, cmap=colors, vmin=low, vmax=high, aspect=CELL[1] / CELL[0])
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    panel.set_xticks(range(len(columns)), columns, fontsize=8)
    panel.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    panel.axvline(0.5, color="white", linewidth=4)  # sets the mean apart from the languages
    extend = "max" if displayed.max() > high else "neither"
    panel.figure.colorbar(image, ax=panel, extend=extend, shrink=0.9, pad=0.02)
    for (row, column), value in np.ndenumerate(change_NC):
        dark = math.isfinite(value) and value - low > 0.65 * (high - low)
        color = "white" if dark else "black"
        panel.text(column, row, percent_text(value), ha="center", va="center", fontsize=7, color=color)


def percent_text(value: float) -> str:
    """Return a change in at most five characters: `+3.1`, `+148`, `+2e6`, `nan`."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 9.95:
        return f"{value:+.1f}"
    return f"{value:+.0f}" if abs(value) < 9999.5 else f"{value:+.0e}".replace("e+0", "e").replace("e+", "e")
