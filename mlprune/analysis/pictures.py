"""Pictures of a sweep."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from mlprune.languages import name_of
from mlprune.store import Result

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLUMNS = 3


def draw_sweep(dense: Result, results: Sequence[Result], languages: Sequence[str], title: str, file: Path) -> None:
    """Bits per byte against sparsity, a panel a language, a line a way of pruning; PNG.

    A point far above the rest would flatten what matters: each panel's axis ends at three times the dense
    model's value, and points beyond it are drawn as arrows at the top.
    """
    columns = min(COLUMNS, len(languages))
    rows = -(-len(languages) // columns)
    size = (4.2 * columns, 3.4 * rows + 1.4)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, language in zip(panels.flat, languages, strict=False):
        _draw_language(panel, dense, results, language)
    for panel in panels.flat[len(languages) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("bits per byte (lower is better)")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _draw_language(panel: Axes, dense: Result, results: Sequence[Result], language: str) -> None:
    metric = f"bits_per_byte.{language}"
    base = dense.metrics[metric]
    values = [result.metrics[metric] for result in results]
    top = min(3 * base, 1.05 * max([base * 1.3, *(value for value in values if math.isfinite(value))]))
    panel.axhline(base, color="black", linestyle="--", linewidth=1, label="dense model")
    for number, (label, line) in enumerate(_lines(results).items()):
        color, marker = f"C{number % 10}", "osD^vPX*"[number % 8]
        points = sorted((r.metrics["sparsity.actual"], r.metrics[metric]) for r in line)
        shown = [(x, min(y, top)) for x, y in points]
        panel.plot(*zip(*shown, strict=True), color=color, marker=marker, markersize=5, label=label)
        beyond = [x for x, y in points if y > top]
        panel.plot(beyond, [top] * len(beyond), color=color, marker=r"$\uparrow$", markersize=12, linestyle="none")
    panel.set(title=name_of(language), xlabel="sparsity", ylim=(base * 0.95, top * 1.03))
    panel.grid(alpha=0.3)


def _lines(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of one way of pruning at several sparsities, together."""
    lines: dict[str, list[Result]] = {}
    for result in results:
        assert result.variant is not None
        variant = result.variant
        parts = [variant.score, variant.calibration or ""]
        parts += [variant.pattern] if variant.pattern != "unstructured" else []
        parts += variant.special
        lines.setdefault(" ".join(filter(None, parts)), []).append(result)
    return lines
