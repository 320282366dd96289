"""The table and values of `mlprune measure`. The measurements themselves are in `commands.measure`."""

from __future__ import annotations

from collections.abc import Sequence

from mlprune.commands.measure import PROMPT, WRITTEN, Measurement
from mlprune.console import results as out
from mlprune.console import size_text
from mlprune.report.tables import new_table

RATIOS = ("parameters", "disk", "memory", "prefill", "decode")  # fields that are compared with the first model's


def show_measurements(measurements: Sequence[Measurement]) -> None:
    """Print a row for each model, with the ratio of every number to that of the first."""
    table = new_table("size and speed", "", "model", "parameters", "on disk", "memory", "reads", "writes")
    table.columns[1].justify = "left"
    table.columns[1].overflow = "fold"
    table.padding = (0, 1, 0, 0)  # narrow: the table has many columns
    for number, one in enumerate(measurements, start=1):
        ratios = _ratios(one, measurements[0])
        texts = (f"{one.parameters / 1e6:,.1f} M", size_text(one.disk), size_text(one.memory))
        speeds = (f"{one.prefill:,.0f}/s", f"{one.decode:,.1f}/s")
        cells = [
            text if number == 1 else f"{text} x{ratios[name]:.2f}"
            for text, name in zip((*texts, *speeds), RATIOS, strict=True)
        ]
        table.add_row(str(number), one.model, *cells)
    out.print(table)
    out.print(
        f"reads, writes: tokens per second of one text: {PROMPT} tokens at once, the next {WRITTEN} one by one.\n"
        "memory: peak while it does both. x: ratio to the first model.",
        style="dim",
        soft_wrap=True,
    )


def measurement_values(measurements: Sequence[Measurement]) -> dict[str, object]:
    """Return the measurements, and their ratios to the first, as plain values."""
    return {"models": [vars(one) | {"ratios": _ratios(one, measurements[0])} for one in measurements]}


def _ratios(one: Measurement, first: Measurement) -> dict[str, float]:
    return {name: vars(one)[name] / vars(first)[name] for name in RATIOS}
