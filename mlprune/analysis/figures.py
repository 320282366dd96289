"""What all pictures share: panels, titles, PNG output, names of trials. What they show is in the other modules."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from mlprune.spec.variants import Pattern
from mlprune.storage.files import write_whole
from mlprune.storage.results import Result

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Color = NDArray[np.float64] | tuple[float, float, float] | str

COLUMNS = 3  # panels side by side
MARKERS = "osD^vPX*"
AXIS_LIMIT = 3.0  # axes end at this multiple of the dense model's value


def panel_grid(
    count: int, columns: int, panel: tuple[float, float], extra_height: float, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels, each of that size in inches; `extra_height` is for title and legend."""
    rows = -(-count // columns)
    size = (panel[0] * columns, panel[1] * rows + extra_height)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=sharey, layout="constrained")
    for empty in panels.flat[count:]:
        empty.set_visible(False)
    return figure, list(panels.flat[:count])


def to_png(figure: Figure, title: str) -> bytes:
    """Add the title, return the figure as PNG, and close it."""
    figure.suptitle(title, fontsize="medium", parse_math=False)  # a model may be called a$b$
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    plt.close(figure)
    return png.getvalue()


def write_png(figure: Figure, title: str, file: Path) -> None:
    """Add the title, write the figure as PNG, and close it."""
    write_whole(file, to_png(figure, title))


def legend_entry(label: str, color: Color, marker: str) -> Line2D:
    """Return an entry of a legend: a marker without a line."""
    return Line2D([], [], color=color, marker=marker, linestyle="none", label=label)


def method_words(result: Result) -> tuple[str, ...]:
    """Return how a trial was pruned, without the sparsity. Options with their most common value are empty."""
    variant = result.variant
    assert variant is not None
    pattern = "" if variant.pattern == Pattern() else str(variant.pattern)
    allocation = "" if variant.allocation == "uniform" else variant.allocation
    repair = "" if variant.repair == "none" else "repaired"
    propagation = "" if variant.propagation == "dense" else variant.propagation
    return variant.score.name, variant.calibration_label, pattern, allocation, repair, propagation


def short_names(results: Sequence[Result]) -> dict[str, str]:
    """Map result keys to how the trial was pruned, without the sparsity and without what all trials share."""
    words = {result.key: method_words(result) for result in results}
    differs = [len(set(values)) > 1 for values in zip(*words.values(), strict=True)]
    return {
        key: " ".join(word for word, kept in zip(method, differs, strict=True) if word and kept) or method[0]
        for key, method in words.items()
    }


def by_sparsity(results: Sequence[Result]) -> dict[float, list[Result]]:
    """Group the trials by their sparsity, the lowest first."""
    groups: dict[float, list[Result]] = {}
    for result in results:
        groups.setdefault(sparsity_of(result), []).append(result)
    return dict(sorted(groups.items()))


def sparsity_of(result: Result) -> float:
    """Return the sparsity that a trial aimed at."""
    assert result.variant is not None
    return result.variant.sparsity
