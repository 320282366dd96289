"""Tables and values of `mlprune compare`. The comparison itself is in `commands.compare`."""

from __future__ import annotations

from mlprune.commands.compare import Comparison
from mlprune.console import results as out
from mlprune.evaluation.significance import family_of
from mlprune.report.tables import new_table

VERDICTS = {"no difference shown": "not significant"}  # a shorter text: the table is wide


def show_comparison(comparison: Comparison) -> None:
    """Print the two runs, and one row per task and language: run b against run a."""
    out.print(f"a  {comparison.a.name}  {comparison.a.run_id}", soft_wrap=True)
    out.print(f"b  {comparison.b.name}  {comparison.b.run_id}", soft_wrap=True)
    table = new_table("b against a", "task", "language", "a", "b", "b - a, 95% CI", "p", "verdict")
    for column in (1, 6):
        table.columns[column].justify = "left"
    table.columns[4].no_wrap = True
    table.padding = (0, 1, 0, 0)  # narrow: the table has many columns
    for row in comparison.differences:
        task = row.metric if row.task == "perplexity" else " ".join(family_of(row))
        difference = f"{row.difference:+.3f} [{row.low:.3f}, {row.high:.3f}]"
        values = (f"{row.a:.3f}", f"{row.b:.3f}", difference, _p_text(row.adjusted))
        verdict = VERDICTS.get(row.verdict, row.verdict) + (" *" if comparison.is_worst(row) else "")
        style = {"better": "green", "worse": "red"}.get(row.verdict)
        table.add_row(task, row.language, *values, verdict, style=style)
    out.print(table)
    out.print(
        "* the language with the largest loss or smallest gain. 95% CI: Student's t, standard error from a\n"
        "paired bootstrap over documents, or over items without documents. p: likewise, or exact McNemar for\n"
        "right or wrong answers without documents; Holm-corrected over the languages of a task.",
        style="dim",
        soft_wrap=True,
    )


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def comparison_values(comparison: Comparison) -> dict[str, object]:
    """Return the comparison as plain values."""
    return {
        "a": vars(comparison.a),
        "b": vars(comparison.b),
        "differences": [vars(row) | {"worst": comparison.is_worst(row)} for row in comparison.differences],
    }
