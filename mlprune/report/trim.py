"""The table and values of `mlprune trim`. The trimming itself is in `commands.trim`."""

from __future__ import annotations

from mlprune.commands.trim import TrimmedModel
from mlprune.console import results as out
from mlprune.console import size_text
from mlprune.report.tables import new_table

MUCH_LONGER = 0.05  # share of further tokens, from which on a larger corpus is suggested


def show_trimmed(trimmed: TrimmedModel) -> None:
    """Print what was removed, and how much longer and less likely held-out text became."""
    before, now = trimmed.tokens
    dense, size = trimmed.dense, trimmed.size
    out.print(f"tokens      {before:,} before, {now:,} now ({now / before:.0%})")
    out.print(
        f"parameters  {dense.parameters / 1e6:,.1f} million before, {size.parameters / 1e6:,.1f} million now"
    )
    out.print(f"weights     {size_text(dense.bytes)} before, {size_text(size.bytes)} now")
    table = new_table("held-out text", "language", "tokens before", "now", "", "bits per byte before", "now", "")
    table.padding = (0, 1, 0, 0)  # narrow: the table has many columns
    for language, (length, longer) in trimmed.lengths.items():
        bits, worse = trimmed.bits_per_byte[language]
        table.add_row(
            language,
            f"{length:,}",
            f"{longer:,}",
            f"{longer / length - 1:+.1%}",
            f"{bits:.4f}",
            f"{worse:.4f}",
            f"{worse / bits - 1:+.2%}",
        )
    out.print(table)
    lengths = trimmed.lengths.items()
    if grown := [code for code, (length, more) in lengths if more > (1 + MUCH_LONGER) * length]:
        cause = "much longer, because the corpus lacks many words; give a larger --corpus"
        out.print(f"{', '.join(grown)}: {cause}", soft_wrap=True)
    out.print(
        "Text whose tokens were all kept is cut as before, with the same logits: its bits per byte only fall,\n"
        "because fewer tokens share the probability. Other text is cut into other tokens, and predicted worse.",
        style="dim",
        soft_wrap=True,
    )


def trimmed_values(trimmed: TrimmedModel) -> dict[str, object]:
    """Return what `show_trimmed` prints as plain values."""
    return {
        "tokens": list(trimmed.tokens),
        "size": vars(trimmed.size),
        "dense": vars(trimmed.dense),
        "held_out_tokens": {language: list(both) for language, both in trimmed.lengths.items()},
        "bits_per_byte": {language: list(both) for language, both in trimmed.bits_per_byte.items()},
    }
