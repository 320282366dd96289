"""A picture of tested claims: each difference with its interval, a row per claim, a colour per sparsity."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import matplotlib as mpl
import numpy as np

from mlprune.analysis.figures import legend_entry, panel_grid, write_png
from mlprune.evaluation.estimates import Estimate

WIDTH, ROW_HEIGHT, MARGINS = 9.5, 0.46, 1.7  # inches
WORDS = 46  # characters of a line of a claim
LINEAR = 2.0  # percentage points around zero that are drawn linearly; beyond, logarithmically
SPREAD = 0.24  # rows between two sparsities of a claim
TICKS = (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100)  # percentage points


@dataclass(frozen=True)
class ClaimPoint:
    """A claim at one sparsity. The difference is of losses: below 0 the claim is right."""

    claim: str
    sparsity: float
    difference: Estimate
    significant: bool


def draw_claims(points: Sequence[ClaimPoint], title: str, file: Path) -> None:
    """Draw the differences of all claims as PNG; hollow markers are not significant.

    The axis is linear within 2 percentage points and logarithmic beyond, because comparisons with a destroyed
    model are a hundred times as large as those between two good ones.
    """
    claims = list(dict.fromkeys(point.claim for point in points))
    sparsities = sorted({point.sparsity for point in points})
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(sparsities)))
    colors = dict(zip(sparsities, shades, strict=True))
    figure, (panel,) = panel_grid(1, 1, (WIDTH, ROW_HEIGHT * len(claims)), MARGINS)
    for point in points:
        beside = SPREAD * (sparsities.index(point.sparsity) - (len(sparsities) - 1) / 2)
        row, color, one = claims.index(point.claim) + beside, colors[point.sparsity], point.difference
        panel.hlines(row, 100 * one.low, 100 * one.high, color=color, linewidth=1.6)
        face = color if point.significant else "white"
        panel.plot(100 * one.value, row, "o", color=color, markerfacecolor=face, markersize=5)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_xscale("symlog", linthresh=LINEAR)
    start, end = panel.get_xlim()
    ticks = [tick for tick in TICKS if start <= tick <= end]
    panel.set_xticks(ticks, [f"{tick:+}" if tick else "0" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("difference of the loss, percentage points (left of 0, the claim is right)")
    labels = ["\n".join(wrap(f"{number}. {claim}", WORDS)) for number, claim in enumerate(claims, start=1)]
    panel.set_yticks(range(len(claims)), labels, fontsize=8)
    panel.set_ylim(len(claims) - 0.4, -0.6)
    panel.grid(axis="x", alpha=0.3)
    for row in range(1, len(claims)):
        panel.axhline(row - 0.5, color="0.9", linewidth=0.6)
    entries = [legend_entry(f"sparsity {sparsity:.4g}", color, "o") for sparsity, color in colors.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)
    write_png(figure, f"{title}\nfilled: significant (Holm-corrected over all claims); lines: 95% CI", file)
