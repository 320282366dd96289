"""What the tables and values of several commands share."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from itertools import groupby
from pathlib import Path

from rich import box
from rich.table import Table

from mlprune.console import results as out
from mlprune.planning.planner import Plan
from mlprune.spec.schema import SweepSpec
from mlprune.spec.urls import redact


def new_table(title: str, *columns: str) -> Table:
    """Return a table without rows: the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def memory_table(plan: Plan) -> Table:
    """Return the memory of each shard's worker by kind; neighbouring shards with equal sizes share a row."""
    kinds = {kind: [vars(need)[kind] for need in plan.memory] for kind in vars(plan.memory[0])}
    kinds["activations"] = [sum(both) for both in zip(kinds.pop("hidden"), kinds["activations"], strict=True)]
    if not any(kinds["writing"]):
        del kinds["writing"]
    elsewhere = {kind: kinds.pop(kind) for kind in ("host", "disk")}  # not part of the device's total
    kinds |= {"total": [need.total for need in plan.memory]} | {k: v for k, v in elsewhere.items() if any(v)}
    unit, name = (2**30, "GiB") if max(kinds["total"]) > 10 * 2**30 else (2**20, "MiB")
    ranks = f", {plan.residency.ranks} ranks per shard" if plan.residency.ranks > 1 else ""
    table = new_table(f"memory per worker in {name}: {plan.residency}{ranks}", "layers", *kinds)
    table.padding = (0, 1, 0, 0)  # narrow: the table has many columns
    sizes = list(zip(*kinds.values(), strict=True))
    for row, equal in groupby(range(len(sizes)), key=lambda number: sizes[number]):
        first, *more = equal
        last = plan.spans[more[-1] if more else first]
        shards = f" x{1 + len(more)}" if more else ""
        cells = (f"{size / unit:,.1f}" if unit == 2**30 else f"{size / unit:,.0f}" for size in row)
        table.add_row(f"{plan.spans[first].first}-{last.end - 1}{shards}", *cells)
    return table


def shard_values(plan: Plan) -> list[dict[str, object]]:
    """Return the layers of each shard and the memory of its worker as plain values."""
    return [
        {"layers": [span.first, span.end - 1], "memory_bytes": {**vars(need), "total": need.total}}
        for span, need in zip(plan.spans, plan.memory, strict=True)
    ]


def show_tracking(spec: SweepSpec) -> None:
    """Print where the MLflow runs are and, for a database, the command that opens them."""
    out.print(f"tracking   {redact(spec.tracking_uri)}", soft_wrap=True)
    if not spec.tracking_uri.startswith("http"):
        ui = shlex.join([program("mlflow"), "ui", "--backend-store-uri", redact(spec.tracking_uri)])
        out.print(f"compare    {ui}", soft_wrap=True)


def program(name: str) -> str:
    """Return what to type to run a program of this environment: its name, or its path if it is not on PATH."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) or not beside.exists():
        return name
    return min(os.path.relpath(beside), str(beside), key=len)
