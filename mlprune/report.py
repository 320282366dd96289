"""Results, as tables for a person (within 100 columns) and as plain values for a script."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mlprune.analysis.features import ENDS, overlaps, shares, total
from mlprune.comparison import Comparison
from mlprune.config import DEFAULT_STORAGE, SweepSpec
from mlprune.console import results as out
from mlprune.console import size_text
from mlprune.languages import name_of
from mlprune.scale import ScalePlan
from mlprune.shards.planner import Plan
from mlprune.store import Result
from mlprune.study import Findings
from mlprune.sweep import SweepOutcome, SweepPlan

LANGUAGE_COLUMNS = 5  # more languages than this are shown by their mean and the worst


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


# the plan


def show_plan(plan: SweepPlan) -> None:
    """What a dry run prints: trials, passes, memory and disk."""
    prepared, spec = plan.prepared, plan.prepared.spec
    out.print(f"{spec.name}: {spec.model.path}, {len(prepared.shape.layers)} layers", style="bold")
    trials = _table(f"{len(plan.variants)} trials and the dense model", "trial", "finished before")
    finished = {result.variant for result in plan.finished}
    for variant in plan.variants:
        trials.add_row(variant.label, "yes" if variant in finished else "")
    out.print(trials)
    passes = _table("passes over the model still to go", "kind", "passes")
    for kind, count in plan.passes.items():
        passes.add_row(kind, str(count))
    out.print(passes)
    out.print(memory_table(prepared.plan))
    out.print(f"disk: {size_text(plan.disk)} in {spec.storage_folder}")


def memory_table(plan: Plan) -> Table:
    """What a worker of each shard holds; shards that hold the same are one row."""
    kinds = {kind: [vars(need)[kind] for need in plan.memory] for kind in vars(plan.memory[0])}
    kinds["activations"] = [sum(both) for both in zip(kinds.pop("hidden"), kinds["activations"], strict=True)]
    if not any(kinds["writing"]):
        del kinds["writing"]
    beside = {kind: kinds.pop(kind) for kind in ("host", "disk")}
    kinds |= {"total": [need.total for need in plan.memory]} | {k: v for k, v in beside.items() if any(v)}
    unit, name = (2**30, "GiB") if max(kinds["total"]) > 10 * 2**30 else (2**20, "MiB")
    ranks = f", {plan.holding.ranks} ranks a shard" if plan.holding.ranks > 1 else ""
    table = _table(f"memory of each worker, {name}: {plan.holding}{ranks}", "layers", *kinds)
    table.padding = (0, 1, 0, 0)  # many columns
    sizes = list(zip(*kinds.values(), strict=True))
    for row, alike in groupby(range(len(sizes)), key=lambda number: sizes[number]):
        first, *more = alike
        last = plan.spans[more[-1] if more else first]
        shards = f" x{1 + len(more)}" if more else ""
        figures = (f"{size / unit:,.1f}" if unit == 2**30 else f"{size / unit:,.0f}" for size in row)
        table.add_row(f"{plan.spans[first].first}-{last.end - 1}{shards}", *figures)
    return table


def plan_values(plan: SweepPlan) -> dict[str, Any]:
    """The plan as plain values."""
    prepared = plan.prepared
    return {
        "name": prepared.spec.name,
        "trials": [{"key": prepared.result_key(v), "variant": vars(v)} for v in plan.variants],
        "finished": [result.key for result in plan.finished],
        "passes": plan.passes,
        "residency": str(prepared.plan.holding),
        "shards": shard_values(prepared.plan),
        "disk_bytes": plan.disk,
    }


# a model on machines


def show_scale(planned: ScalePlan) -> None:
    """How the model would be held, how long each phase would take, and what would help."""
    machine, shape, work = planned.machine, planned.shape, planned.work
    out.print(
        f"{planned.name}: {len(shape.layers)} layers, {shape.pruned_total / 1e9:.3g}B weights in matrices, "
        f"{size_text(shape.total)} in {str(shape.dtype).removeprefix('torch.')}",
        style="bold",
        soft_wrap=True,
    )
    nodes = f"{machine.nodes} node{'s' * (machine.nodes > 1)}"
    speed = f"{machine.flops / 1e12:.3g} TFLOP/s"
    host = f"{size_text(machine.host_memory)} of memory"
    if machine.gpus:
        gpus = (
            f"{machine.gpus} GPUs of {size_text(machine.gpu_memory)}, {speed}, {machine.host_to_device / 1e9:.3g}"
        )
        out.print(f"on {nodes}, each of {gpus} GB/s from the host; {host}", soft_wrap=True)
    else:
        out.print(f"on {nodes}, each of {host}, {speed}", soft_wrap=True)
    out.print(
        f"for {work.variants} variants, {len(work.calibration)} calibration sets of "
        f"{max(work.calibration, default=0):,} tokens, {work.evaluation:,} tokens of evaluation"
    )
    if planned.plan is None:
        out.print(planned.why_not, style="red", soft_wrap=True)
    else:
        if planned.plan.why:
            out.print(f"residency: {planned.plan.why}", soft_wrap=True)
        out.print(memory_table(planned.plan))
        out.print(_phases_table(planned))
    better = "it would fit with" if planned.plan is None else "the weights would stay where they are used with"
    for change in planned.changes:
        out.print(f"{better} {change}", soft_wrap=True)


def _phases_table(planned: ScalePlan) -> Table:
    table = _table("time, estimated", "phase", "time", "bound by", "weights moved", "hidden moved")
    for phase in planned.phases:
        moved = [size_text(size) if size else "-" for size in (phase.weights_moved, phase.hidden_moved)]
        table.add_row(phase.name, time_text(phase.seconds), phase.bound, *moved)
    table.add_row("all", time_text(sum(phase.seconds for phase in planned.phases)), "", "", "")
    return table


def time_text(seconds: float) -> str:
    """Seconds as a person reads them: `3 min`, `2.5 h`."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def scale_values(planned: ScalePlan) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "model": planned.name,
        "machine": vars(planned.machine),
        "work": vars(planned.work),
        "fits": planned.plan is not None,
        "why_not": planned.why_not or None,
        "residency": str(planned.plan.holding) if planned.plan else None,
        "shards": shard_values(planned.plan) if planned.plan else [],
        "phases": [vars(phase) for phase in planned.phases],
        "changes": list(planned.changes),
    }


def shard_values(plan: Plan) -> list[dict[str, Any]]:
    return [
        {"layers": [span.first, span.end - 1], "memory_bytes": {**vars(need), "total": need.total}}
        for span, need in zip(plan.spans, plan.memory, strict=True)
    ]


# the outcome


def show_outcome(outcome: SweepOutcome) -> None:
    """The ranking, and what to do next."""
    spec = outcome.spec
    best = outcome.best_by_sparsity()
    out.print(_ranking(outcome, {result.key for result in best}))
    out.print(
        "* the best of its sparsity; ~ not told apart from it. In brackets: against the dense model's mean,\n"
        "and 95% of a paired bootstrap over lines.",
        style="dim",
    )
    out.print(f"\npicture    {outcome.picture}", soft_wrap=True)
    _show_tracking(spec)
    for result in best:
        out.print(f"export     {export_command(outcome, result)}", soft_wrap=True)
    for label, cause in outcome.failed.items():
        out.print(f"failed     {label}: {cause}", style="red", soft_wrap=True)


def _show_tracking(spec: SweepSpec) -> None:
    out.print(f"tracking   {spec.tracking_uri}", soft_wrap=True)
    if not spec.tracking_uri.startswith("http"):
        ui = shlex.join([program("mlflow"), "ui", "--backend-store-uri", spec.tracking_uri])
        out.print(f"compare    {ui}", soft_wrap=True)


def program(name: str) -> str:
    """How to call a program of this environment: by its name, or by its path where the name is not found."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) or not beside.exists():
        return name
    return min(os.path.relpath(beside), str(beside), key=len)


def export_command(outcome: SweepOutcome, result: Result) -> str:
    """The command that writes a trial's checkpoint."""
    spec, variant = outcome.spec, result.variant
    assert variant is not None
    words = [program("mlprune"), "prune", "--run", outcome.runs[result.key]]
    if spec.tracking.uri is not None:
        words += ["--set", f"tracking.uri={spec.tracking.uri}"]
    if spec.storage_folder != Path(DEFAULT_STORAGE).absolute():
        words += ["--set", f"storage={spec.storage}"]
    return shlex.join([*words, "--output", f"{spec.name}-{variant.sparsity:g}"])


def _ranking(outcome: SweepOutcome, best: set[str]) -> Table:
    languages = outcome.spec.evaluation.perplexity.languages
    shown: Sequence[str] = languages if len(languages) <= LANGUAGE_COLUMNS else ()
    table = _table(
        f"{outcome.spec.name}: bits per byte of held-out lines (lower is better)",
        "",
        "score",
        "sparsity",
        "calibration",
        *shown,
        "mean",
        *(() if shown else ("worst",)),
    )
    for column in (1, 3):
        table.columns[column].justify = "left"
    table.columns[3].overflow = "fold"
    _add_row(table, "", outcome.dense, outcome, shown)
    for rank, result in enumerate(outcome.ranking, start=1):
        mark = "*" if result.key in best else "~" if result.key in outcome.level else ""
        _add_row(table, f"{rank}{mark}", result, outcome, shown)
    return table


def _add_row(table: Table, rank: str, result: Result, outcome: SweepOutcome, shown: Sequence[str]) -> None:
    variant, metrics, languages = result.variant, result.metrics, outcome.spec.evaluation.perplexity.languages
    worst = max(languages, key=lambda code: metrics[f"bits_per_byte.{code}"])
    last = () if shown else (f"{worst} {metrics['bits_per_byte.worst']:.3f}",)
    mean = f"{metrics['bits_per_byte.mean']:.3f}"
    if variant is not None:
        change, low, high = (100 * share for share in outcome.changes[result.key])
        mean += f" ({change:+.0f}%, {low:.0f} to {high:.0f})"
    table.add_row(
        rank,
        variant.score if variant else "dense model",
        _shape(result),
        _calibration(result),
        *(f"{metrics[f'bits_per_byte.{code}']:.3f}" for code in shown),
        mean,
        *last,
        style="bold" if rank.endswith("*") else None,
    )


def _shape(result: Result) -> str:
    variant = result.variant
    if variant is None:
        return "0"
    return f"{variant.sparsity:g}" if variant.pattern == "unstructured" else variant.pattern


def _calibration(result: Result) -> str:
    variant = result.variant
    if variant is None or variant.calibration is None:
        return "-"
    return variant.calibration + (" (sequential)" if variant.propagation == "sequential" else "")


def outcome_values(outcome: SweepOutcome) -> dict[str, Any]:
    """The outcome as plain values."""

    def values(result: Result) -> dict[str, Any]:
        return {
            "run": outcome.runs[result.key],
            "variant": vars(result.variant) if result.variant else None,
            "metrics": dict(result.metrics),
            "masks": result.digest,
        }

    return {
        "name": outcome.spec.name,
        "objective": outcome.objective,
        "dense": values(outcome.dense),
        "ranking": [values(result) for result in outcome.ranking],
        "winner": outcome.runs[outcome.ranking[0].key],
        "failed": dict(outcome.failed),
        "tracking_uri": outcome.spec.tracking_uri,
        "parent_run": outcome.parent_run,
        "picture": str(outcome.picture),
    }


# two runs


def show_comparison(found: Comparison) -> None:
    """A report card: b against a, a row a task and language."""
    out.print(f"a  {found.a.name}  {found.a.run_id}", soft_wrap=True)
    out.print(f"b  {found.b.name}  {found.b.run_id}", soft_wrap=True)
    table = _table("b against a", "task", "language", "a", "b", "b - a", "95% interval", "p (Holm)", "verdict")
    for column in (1, 7):
        table.columns[column].justify = "left"
    table.padding = (0, 1, 0, 0)
    for one in found.differences:
        figures = [f"{value:.3f}" for value in (one.a, one.b)]
        figures += [f"{one.difference:+.3f}", f"[{one.low:+.3f}, {one.high:+.3f}]", _p_text(one.adjusted)]
        task = one.metric if one.task == "perplexity" else f"{one.task} {one.metric}"
        verdict = one.verdict + (" (worst)" if found.is_worst(one) else "")
        style = {"better": "green", "worse": "red"}.get(one.verdict)
        table.add_row(task, one.language, *figures, verdict, style=style)
    out.print(table)
    out.print(
        "Paired bootstrap over items; p by McNemar's exact test where answers are right or wrong, corrected\n"
        "by Holm over the languages of a task. (worst): the language that lost most, or gained least.",
        style="dim",
    )


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def comparison_values(found: Comparison) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "a": vars(found.a),
        "b": vars(found.b),
        "differences": [vars(one) | {"worst": found.is_worst(one)} for one in found.differences],
    }


def show_metrics(model: str, languages: Sequence[str], metrics: Mapping[str, float]) -> None:
    """One checkpoint's scores, a row a language."""
    table = _table(f"{model}: held-out lines", "language", "bits per byte", "perplexity")
    for code in languages:
        bits, perplexity = metrics[f"bits_per_byte.{code}"], metrics[f"perplexity.{code}"]
        table.add_row(f"{name_of(code)} ({code})", f"{bits:.4f}", f"{perplexity:.2f}")
    out.print(table)


# what calibrations do in a model


def show_findings(found: Findings) -> None:
    """Each language's monolingual and translation text against each other, and where the rest is."""
    asked, values = found.question, findings_values(found)
    table = _table(
        f"{found.spec.model.path}: mono:x against translation:{asked.pivot}-x",
        "language",
        "tops in common",
        "translation's top at mono's bottom",
        "mono's top at translation's bottom",
        "masks in common",
    )
    for code in asked.translated:
        mono, translation = asked.places(code)
        top, bottom = values["overlap"]["top"], values["overlap"]["bottom"]
        shown = (top[mono][translation], bottom[translation][mono], bottom[mono][translation])
        figures = [f"{share:.3f}" for share in (*shown, values["masks"][mono][translation])]
        table.add_row(f"{name_of(code)} ({code})", *figures)
    out.print(table)
    out.print(
        f"Top and bottom: {asked.ratio:g} of the channels by magnitude, mean over layers.\n"
        f"Masks: wanda {asked.sparsity:g}, the weights that both drop of those that either drops.",
        style="dim",
    )
    out.print(f"\nfiles      {found.output}: {', '.join(found.files)}", soft_wrap=True)
    _show_tracking(found.spec)


def findings_values(found: Findings) -> dict[str, Any]:
    """The same as plain values: matrices over the conditions, means over layers, masks over all matrices."""
    asked = found.question
    means = {end: overlaps(found.magnitude_CLH, asked.ratio, end).mean(2).tolist() for end in ENDS}
    return {
        "model": found.spec.model.path,
        "conditions": list(asked.conditions),
        "layer": found.layer,
        "ratio": asked.ratio,
        "sparsity": asked.sparsity,
        "overlap": means,
        "masks": shares(total(found.shared)).tolist(),
        "files": [str(found.output / name) for name in found.files],
        "run": found.run,
        "tracking_uri": found.spec.tracking_uri,
    }
