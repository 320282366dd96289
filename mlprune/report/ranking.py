"""The ranking of a sweep as table cells, for the terminal and for the MLflow page."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mlprune.evaluation.estimates import Estimate
from mlprune.evaluation.loss import LOSS, worst_language
from mlprune.sweep.ranking import RankedVariant, Standing, SweepOutcome

BITS_COLUMNS = 5  # with more languages, the table of languages has losses alone
DECIMAL_COLUMNS = 9  # with more languages, numbers are shorter, and there is no forecast
LEGEND = (
    "* best of its sparsity; ~ not significantly different from it (Holm-corrected within the sparsity).\n"
    "loss: change of bits per byte against the dense model, mean over languages{spread};\n"
    "to the best: difference in percentage points; confirmed: loss on lines that nothing was chosen by.\n"
    "In brackets: 95% CI over {units}."
)


def ranking_cells(outcome: SweepOutcome) -> tuple[list[str], list[list[str]]]:
    """Return headers and a row for each variant, from best to worst.

    Marks at the rank: `*` best of its sparsity, `~` not significantly different from the best.
    """
    metric = outcome.objective
    other = [] if metric.startswith(LOSS) else [metric]
    confirms = any(entry.confirmed or entry.standing is not Standing.EVALUATED for entry in outcome.ranking)
    by_worst = metric == "loss.worst"
    headers = [
        "",
        "score",
        "sparsity",
        "calibration",
        *other,
        "loss",
        *(["worst"] if by_worst else []),
        "to the best",
    ]
    headers += ["confirmed"] if confirms else []
    rows = []
    for rank, entry in enumerate(outcome.ranking, start=1):
        row = [f"{rank}{mark(entry)}", entry.variant.score.name, entry.variant.shape, _calibration(entry)]
        row += [_number(entry.metrics, name) for name in other]
        row += [_loss(entry), *([_worst(entry)] if by_worst else [])]
        row += ["" if entry.to_best is None else _difference(entry.to_best, metric)]
        row += [_confirmed(entry)] if confirms else []
        rows.append(row)
    return headers, rows


def language_cells(outcome: SweepOutcome) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of bits per byte and loss by language, and the forecast: the dense model first."""
    languages = outcome.spec.evaluation.perplexity.languages
    forecast = len(languages) <= DECIMAL_COLUMNS and any(
        "forecast.mean" in entry.metrics for entry in outcome.ranking
    )
    headers = ["", *languages, *(["forecast"] if forecast else [])]
    digits = 3 if len(languages) <= DECIMAL_COLUMNS else 2
    dense = [f"{outcome.dense.metrics[f'bits_per_byte.{code}']:.{digits}f}" for code in languages]
    rows = [["dense model", *dense, *([""] if forecast else [])]]
    for rank, entry in enumerate(outcome.ranking, start=1):
        cells = [_language(entry, code, len(languages)) for code in languages]
        predicted = [f"{entry.metrics['forecast.mean']:.4f}" if "forecast.mean" in entry.metrics else ""]
        rows.append([f"{rank}{mark(entry)}", *cells, *(predicted if forecast else [])])
    return headers, rows


def mark(entry: RankedVariant) -> str:
    """Return the mark of an entry at its rank."""
    return "*" if entry.is_best else "~" if entry.tied else ""


def legend(outcome: SweepOutcome) -> str:
    """Return what the marks and columns mean."""
    seeds = max((len(entry.seeds) for entry in outcome.ranking), default=1)
    units = "documents (lines, where the corpus names no documents)" + (f" and {seeds} seeds" if seeds > 1 else "")
    return LEGEND.format(units=units, spread=" (± SD over seeds)" if seeds > 1 else "")


def percent(value: float) -> str:
    """Return a relative change: `+4.2%`."""
    return f"{100 * value:+z.1f}%"


def estimate_text(one: Estimate) -> str:
    """Return a loss with its interval: `+4.2% [3.9, 4.5]`."""
    return f"{percent(one.value)} [{100 * one.low:z.1f}, {100 * one.high:z.1f}]"


def _difference(one: Estimate, metric: str) -> str:
    scale, digits = (100, 1) if metric.startswith(LOSS) else (1, 3)
    value, low, high = (scale * end for end in (one.value, one.low, one.high))
    return f"{value:+z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"


def _number(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.3f}" if name in metrics else ""


def _loss(entry: RankedVariant) -> str:
    if "loss.mean" not in entry.metrics:
        return ""
    seeds = np.array([result.metrics["loss.mean"] for result in entry.seeds])
    spread = f" ±{100 * float(seeds.std(ddof=1)):.1f}" if len(seeds) > 1 else ""
    return percent(entry.metrics["loss.mean"]) + spread


def _worst(entry: RankedVariant) -> str:
    if "loss.worst" not in entry.metrics:
        return ""
    code = worst_language(entry.metrics)
    return f"{code} {percent(entry.metrics[f'{LOSS}{code}'])}"


def _confirmed(entry: RankedVariant) -> str:
    if entry.standing is Standing.DROPPED:
        return f"dropped ({entry.lines} lines)"
    if entry.standing is Standing.SCREENED:
        return str(entry.standing.value)
    return "" if entry.confirmed is None else estimate_text(entry.confirmed)


def _language(entry: RankedVariant, code: str, languages: int) -> str:
    """Return the loss of a language, with bits per byte or fewer decimals as the number of languages allows.

    Bits per byte on fewer lines do not compare with the others': they are left out.
    """
    if f"{LOSS}{code}" not in entry.metrics:
        return ""
    loss = entry.metrics[f"{LOSS}{code}"]
    if languages > DECIMAL_COLUMNS:
        return f"{100 * loss:+.0f}%"
    if languages > BITS_COLUMNS or entry.standing is not Standing.EVALUATED:
        return percent(loss)
    return f"{entry.metrics[f'bits_per_byte.{code}']:.3f} {percent(loss)}"


def _calibration(entry: RankedVariant) -> str:
    variant = entry.variant
    return (variant.calibration_label or "-") + (f" ({', '.join(variant.special)})" if variant.special else "")
