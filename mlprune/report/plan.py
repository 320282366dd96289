"""A model on machines."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mlprune.commands.plan import ScalePlan
from mlprune.console import results as out
from mlprune.console import size_text, time_text
from mlprune.report.tables import memory_table, new_table, shard_values


def show_scale(planned: ScalePlan) -> None:
    """How the model would be held, how long each phase would take, and what would help."""
    machine, size, work = planned.machine, planned.model_size, planned.work
    out.print(
        f"{planned.name}: {len(size.layers)} layers, {size.pruned_total / 1e9:.3g}B weights in matrices, "
        f"{size_text(size.total)} in {str(size.dtype).removeprefix('torch.')}",
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
        out.print(planned.reason, style="red", soft_wrap=True)
    else:
        if planned.plan.reason:
            out.print(f"residency: {planned.plan.reason}", soft_wrap=True)
        out.print(memory_table(planned.plan))
        out.print(_phases_table(planned))
    better = "it would fit with" if planned.plan is None else "the weights would stay where they are used with"
    for change in planned.changes:
        out.print(f"{better} {change}", soft_wrap=True)


def _phases_table(planned: ScalePlan) -> Table:
    table = new_table("time, estimated", "phase", "time", "bound by", "weights moved", "hidden moved")
    for phase in planned.phases:
        moved = [size_text(size) if size else "-" for size in (phase.weights_moved, phase.hidden_moved)]
        table.add_row(phase.name, time_text(phase.seconds), phase.bound, *moved)
    table.add_row("all", time_text(sum(phase.seconds for phase in planned.phases)), "", "", "")
    return table


def scale_values(planned: ScalePlan) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "model": planned.name,
        "machine": vars(planned.machine),
        "work": vars(planned.work),
        "fits": planned.plan is not None,
        "why_not": planned.reason or None,
        "residency": str(planned.plan.residency) if planned.plan else None,
        "shards": shard_values(planned.plan) if planned.plan else [],
        "phases": [vars(phase) for phase in planned.phases],
        "changes": list(planned.changes),
    }
