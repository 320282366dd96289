"""The tests of a sweep's claims, as tables for the terminal and as lines for the MLflow page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mlprune.evaluation.estimates import Estimate
from mlprune.report.tables import new_table
from mlprune.sweep.claims import ClaimTest

LEGEND = (
    "difference of the loss in percentage points on the confirmation lines: below 0, the claim is right.\n"
    "In brackets: 95% CI over documents and seeds. holds, fails: significant after Holm's correction\n"
    "over this table; unknown: not significant."
)
LEGEND_LANGUAGES = "* significant after Holm's correction over the languages and sparsities of the claim."


def claims_table(tests: Sequence[ClaimTest]) -> Table:
    """Return a table of all claims at each sparsity, with the mean difference over the languages."""
    table = new_table("claims", "", "claim", "sparsity", "difference", "verdict")
    table.columns[1].justify = "left"
    for number, claim, test in _numbered(tests):
        cells = (f"{test.sparsity:.4g}", _points(test.mean.estimate), test.mean.verdict)
        table.add_row(number, claim, *cells)
    return table


def claims_by_language(tests: Sequence[ClaimTest]) -> Table | None:
    """Return a table of the differences in single languages; None if no claim is about single languages."""
    languages = list(dict.fromkeys(code for test in tests for code in test.languages))
    if not languages:
        return None
    table = new_table("claims by language", "", "sparsity", *languages)
    for number, _, test in _numbered(tests):
        if test.languages:
            table.add_row(number, f"{test.sparsity:.4g}", *(_cell(test, code) for code in languages))
    return table


def claim_notes(tests: Sequence[ClaimTest]) -> list[str]:
    """Return one line for each claim: `text: holds at 0.3, 0.5; unknown at 0.6`."""
    verdicts: dict[str, dict[str, list[str]]] = {}
    for test in tests:
        at = verdicts.setdefault(test.claim.claim, {}).setdefault(test.mean.verdict, [])
        at.append(f"{test.sparsity:.4g}")
    lines = []
    for claim, by_verdict in verdicts.items():
        parts = [f"{verdict} at {', '.join(at)}" for verdict, at in by_verdict.items()]
        lines.append(f"{claim}: {'; '.join(parts)}")
    return lines


def _numbered(tests: Sequence[ClaimTest]) -> list[tuple[str, str, ClaimTest]]:
    """Return each test with the number and the text of its claim, which are empty where they repeat."""
    rows: list[tuple[str, str, ClaimTest]] = []
    texts = list(dict.fromkeys(test.claim.claim for test in tests))
    for previous, test in zip((None, *tests), tests, strict=False):
        text = test.claim.claim
        repeats = previous is not None and previous.claim.claim == text
        rows.append(("", "", test) if repeats else (str(texts.index(text) + 1), text, test))
    return rows


def _cell(test: ClaimTest, code: str) -> str:
    if code not in test.languages:
        return ""
    one = test.languages[code]
    return f"{100 * one.estimate.value:+.2f}{'' if one.verdict == 'unknown' else '*'}"


def _points(one: Estimate) -> str:
    """Return a difference of losses in percentage points: `-1.23 [-2.01, -0.45]`."""
    return f"{100 * one.value:+.2f} [{100 * one.low:.2f}, {100 * one.high:.2f}]"
