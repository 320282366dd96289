"""A picture of a sweep: the loss of each language by each variant, as a dot plot with a panel per sparsity."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from mlprune.analysis.figures import Color, by_sparsity, legend_entry, panel_grid, short_names, write_png
from mlprune.storage.results import Result

MAX_ROWS = 24  # rows of a panel; the best variants are drawn
ROW_HEIGHT, CHARACTER, DOTS = 0.24, 0.075, 4.2  # inches
AXIS_END, LEAST_END = 3, 10.0  # times the median of the means; percent
MAX_NAME = 48  # characters of a row's name


def draw_dot_plot(results: Sequence[Result], languages: Sequence[str], title: str, file: Path) -> None:
    """Draw the loss of each language, and their mean, as PNG: a row per variant, the best mean first.

    An axis ends at three times the median of the means (at least 10%), so that a destroyed model does not hide the
    others; values beyond are drawn there, hollow.
    """
    groups = {sparsity: _best_first(group) for sparsity, group in by_sparsity(results).items()}
    names = {key: _shortened(name) for key, name in short_names(results).items()}
    rows = max(map(len, groups.values()))
    width = DOTS + CHARACTER * max(map(len, names.values()))
    figure, panels = panel_grid(len(groups), 1 if width > 5.5 else 2, (width, ROW_HEIGHT * rows + 0.7), 0.9)
    colors = language_colors(languages)
    for panel, (sparsity, group) in zip(panels, groups.items(), strict=True):
        _draw_rows(panel, group, colors, names)
        panel.set_title(f"sparsity {sparsity:.4g}", fontsize="medium")
    entries = [legend_entry(code, color, "o") for code, color in colors.items()]
    entries.append(legend_entry("mean", "black", "|"))
    figure.legend(handles=entries, loc="outside lower center", ncols=min(8, len(entries)), frameon=False)
    write_png(figure, f"{title}\nloss: change of bits per byte against the dense model, % (lower is better)", file)


def language_colors(languages: Sequence[str]) -> dict[str, Color]:
    """Return a colour for each language: distinct ones of ten, or shades of a colour map for more."""
    many = mpl.colormaps["turbo"](np.linspace(0, 1, len(languages)))
    shades = many if len(languages) > 10 else mpl.color_sequences["tab10"][: len(languages)]
    return dict(zip(languages, shades, strict=True))


def _best_first(results: Sequence[Result]) -> list[Result]:
    def mean(result: Result) -> tuple[bool, float]:
        value = result.metrics["loss.mean"]
        return math.isnan(value), value

    return sorted(results, key=mean)[:MAX_ROWS]


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


def _draw_rows(
    panel: Axes, results: Sequence[Result], colors: Mapping[str, Color], names: Mapping[str, str]
) -> None:
    means = [100 * result.metrics["loss.mean"] for result in results]
    finite = sorted(value for value in means if math.isfinite(value))
    end = max(AXIS_END * finite[len(finite) // 2], LEAST_END) if finite else LEAST_END
    for row, (result, mean) in enumerate(zip(results, means, strict=True)):
        losses = {code: 100 * result.metrics[f"loss.{code}"] for code in colors}
        drawn = [min(value, end) for value in losses.values() if math.isfinite(value)]
        if drawn:
            panel.hlines(row, min(drawn), max(drawn), color="0.85", linewidth=2, zorder=1)
        for code, value in losses.items():
            if math.isfinite(value):
                face = colors[code] if value <= end else "none"
                panel.plot(min(value, end), row, "o", color=colors[code], markerfacecolor=face, markersize=5)
        if math.isfinite(mean):
            panel.plot(min(mean, end), row, "|", color="black", markersize=11, markeredgewidth=1.6)
    panel.set_yticks(range(len(results)), [names[result.key] for result in results], fontsize=8)
    panel.set_ylim(len(results) - 0.4, -0.6)
    panel.grid(axis="x", alpha=0.3)
