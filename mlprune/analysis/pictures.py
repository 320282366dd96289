"""Pictures of a sweep: the lines, and what its pictures have in common."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from mlprune.spec.languages import language_name
from mlprune.storage.files import write_whole
from mlprune.storage.results import Result

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMNS = 3
MARKERS = "osD^vPX*"
BEYOND = 3.0  # times the dense model's value: axes end there


def draw_sweep(dense: Result, results: Sequence[Result], languages: Sequence[str], title: str, file: Path) -> None:
    """Bits per byte against sparsity, a panel a language, a line a way of pruning; PNG.

    A point far above the rest would flatten what matters: each panel's axis ends at three times the dense
    model's value, and points beyond it are drawn as arrows at the top.
    """
    figure, panels = grid(len(languages), min(COLUMNS, len(languages)), (4.2, 3.4), 1.4)
    for panel, language in zip(panels, languages, strict=True):
        _draw_language(panel, dense, results, language)
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("bits per byte (lower is better)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    write(figure, title, file)


def _draw_language(panel: Axes, dense: Result, results: Sequence[Result], language: str) -> None:
    metric = f"bits_per_byte.{language}"
    base = dense.metrics[metric]
    values = [result.metrics[metric] for result in results]
    top = min(BEYOND * base, 1.05 * max([base * 1.3, *filter(math.isfinite, values)]))
    panel.axhline(base, color="black", linestyle="--", linewidth=1, label="dense model")
    for number, (label, line) in enumerate(_lines(results).items()):
        color, marker = f"C{number % 10}", MARKERS[number % 8]
        points = sorted((r.metrics["sparsity.actual"], r.metrics[metric]) for r in line)
        shown = [(x, min(y, top)) for x, y in points]
        panel.plot(*zip(*shown, strict=True), color=color, marker=marker, markersize=5, label=label)
        beyond = [x for x, y in points if y > top]
        panel.plot(beyond, [top] * len(beyond), color=color, marker=r"$\uparrow$", markersize=12, linestyle="none")
    panel.set(title=language_name(language), xlabel="sparsity", ylim=(base * 0.95, top * 1.03))
    panel.grid(alpha=0.3)


def _lines(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of one way of pruning at several sparsities, together."""
    lines: dict[str, list[Result]] = {}
    for result in results:
        lines.setdefault(" ".join(filter(None, _way(result))), []).append(result)
    return lines


def _way(result: Result) -> tuple[str, ...]:
    """How it was pruned, all but the sparsity; what needs no word is empty."""
    variant = result.variant
    assert variant is not None
    pattern = str(variant.pattern) if variant.pattern.group else ""
    allocation = "" if variant.allocation == "uniform" else variant.allocation
    propagation = "" if variant.propagation == "dense" else variant.propagation
    return variant.score.name, variant.calibration_text or "", pattern, allocation, propagation


def short_names(results: Sequence[Result]) -> dict[str, str]:
    """Result key -> how it was pruned, without the sparsity and without what is the same for all."""
    ways = {result.key: _way(result) for result in results}
    differs = [len(set(values)) > 1 for values in zip(*ways.values(), strict=True)]
    return {
        key: " ".join(word for word, shown in zip(way, differs, strict=True) if word and shown) or way[0]
        for key, way in ways.items()
    }


def grid(count: int, columns: int, panel: tuple[float, float], beside: float) -> tuple[Figure, list[Axes]]:
    """`count` panels of that size in inches, and so much height beside them."""
    rows = -(-count // columns)
    size = (panel[0] * columns, panel[1] * rows + beside)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for empty in panels.flat[count:]:
        empty.set_visible(False)
    return figure, list(panels.flat[:count])


def write(figure: Figure, title: str, file: Path) -> None:
    """Write the picture as PNG, and let go of it."""
    figure.suptitle(title, fontsize="medium", parse_math=False)  # a model may be called a$b$
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    plt.close(figure)
    write_whole(file, png.getvalue())
