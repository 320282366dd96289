"""Tables and values of `mlprune plan`. The plan itself is made in `commands.plan`."""

from __future__ import annotations

from rich.table import Table

from mlprune.commands.plan import ScalePlan
from mlprune.console import results as out
from mlprune.console import size_text, time_text
from mlprune.report.tables import memory_table, new_table, shard_values


def show_scale(scale: ScalePlan) -> None:
    """Print each worker's memory, the time of each phase, and what would make the model fit (better)."""
    machine, size, work = scale.machine, scale.model_size, scale.work
    out.print(
        f"{scale.name}: {len(size.layers)} layers, {size.pruned_total / 1e9:.3g}B weights in matrices, "
        f"{size_text(size.total)} in {str(size.dtype).removeprefix('torch.')}",
        style="bold",
        soft_wrap=True,
    )
    nodes = f"{machine.nodes} node{'s' * (machine.nodes > 1)}"
    speed = f"{machine.flops / 1e12:.3g} TFLOP/s"
    host = f"{size_text(machine.host_memory)} of host memory"
    if machine.gpus:
        gpus = (
            f"{machine.gpus} GPUs of {size_text(machine.gpu_memory)}, {speed}, {machine.host_to_device / 1e9:.3g}"
        )
        out.print(f"on {nodes}, each with {gpus} GB/s from the host; {host}", soft_wrap=True)
    else:
        out.print(f"on {nodes}, each with {host}, {speed}", soft_wrap=True)
    out.print(
        f"for {work.variants} variants, {len(work.calibration)} calibration sets of "
        f"{max(work.calibration, default=0):,} tokens, {work.evaluation:,} tokens of evaluation"
    )
    if scale.plan is None:
        out.print(scale.reason, style="red", soft_wrap=True)
    else:
        if scale.plan.reason:
            out.print(f"residency: {scale.plan.reason}", soft_wrap=True)
        out.print(memory_table(scale.plan))
        out.print(_phases_table(scale))
    effect = "the model would fit with" if scale.plan is None else "all weights would stay resident with"
    for change in scale.changes:
        out.print(f"{effect} {change}", soft_wrap=True)


def _phases_table(scale: ScalePlan) -> Table:
    table = new_table("estimated time", "phase", "time", "bound by", "weights moved", "hidden moved")
    for phase in scale.phases:
        moved = [size_text(size) if size else "-" for size in (phase.weights_moved, phase.hidden_moved)]
        table.add_row(phase.name, time_text(phase.seconds), phase.bound, *moved)
    table.add_row("total", time_text(sum(phase.seconds for phase in scale.phases)), "", "", "")
    return table


def scale_values(scale: ScalePlan) -> dict[str, object]:
    """Return the plan as plain values."""
    return {
        "model": scale.name,
        "machine": vars(scale.machine),
        "work": vars(scale.work),
        "fits": scale.plan is not None,
        "why_not": scale.reason or None,
        "residency": str(scale.plan.residency) if scale.plan else None,
        "shards": shard_values(scale.plan) if scale.plan else [],
        "phases": [vars(phase) for phase in scale.phases],
        "changes": list(scale.changes),
    }
