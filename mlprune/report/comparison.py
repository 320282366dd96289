"""Two runs against each other."""

from __future__ import annotations

from typing import Any

from mlprune.comparison import Comparison
from mlprune.console import results as out
from mlprune.report.tables import new_table


def show_comparison(found: Comparison) -> None:
    """A report card: b against a, a row a task and language."""
    out.print(f"a  {found.a.name}  {found.a.run_id}", soft_wrap=True)
    out.print(f"b  {found.b.name}  {found.b.run_id}", soft_wrap=True)
    table = new_table("b against a", "task", "language", "a", "b", "b - a", "95% interval", "p (Holm)", "verdict")
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
