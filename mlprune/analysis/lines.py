"""A picture of a sweep: bits per byte against sparsity, a panel per language, a line per way of pruning."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from mlprune.analysis.figures import AXIS_LIMIT, COLUMNS, MARKERS, method_words, panel_grid, write_png
from mlprune.spec.languages import language_name
from mlprune.storage.results import Result


def draw_lines(dense: Result, results: Sequence[Result], languages: Sequence[str], title: str, file: Path) -> None:
    """Draw bits per byte against sparsity as PNG.

    A point far above the others would flatten the part that matters: each panel's axis ends at three times the
    dense model's value, and points beyond it are drawn as arrows at the top.
    """
    figure, panels = panel_grid(len(languages), min(COLUMNS, len(languages)), (4.2, 3.4), 1.4)
    for panel, language in zip(panels, languages, strict=True):
        _draw_language(panel, dense, results, language)
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("bits per byte (lower is better)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    write_png(figure, title, file)


def _draw_language(panel: Axes, dense: Result, results: Sequence[Result], language: str) -> None:
    metric = f"bits_per_byte.{language}"
    base = dense.metrics[metric]
    values = [result.metrics[metric] for result in results]
    top = min(AXIS_LIMIT * base, 1.05 * max([base * 1.3, *filter(math.isfinite, values)]))
    panel.axhline(base, color="black", linestyle="--", linewidth=1, label="dense model")
    for number, (label, line) in enumerate(_by_method(results).items()):
        color, marker = f"C{number % 10}", MARKERS[number % 8]
        points = sorted((result.metrics["sparsity.actual"], result.metrics[metric]) for result in line)
        within = [(x, min(y, top)) for x, y in points]
        panel.plot(*zip(*within, strict=True), color=color, marker=marker, markersize=5, label=label)
        beyond = [x for x, y in points if y > top]
        panel.plot(beyond, [top] * len(beyond), color=color, marker=r"$\uparrow$", markersize=12, linestyle="none")
    panel.set(title=language_name(language), xlabel="sparsity", ylim=(base * 0.95, top * 1.03))
    panel.grid(alpha=0.3)


def _by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group the results by how they were pruned, at any sparsity."""
    lines: dict[str, list[Result]] = {}
    for result in results:
        lines.setdefault(" ".join(filter(None, method_words(result))), []).append(result)
    return lines
