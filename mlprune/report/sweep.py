"""Tables and values of `mlprune sweep` (plan and outcome) and `mlprune evaluate`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from mlprune.console import results as out
from mlprune.console import size_text
from mlprune.evaluation.forecasts import forecast_correlation, with_forecasts
from mlprune.evaluation.significance import LEVEL
from mlprune.report.claims import LEGEND, LEGEND_LANGUAGES, claims_by_language, claims_table
from mlprune.report.ranking import language_cells, legend, ranking_cells
from mlprune.report.tables import memory_table, new_table, program, shard_values, show_tracking
from mlprune.spec.languages import language_name
from mlprune.spec.schema import DEFAULT_STORAGE
from mlprune.spec.urls import redact
from mlprune.storage.results import Result
from mlprune.sweep.claims import ClaimTest, claim_values
from mlprune.sweep.mixtures import evaluated_trials, forecast_trials
from mlprune.sweep.plan import SweepPlan
from mlprune.sweep.ranking import RankedVariant, SweepOutcome, task_metrics

TASK_COLUMNS = 4


def show_plan(plan: SweepPlan) -> None:
    """Print the plan of a dry run: trials, passes, memory and disk."""
    prepared, spec = plan.prepared, plan.prepared.spec
    out.print(f"{spec.name}: {spec.model.path}, {len(prepared.model_size.layers)} layers", style="bold")
    trials = new_table(f"{len(plan.variants)} trials and the dense model", "trial", "already finished")
    finished = {result.variant for result in plan.finished}
    for variant in plan.variants:
        trials.add_row(variant.label, "yes" if variant in finished else "")
    out.print(trials)
    if plan.searches:
        forecast, evaluated = len(forecast_trials(plan.searches)), len(evaluated_trials(plan.searches))
        out.print(f"mixtures are searched: at most {evaluated} more trials are evaluated, and {forecast} forecast")
    passes = new_table("remaining passes over the model", "kind", "passes")
    for kind, count in plan.passes.items():
        passes.add_row(kind, str(count))
    out.print(passes)
    if prepared.evaluation and (confirmation := prepared.evaluation.confirmation):
        lines = confirmation.rows.count // len(spec.evaluation.perplexity.languages)
        out.print(f"then the best trials of each sparsity on {lines} confirmation lines per language")
    out.print(memory_table(prepared.plan))
    out.print(f"disk: {size_text(plan.disk)} in {spec.storage}")


def plan_values(plan: SweepPlan) -> dict[str, object]:
    """Return the plan as plain values."""
    prepared = plan.prepared
    return {
        "name": prepared.spec.name,
        "trials": [{"key": prepared.result_key(v), "variant": v.to_dict()} for v in plan.variants],
        "mixtures": {
            "forecast": len(forecast_trials(plan.searches)),
            "evaluated": len(evaluated_trials(plan.searches)),
        },
        "finished": [result.key for result in plan.finished],
        "passes": plan.passes,
        "residency": str(prepared.plan.residency),
        "shards": shard_values(prepared.plan),
        "disk_bytes": plan.disk,
    }


def show_outcome(outcome: SweepOutcome) -> None:
    """Print the ranking, languages, tasks, pictures, tracking, export commands and failures."""
    spec = outcome.spec
    best = outcome.best_by_sparsity()
    out.print(_ranking(outcome))
    out.print(legend(outcome), style="dim")
    out.print(_languages(outcome))
    if tasks := _tasks(outcome):
        out.print(tasks)
    if outcome.claims:
        _show_claims(outcome.claims)
    for note in (*forecast_notes(outcome), *agreement_notes(outcome), *language_notes(outcome)):
        out.print(note, soft_wrap=True)
    out.print()
    for picture in outcome.pictures:
        out.print(f"picture    {picture}", soft_wrap=True)
    show_tracking(spec)
    for result in best:
        out.print(f"export     {export_command(outcome, result)}", soft_wrap=True)
    for label, cause in outcome.failed.items():
        out.print(f"failed     {label}: {cause}", style="red", soft_wrap=True)


def _show_claims(tests: Sequence[ClaimTest]) -> None:
    out.print(claims_table(tests))
    out.print(LEGEND, style="dim")
    if by_language := claims_by_language(tests):
        out.print(by_language)
        out.print(LEGEND_LANGUAGES, style="dim")


def export_command(outcome: SweepOutcome, entry: RankedVariant) -> str:
    """Return the command that exports a variant, of its first seed, as a checkpoint."""
    spec, variant = outcome.spec, entry.variant
    words = [program("mlprune"), "prune", "--run", outcome.runs[entry.key]]
    if spec.tracking.uri is not None:
        words += ["--set", f"tracking.uri={redact(spec.tracking.uri)}"]
    if spec.storage != str(Path(DEFAULT_STORAGE).absolute()):
        words += ["--set", f"storage={spec.storage}"]
    return shlex.join([*words, "--output", f"{spec.name}-{variant.sparsity:g}"])


def _ranking(outcome: SweepOutcome) -> Table:
    headers, rows = ranking_cells(outcome)
    title = f"{outcome.spec.name}: {len(outcome.ranking)} variants by {outcome.objective}"
    table = new_table(title, *headers)
    for column in table.columns:
        column.no_wrap = True
    score, calibrations = table.columns[1], table.columns[3]
    score.justify = calibrations.justify = "left"
    calibrations.no_wrap, calibrations.overflow = False, "fold"
    table.padding = (0, 1, 0, 0)  # narrow: the table has many columns
    for row in rows:
        table.add_row(*row, style="bold" if row[0].endswith("*") else None)
    return table


def _languages(outcome: SweepOutcome) -> Table:
    headers, rows = language_cells(outcome)
    table = new_table("bits per byte of held-out lines, and loss, by language", *headers)
    table.padding = (0, 1, 0, 0)
    for row in rows:
        table.add_row(*row, style="bold" if row[0].endswith("*") else None)
    return table


def agreement_notes(outcome: SweepOutcome) -> list[str]:
    """Return whether the tasks rank the variants as their loss does, one line for each metric."""
    notes = []
    for one in outcome.agreements:
        verdict = (
            "agrees" if one.tau > 0 and one.p < LEVEL else "disagrees" if one.tau < 0 else "agreement not shown"
        )
        notes.append(
            f"{one.metric}: {verdict} with the ranking by loss (Kendall's tau {one.tau:+.2f}, p {one.p:.2g})"
        )
    return notes


def forecast_notes(outcome: SweepOutcome) -> list[str]:
    """Return how well forecasts ranked the variants of each sparsity; nothing for fewer than three variants."""
    results = with_forecasts([entry.result for entry in outcome.evaluated])
    rhos = {
        sparsity: forecast_correlation(
            outcome.dense,
            [one for one in results if one.variant and one.variant.sparsity == sparsity],
            "mean",
        )
        for sparsity in sorted({one.variant.sparsity for one in results if one.variant})
    }
    texts = [f"{rho:.2f} at {sparsity:g}" for sparsity, rho in rhos.items() if not math.isnan(rho)]
    return [f"forecasts: Spearman's rho with the mean loss is {', '.join(texts)}"] if texts else []


def language_notes(outcome: SweepOutcome) -> list[str]:
    """Return a warning for each language that the dense model hardly knows."""
    return [
        f"{code}: the dense model needs {dense:.2f} bits per byte, a compressor {compressor:.2f}: it hardly knows "
        f"{language_name(code)}, so a small loss there means little"
        for code, (dense, compressor) in outcome.unknown_languages.items()
    ]


def _tasks(outcome: SweepOutcome) -> Table | None:
    """Return a table of the metrics of other tasks, as many as fit; None if there are none."""
    names = task_metrics(outcome.dense.metrics)
    means = {name.removesuffix(".mean") for name in names if name.endswith(".mean")}
    # the mean over all languages replaces the metrics of single languages
    columns = [name for name in names if name.endswith(".mean") or name.split(".")[0] not in means][:TASK_COLUMNS]
    if not columns:
        return None
    more = "; more in MLflow" if len(columns) < len(names) else ""
    headers = [name.replace(".", "\n") for name in columns]
    table = new_table(f"tasks, trials in the same order{more}", "", *headers)
    all_metrics = [outcome.dense.metrics, *(entry.metrics for entry in outcome.evaluated)]
    for rank, metrics in enumerate(all_metrics):
        table.add_row(str(rank) if rank else "dense model", *(f"{metrics[name]:.3f}" for name in columns))
    return table


def outcome_values(outcome: SweepOutcome) -> dict[str, object]:
    """Return the outcome as plain values."""

    return {
        "name": outcome.spec.name,
        "objective": outcome.objective,
        "dense": _result_values(outcome, outcome.dense),
        "ranking": [_entry_values(outcome, entry) for entry in outcome.ranking],
        "claims": [claim_values(test) for test in outcome.claims],
        "agreements": [vars(one) for one in outcome.agreements],
        "unknown_languages": dict(outcome.unknown_languages),
        "winner": outcome.runs[outcome.ranking[0].key],
        "failed": dict(outcome.failed),
        "tracking_uri": redact(outcome.spec.tracking_uri),
        "parent_run": outcome.parent_run,
        "pictures": [str(picture) for picture in outcome.pictures],
        "nodes": list(outcome.nodes),
    }


def _result_values(outcome: SweepOutcome, result: Result) -> dict[str, object]:
    return {
        "run": outcome.runs[result.key],
        "variant": result.variant.to_dict() if result.variant else None,
        "metrics": dict(result.metrics),
        "masks": result.digest,
    }


def _entry_values(outcome: SweepOutcome, entry: RankedVariant) -> dict[str, object]:
    """Return a variant: its metrics are means over its seeds, its run and masks those of the first seed."""
    estimates = {"loss": entry.loss, "to_best": entry.to_best, "confirmed": entry.confirmed}
    return {
        **_result_values(outcome, entry.result),
        "standing": entry.standing.name.lower(),
        "lines": entry.lines,
        "tied": entry.tied,
        **{name: vars(one) if one else None for name, one in estimates.items()},
        "seeds": [_result_values(outcome, result) for result in entry.seeds],
    }


def show_metrics(model: str, languages: Sequence[str], metrics: Mapping[str, float]) -> None:
    """Print the metrics of one checkpoint, one row per language."""
    table = new_table(f"{model}: held-out lines", "language", "bits per byte", "perplexity")
    for code in languages:
        bits, perplexity = metrics[f"bits_per_byte.{code}"], metrics[f"perplexity.{code}"]
        table.add_row(f"{language_name(code)} ({code})", f"{bits:.4f}", f"{perplexity:.2f}")
    out.print(table)
    if names := task_metrics(metrics):
        tasks = new_table("tasks", "metric", "value")
        for name in names:
            tasks.add_row(name, f"{metrics[name]:.4f}")
        out.print(tasks)
