"""The description at the top of a sweep's MLflow page, in Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from mlprune.report.claims import claim_notes
from mlprune.report.ranking import estimate_text, legend, ranking_cells
from mlprune.report.sweep import agreement_notes, export_command, forecast_notes, language_notes
from mlprune.spec.languages import language_name
from mlprune.sweep.ranking import RankedVariant, SweepOutcome
from mlprune.tracking.lookup import parallel_coordinates_link
from mlprune.tracking.tracker import TAG_LENGTH

UI = "http://127.0.0.1:5000"  # the default address of `mlflow ui`
ROWS = 30  # most rows of the ranking
FAILURES = 10  # most failed trials listed
CAUSE = 300  # most characters of a failure's cause
COMPARED = 50  # most trials in parallel coordinates: the link contains each run id
PAD = "&emsp;&emsp;"


def description(outcome: SweepOutcome) -> str:
    """Return the page's text: the best trials, their export commands, failed trials, the ranking.

    MLflow shows only the first lines until the reader expands the text, so the result comes first. MLflow also
    truncates text longer than a tag, so the ranking has as many rows as fit.
    """
    for rows in range(min(ROWS, len(outcome.ranking)), 0, -1):
        text = _description(outcome, rows)
        if len(text) <= TAG_LENGTH:
            return text
    return _description(outcome, 0)


def comparison_link(outcome: SweepOutcome) -> str | None:
    """Return the link to the MLflow page with the best trials in parallel coordinates.

    For a database, the link is that of `mlflow ui`. The axes are the params that differ between the runs, by name,
    and three at most. The dense model is left out, because with it every param would differ.
    """
    uri = outcome.spec.tracking_uri
    runs = [outcome.runs[result.key] for result in outcome.ranking[:COMPARED]]
    return parallel_coordinates_link(uri if uri.startswith("http") else UI, outcome.experiment, runs)


def _description(outcome: SweepOutcome, rows: int) -> str:
    _, _, page = (comparison_link(outcome) or "").partition("#")  # without the host, which differs behind a tunnel
    headers, trials = ranking_cells(outcome)
    best = [row for row in trials if row[0].endswith("*")]
    marks = legend(outcome).replace("\n", " ").replace("* best", "`*` best").replace("~ not", "`~` not")
    parts = [f"{_summary(outcome)} [Trials in parallel coordinates](#{page})"]
    parts += ["**Best of each sparsity**", _table(headers, best), marks]
    parts += [
        f"- {escaped(note)}"
        for note in (*forecast_notes(outcome), *agreement_notes(outcome), *language_notes(outcome))
    ]
    if claims := claim_notes(outcome.claims):
        parts += [
            "**Claims** (on the confirmation lines, Holm-corrected)",
            *(f"- {escaped(note)}" for note in claims),
        ]
    parts += ["**Export commands**", _exports(outcome), *_failures(outcome)]
    parts += ["**Ranking**", _table(headers, trials[:rows])]
    parts += [f"... and {len(trials) - rows} more"] if rows < len(trials) else []
    return "\n\n".join(parts) + "\n"


def _summary(outcome: SweepOutcome) -> str:
    """Return what was swept, and the best trials."""
    spec, best = outcome.spec, outcome.best_by_sparsity()
    count = _counted(len(outcome.ranking) + len(outcome.failed), "trial")
    languages = _listed([language_name(code) for code in spec.evaluation.perplexity.languages])
    winners = [f"**{escaped(entry.variant.label)}** ({_winner_loss(entry)})" for entry in best]
    return (
        f"The best of {count} on **{escaped(spec.model.path)}**, by {outcome.objective}: {_listed(winners)}. "
        f"Loss is the change of bits per byte of held-out lines in {languages} against the dense model."
    )


def _winner_loss(entry: RankedVariant) -> str:
    """Return the confirmed loss of a winner; without confirmation, the loss by which it was chosen, as such."""
    if entry.confirmed:
        return f"loss {estimate_text(entry.confirmed)}, confirmed"
    return f"loss {estimate_text(entry.loss)}, not confirmed" if entry.loss else "no loss"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _exports(outcome: SweepOutcome) -> str:
    """Return the commands that export the best trials, one option per line: MLflow does not wrap long lines."""
    commands = []
    for result in outcome.best_by_sparsity():
        # without the program's path, which is only valid on the sweep's machine
        _, *words = shlex.split(export_command(outcome, result))
        lines = "".join((" \\\n  " if word.startswith("--") else " ") + shlex.quote(word) for word in words)
        commands.append("mlprune" + lines)
    return "```\n" + "\n\n".join(commands) + "\n```"


def _failures(outcome: SweepOutcome) -> list[str]:
    if not outcome.failed:
        return []
    failed = list(outcome.failed.items())
    lines = [f"- {escaped(label)}: {escaped(_short(cause))}" for label, cause in failed[:FAILURES]]
    lines += [f"- ... and {len(failed) - FAILURES} more"] if len(failed) > FAILURES else []
    return [f"**{_counted(len(failed), 'trial')} failed**", "\n".join(lines)]


def _short(cause: str) -> str:
    line = " ".join(cause.split())
    return line if len(line) <= CAUSE else line[: CAUSE - 3] + "..."


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. MLflow leaves no space between columns, so headers and widest cells are padded."""
    widest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[PAD + escaped(header) + PAD for header in headers], ["---"] * len(headers)]
    for row in rows:
        pads = (PAD if len(cell) == most > 8 else "" for cell, most in zip(row, widest, strict=True))
        lines.append([escaped(cell) + pad for cell, pad in zip(row, pads, strict=True)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escaped(text: str) -> str:
    """Escape the text, so that Markdown displays it unchanged, in tables too."""
    # entities where a backslash does not always work
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}
    return re.sub(r"[&<>|]|[\\`*_~\[\]]", lambda match: entities.get(match[0], f"\\{match[0]}"), text)
