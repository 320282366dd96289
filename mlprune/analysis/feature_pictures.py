"""Pictures of `mlprune analyze`, each as the bytes of a PNG. The numbers come from `features`.

C: conditions, which are calibrations. H: hidden width, its channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from mlprune.analysis.features import (
    TOP_CHANNELS,
    Compared,
    SharedCounts,
    by_chance,
    kinds_of,
    shares,
    top_channels,
    total,
)
from mlprune.analysis.figures import COLUMNS, MARKERS, panel_grid, to_png
from mlprune.spec.languages import language_name

COLORS = ("#4477aa", "#ee7733", "#bbbbbb")  # distinguishable for readers who do not see red and green
LINES = ("-", "--")
UNIT = "weights dropped by both / by either"
STEP = 0.05  # colours span at least this, so that similar values look similar
MAX_ANNOTATED = 16  # with more conditions the cells have no numbers
LOG_RATIO = 20.0  # a panel whose largest bar is this many times its smallest has a logarithmic axis


def draw_top(compared: Compared, layer: int, model: str) -> bytes:
    """Draw the paper's Figure 2: the largest channels of `layer`, a panel per language with its conditions."""
    columns = min(2, len(compared))
    figure, panels = panel_grid(len(compared), columns, (5.2, 3.0), 1.0)
    for panel, (language, magnitudes) in zip(panels, compared.items(), strict=True):
        bars = _draw_bars(panel, list(magnitudes.values()))
        panel.set(title=language_name(language), xlabel="channel")
    labels = list(next(iter(compared.values())))
    figure.legend(bars, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for panel in panels[::columns]:
        panel.set_ylabel("mean L2 norm")
    where = f"layer {layer}" if layer else "the embedding"
    title = f"{model}\n{TOP_CHANNELS} largest channels of {where}: L2 norm over a prompt's tokens"
    return to_png(figure, title)


def _draw_bars(panel: Axes, magnitudes: Sequence[Tensor]) -> list[Any]:
    """Draw and return, for a legend, the bars of each condition."""
    channels = top_channels(magnitudes)
    heights = [magnitude_H[channels].numpy() for magnitude_H in magnitudes]
    position, width = np.arange(len(channels)), 0.8 / len(heights)
    shifts = [(number - (len(heights) - 1) / 2) * width for number in range(len(heights))]
    bars = [
        panel.bar(position + shift, values, width, color=color)
        for values, shift, color in zip(heights, shifts, COLORS, strict=True)
    ]
    if np.max(heights) > LOG_RATIO * np.min(heights) > 0:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xticks(position, [str(channel) for channel in channels], rotation=90, fontsize=8)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    return bars


def draw_overlap(conditions: Sequence[str], bottom_CC: Tensor, top_CC: Tensor, ratio: float, model: str) -> bytes:
    """Draw the paper's Figures 1 and 3: the share of each row's top channels in each column's bottom, and top."""
    width, height = _size(conditions)
    figure, panels = panel_grid(2, 2, (width, height), 0.4)
    for panel, overlap_CC, end in zip(panels, (bottom_CC, top_CC), ("bottom", "top"), strict=True):
        _draw_matrix(figure, panel, conditions, overlap_CC, f"share of the row's top {ratio:.4g}")
        panel.set(xlabel=f"{end} {ratio:.4g} of", ylabel=f"top {ratio:.4g} of")
    return to_png(figure, f"{model}\nchannels by magnitude, mean over layers (by chance {ratio:.4g})")


def draw_mask_pairs(conditions: Sequence[str], shared: SharedCounts, sparsity: float, model: str) -> bytes:
    """Draw the share of the mask that each two conditions have in common, over all matrices."""
    figure, (panel,) = panel_grid(1, 1, _size(conditions), 0.0)
    _draw_matrix(figure, panel, conditions, shares(total(shared)), UNIT)
    return to_png(figure, f"{model}\n{_about_masks(sparsity)}")


def draw_masks(
    places: Mapping[str, Sequence[int]], forms: Sequence[str], shared: SharedCounts, sparsity: float, model: str
) -> bytes:
    """Draw the share of the mask that mono:x has in common with each translation, a panel per kind of matrix.

    The x axis is the layer, from 1. `places`: language -> indices of its conditions, mono:x first. `forms`: their
    names with x for the language.
    """
    kinds = kinds_of(shared)
    columns = min(COLUMNS, len(kinds))
    figure, panels = panel_grid(len(kinds), columns, (4.2, 2.8), 1.0, sharey=True)
    for panel, kind in zip(panels, kinds, strict=True):
        by_layer = {n: shares(layer[kind]) for n, layer in enumerate(shared, start=1) if kind in layer}
        for number, (language, (mono, *translations)) in enumerate(places.items()):
            look: dict[str, Any] = {"color": f"C{number % 10}", "marker": MARKERS[number % 8], "markersize": 4}
            for translation, line in zip(translations, LINES, strict=True):
                values = [float(share_CC[mono, translation]) for share_CC in by_layer.values()]
                label = language_name(language) if line == LINES[0] else None
                panel.plot(list(by_layer), values, linestyle=line, label=label, **look)
        panel.set(title=kind, xlabel="layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    for panel in panels[::columns]:
        panel.set_ylabel("both / either")
    named = "{} and {} (solid), {} (dashed)".format(*forms)
    title = f"{model}: {UNIT}\nof {named}, {_about_masks(sparsity)}"
    return to_png(figure, title)


def _about_masks(sparsity: float) -> str:
    return f"wanda {sparsity:.4g} (by chance {by_chance(sparsity):.2f})"


def _draw_matrix(figure: Figure, panel: Axes, conditions: Sequence[str], value_CC: Tensor, unit: str) -> None:
    """Draw a heat map. The diagonal carries no information and would dominate the scale, so it is grey."""
    count = len(conditions)
    values = np.ma.array(value_CC.numpy(), mask=np.eye(count, dtype=bool))
    low = math.floor(values.min() / STEP) * STEP
    high = max(math.ceil(values.max() / STEP) * STEP, low + STEP)
    colors = mpl.colormaps["viridis"].with_extremes(bad="0.85")
    image = panel.imshow(values, cmap=colors, vmin=low, vmax=high)
    panel.set_xticks(range(count), conditions, rotation=90, fontsize=8)
    panel.set_yticks(range(count), conditions, fontsize=8)
    figure.colorbar(image, ax=panel, label=unit)
    if count > MAX_ANNOTATED:
        return
    for row, column in zip(*np.nonzero(~values.mask), strict=True):
        value = float(values[row, column])
        color = "white" if (value - low) < 0.6 * (high - low) else "black"
        panel.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)


def _size(conditions: Sequence[str]) -> tuple[float, float]:
    """Return width and height in inches of a heat map with its labels and its colour bar."""
    cells, labels = max(3.0, 0.38 * len(conditions)), 0.075 * max(map(len, conditions)) + 0.3
    return cells + labels + 1.1, cells + labels + 0.5
