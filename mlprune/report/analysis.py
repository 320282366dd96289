"""What calibrations do in a model."""

from __future__ import annotations

from typing import Any

from mlprune.analysis.features import ENDS, overlaps, shares, total
from mlprune.commands.analyze import Findings
from mlprune.console import results as out
from mlprune.report.tables import new_table, show_tracking
from mlprune.spec.languages import language_name
from mlprune.spec.urls import redact


def show_findings(found: Findings) -> None:
    """Each language's monolingual and translation text against each other, and where the rest is."""
    asked, values = found.question, findings_values(found)
    table = new_table(
        f"{found.spec.model.path}: mono:x against translation:{asked.pivot}-x",
        "language",
        "tops in common",
        "translation's top at mono's bottom",
        "mono's top at translation's bottom",
        "masks in common",
    )
    for code in asked.translated:
        mono, translation = asked.places(code)
        top, bottom = values["overlap"]["top"], values["overlap"]["bottom"]
        shown = (top[mono][translation], bottom[translation][mono], bottom[mono][translation])
        figures = [f"{share:.3f}" for share in (*shown, values["masks"][mono][translation])]
        table.add_row(f"{language_name(code)} ({code})", *figures)
    out.print(table)
    out.print(
        f"Top and bottom: {asked.ratio:g} of the channels by magnitude, mean over layers.\n"
        f"Masks: wanda {asked.sparsity:g}, the weights that both drop of those that either drops.",
        style="dim",
    )
    out.print(f"\nfiles      {found.output}: {', '.join(found.files)}", soft_wrap=True)
    show_tracking(found.spec)


def findings_values(found: Findings) -> dict[str, Any]:
    """The same as plain values: matrices over the conditions, means over layers, masks over all matrices."""
    asked = found.question
    means = {end: overlaps(found.magnitude_CLH, asked.ratio, end).mean(2).tolist() for end in ENDS}
    return {
        "model": found.spec.model.path,
        "conditions": list(asked.conditions),
        "layer": found.layer,
        "ratio": asked.ratio,
        "sparsity": asked.sparsity,
        "overlap": means,
        "masks": shares(total(found.shared)).tolist(),
        "files": [str(found.output / name) for name in found.files],
        "run": found.run,
        "tracking_uri": redact(found.spec.tracking_uri),
    }
