"""The ranking of a sweep as table cells, for the terminal and for the MLflow page."""

from __future__ import annotations

from collections.abc import Sequence

from mlprune.storage.results import Result
from mlprune.sweep.ranking import SweepOutcome

LANGUAGE_COLUMNS = 5  # with more languages, only the mean and the worst are displayed


def ranking_cells(outcome: SweepOutcome) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows: the dense model first, then the trials from best to worst.

    Marks at the rank: `*` best of its sparsity, `~` not significantly different from the best.
    """
    languages = outcome.spec.evaluation.perplexity.languages
    columns = languages if len(languages) <= LANGUAGE_COLUMNS else ()
    headers = ["", "score", "sparsity", "calibration", *columns, "mean", *(() if columns else ("worst",))]
    best = {result.key for result in outcome.best_by_sparsity()}
    rows = [_row("", outcome.dense, outcome, columns)]
    for rank, result in enumerate(outcome.ranking, start=1):
        mark = "*" if result.key in best else "~" if result.key in outcome.tied else ""
        rows.append(_row(f"{rank}{mark}", result, outcome, columns))
    return headers, rows


def _row(rank: str, result: Result, outcome: SweepOutcome, columns: Sequence[str]) -> list[str]:
    variant, metrics, languages = result.variant, result.metrics, outcome.spec.evaluation.perplexity.languages
    mean = f"{metrics['bits_per_byte.mean']:.3f}"
    if variant is not None:
        change, low, high = (100 * share for share in outcome.changes[result.key])
        mean += f" ({change:+.0f}%, {low:.0f} to {high:.0f})"
    worst = max(languages, key=lambda code: metrics[f"bits_per_byte.{code}"])
    return [
        rank,
        variant.score.name if variant else "dense model",
        _sparsity(result),
        _calibration(result),
        *(f"{metrics[f'bits_per_byte.{code}']:.3f}" for code in columns),
        mean,
        *(() if columns else (f"{worst} {metrics['bits_per_byte.worst']:.3f}",)),
    ]


def _sparsity(result: Result) -> str:
    variant = result.variant
    if variant is None:
        return "0"
    return str(variant.pattern) if variant.pattern.group else f"{variant.sparsity:g}"


def _calibration(result: Result) -> str:
    variant = result.variant
    if variant is None:
        return "-"
    return (variant.calibration_text or "-") + (f" ({', '.join(variant.special)})" if variant.special else "")
