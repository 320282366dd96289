"""Two runs against each other."""

from __future__ import annotations

from typing import Any

from mlprune.commands.compare import Comparison
from mlprune.console import results as out
from mlprune.evaluation.significance import family_of
from mlprune.report.tables import new_table

VERDICTS = {"no difference shown": "not told apart"}  # in fewer letters


def show_comparison(found: Comparison) -> None:
    """A report card: b against a, a row a task and language."""
    out.print(f"a  {found.a.name}  {found.a.run_id}", soft_wrap=True)
    out.print(f"b  {found.b.name}  {found.b.run_id}", soft_wrap=True)
    table = new_table("b against a", "task", "language", "a", "b", "b - a, 95%", "p", "verdict")
    for column in (1, 6):
        table.columns[column].justify = "left"
    table.columns[4].no_wrap = True
    table.padding = (0, 1, 0, 0)  # many columns
    for one in found.differences:
        task = one.metric if one.task == "perplexity" else " ".join(family_of(one))
        difference = f"{one.difference:+.3f} [{one.low:.3f}, {one.high:.3f}]"
        figures = (f"{one.a:.3f}", f"{one.b:.3f}", difference, _p_text(one.adjusted))
        verdict = VERDICTS.get(one.verdict, one.verdict) + (" *" if found.is_worst(one) else "")
        style = {"better": "green", "worse": "red"}.get(one.verdict)
        table.add_row(task, one.language, *figures, verdict, style=style)
    out.print(table)
    out.print(
        "* the language that lost most, or gained least. Intervals: paired bootstrap over items. p: of it, or\n"
        "exact McNemar where answers are right or wrong; corrected by Holm over the languages of a task.",
        style="dim",
        soft_wrap=True,
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
