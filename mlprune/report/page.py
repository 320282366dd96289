"""What a person reads on top of the sweep's page in MLflow, as Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from mlprune.report.ranking import ranking_cells
from mlprune.report.sweep import export_command
from mlprune.spec.languages import language_name
from mlprune.sweep.ranking import SweepOutcome
from mlprune.tracking.mlflow_client import parallel_coordinates_link
from mlprune.tracking.tracker import TAG_LENGTH

UI = "http://127.0.0.1:5000"  # where `mlflow ui` is, if it is not told otherwise
ROWS = 30  # of the ranking at most
FAILURES = 10
CAUSE = 300  # characters of one
COMPARED = 50  # trials in parallel coordinates: their link names each
PAD = "&emsp;&emsp;"
MARKS = (
    "`*` the best of its sparsity; `~` not told apart from it. In brackets: against the dense model's mean, "
    "and 95% of a paired bootstrap over lines."
)


def description(outcome: SweepOutcome) -> str:
    """The sweep in short: the best, how to export them, what failed, the ranking.

    MLflow shows the first lines until it is asked for more, so the answer comes first. It cuts what is longer than
    a tag may be, so the ranking has as many rows as there is room for.
    """
    for rows in range(min(ROWS, len(outcome.ranking)), 0, -1):
        text = _description(outcome, rows)
        if len(text) <= TAG_LENGTH:
            return text
    return _description(outcome, 0)


def comparison_link(outcome: SweepOutcome) -> str | None:
    """The page of MLflow with the best trials in parallel coordinates; of a database, as `mlflow ui` serves it.

    The axes are params that differ, by their names, and three at most: with the dense model all would differ.
    """
    uri = outcome.spec.tracking_uri
    runs = [outcome.runs[result.key] for result in outcome.ranking[:COMPARED]]
    return parallel_coordinates_link(uri if uri.startswith("http") else UI, outcome.experiment, runs)


def _description(outcome: SweepOutcome, rows: int) -> str:
    _, _, page = (comparison_link(outcome) or "").partition("#")  # holds behind a tunnel too
    headers, (dense, *trials) = ranking_cells(outcome)
    best = [row for row in trials if row[0].endswith("*")]
    parts = [f"{_told(outcome)} [Trials in parallel coordinates](#{page})"]
    parts += ["**The best of each sparsity**", _table(headers, [dense, *best]), MARKS]
    parts += ["**To export them**", _exports(outcome), *_failures(outcome)]
    parts += ["**Ranking**", _table(headers, [dense, *trials[:rows]])]
    parts += [f"... and {len(trials) - rows} more"] if rows < len(trials) else []
    return "\n\n".join(parts) + "\n"


def _told(outcome: SweepOutcome) -> str:
    """What was swept, and the answer."""
    spec, best = outcome.spec, outcome.best_by_sparsity()
    count = _counted(len(outcome.ranking) + len(outcome.failed), "trial")
    languages = _listed([language_name(code) for code in spec.evaluation.perplexity.languages])
    by = "mean" if spec.search.objective == "mean" else "worst language"
    winners = [
        f"**{escaped(result.variant.label)}** ({100 * outcome.changes[result.key][0]:+.0f}%)"
        for result in best
        if result.variant
    ]
    return (
        f"The best of {count} on **{escaped(spec.model.path)}**: {_listed(winners)}. "
        f"Figures are bits per byte of held-out lines in {languages} (lower is better); ranked by the {by}."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _exports(outcome: SweepOutcome) -> str:
    """The commands that write these checkpoints, an option a line: MLflow does not wrap them."""
    commands = []
    for result in outcome.best_by_sparsity():
        _, *words = shlex.split(export_command(outcome, result))  # the program's place is of the sweep's machine
        lines = "".join((" \\\n  " if word.startswith("--") else " ") + shlex.quote(word) for word in words)
        commands.append("mlprune" + lines)
    return "```\n" + "\n\n".join(commands) + "\n```"


def _failures(outcome: SweepOutcome) -> list[str]:
    if not outcome.failed:
        return []
    told = list(outcome.failed.items())
    lines = [f"- {escaped(label)}: {escaped(_short(cause))}" for label, cause in told[:FAILURES]]
    lines += [f"- ... and {len(told) - FAILURES} more"] if len(told) > FAILURES else []
    return [f"**{_counted(len(told), 'trial')} failed**", "\n".join(lines)]


def _short(cause: str) -> str:
    line = " ".join(cause.split())
    return line if len(line) <= CAUSE else line[: CAUSE - 3] + "..."


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """MLflow leaves no space between columns: wide headers hold them apart, or pads of the widest cells."""
    widest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[PAD + escaped(header) + PAD for header in headers], ["---"] * len(headers)]
    for row in rows:
        pads = (PAD if len(cell) == most > 8 else "" for cell, most in zip(row, widest, strict=True))
        lines.append([escaped(cell) + pad for cell, pad in zip(row, pads, strict=True)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escaped(text: str) -> str:
    """The text so that Markdown shows it as it is, in a table too."""
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}  # a backslash does not always do
    return re.sub(r"[&<>|]|[\\`*_~\[\]]", lambda found: entities.get(found[0], f"\\{found[0]}"), text)
