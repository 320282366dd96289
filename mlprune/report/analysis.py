"""Tables and values of `mlprune analyze`. The numbers are computed in `commands.analyze` and `analysis`."""

from __future__ import annotations

from mlprune.analysis.features import ENDS, mean_overlaps, shares, total
from mlprune.commands.analyze import AnalysisResult
from mlprune.console import results as out
from mlprune.report.tables import new_table, show_tracking
from mlprune.spec.languages import language_name
from mlprune.spec.urls import redact


def show_analysis(result: AnalysisResult) -> None:
    """Print a row per language and direction, monolingual against translation text, and the written files."""
    request = result.request
    overlap, masks = _mean_overlaps(result), _mask_shares(result)
    table = new_table(
        f"{result.spec.model.path}: monolingual text against translations",
        "language",
        "translation",
        "top in both",
        "top in translation, bottom in mono",
        "top in mono, bottom in translation",
        "masks in common",
    )
    for code in request.translated:
        mono, *translations = request.indices(code)
        top, bottom = overlap["top"], overlap["bottom"]
        for translation in translations:
            values = (top[mono][translation], bottom[translation][mono], bottom[mono][translation])
            cells = [f"{share:.3f}" for share in (*values, masks[mono][translation])]
            direction = request.conditions[translation].removeprefix("translation:")
            table.add_row(f"{language_name(code)} ({code})", direction, *cells)
    out.print(table)
    out.print(
        f"Top, bottom: the {request.ratio:g} of channels with the largest, smallest magnitude; mean over layers.\n"
        f"Masks in common: wanda {request.sparsity:g}; weights that both drop / weights that either drops.",
        style="dim",
    )
    out.print(f"\nfiles      {result.output}: {', '.join(result.files)}", soft_wrap=True)
    show_tracking(result.spec)


def analysis_values(result: AnalysisResult) -> dict[str, object]:
    """Return plain values; matrices are over pairs of conditions: means over layers, masks over all matrices."""
    request = result.request
    return {
        "model": result.spec.model.path,
        "conditions": list(request.conditions),
        "layer": result.layer,
        "ratio": request.ratio,
        "sparsity": request.sparsity,
        "overlap": _mean_overlaps(result),
        "masks": _mask_shares(result),
        "files": [str(result.output / name) for name in result.files],
        "run": result.run,
        "tracking_uri": redact(result.spec.tracking_uri),
    }


def _mean_overlaps(result: AnalysisResult) -> dict[str, list[list[float]]]:
    """The overlap of top channels with each end's channels, for each pair of conditions, mean over layers."""
    ratio = result.request.ratio
    return {end: mean_overlaps(result.magnitude_CLH, ratio, end).tolist() for end in ENDS}


def _mask_shares(result: AnalysisResult) -> list[list[float]]:
    """For each pair of conditions: dropped weights in common, as a share of those that either drops."""
    matrix: list[list[float]] = shares(total(result.shared)).tolist()
    return matrix
