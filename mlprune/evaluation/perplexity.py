"""Likelihood of held-out lines, per language, from which perplexity and bits per byte follow.

A line is scored alone: every token after one token of context (the tokenizer's beginning-of-sequence token, else
its end-of-sequence token). Perplexity is per token, so it compares variants of one model; bits per byte of UTF-8
text compares models with different tokenizers too. Neither compares languages with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlprune.data.batches import RowSet
from mlprune.data.corpora import Corpus, HeldOutLines, split_held_out
from mlprune.data.heldout import Line, build_heldout_rows
from mlprune.errors import CorpusError
from mlprune.evaluation.items import Items
from mlprune.spec.evaluation import PerplexitySpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "evaluation.perplexity"
FIRST_BLOCK = 8  # lines a language


@dataclass(frozen=True, eq=False)
class Perplexity:
    """A likelihood task: held-out lines, the same in every language."""

    rows: RowSet
    lines: tuple[Line, ...]  # the line of each row
    documents: tuple[str, ...]  # the document of each row; empty if the corpus names none

    def items(self, nll: Sequence[float]) -> list[Items]:
        """Return the lines' likelihoods, one Items per language; the id of a line is its number in the corpus.

        `nll`: negative log-likelihood of each row, in nats.
        """
        lines = self.lines
        tokens = {
            row: length - 1
            for batch in self.rows.batches
            for row, length in zip(batch.rows, batch.lengths, strict=True)
        }
        rows_by_language: dict[str, list[int]] = {}
        for row, line in enumerate(lines):
            rows_by_language.setdefault(line.language, []).append(row)
        return [
            Items(
                "perplexity",
                language,
                "likelihood",
                ids=tuple(str(lines[row].number) for row in rows),
                columns={
                    "nll": tuple(nll[row] for row in rows),
                    "tokens": tuple(tokens[row] for row in rows),
                    "bytes": tuple(lines[row].bytes for row in rows),
                },
                documents=tuple(self.documents[row] for row in rows) if self.documents else (),
            )
            for language, rows in rows_by_language.items()
        ]


def build_perplexity(
    spec: PerplexitySpec,
    corpus: Corpus,
    lines: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> Perplexity:
    """Take `lines` of the corpus (from 0) in each language.

    `positions`: the longest row that the model accepts, in tokens. Raises CorpusError when a line is too long.
    """
    rows, line_of_row = build_heldout_rows(
        corpus, spec.languages, tokenizer, lines=lines, max_positions=positions, pad_free=pad_free
    )
    return Perplexity(rows, line_of_row, corpus.named_documents(line.number - 1 for line in line_of_row))


def held_out_lines(spec: PerplexitySpec, corpus: Corpus) -> HeldOutLines:
    """Return the lines (from 0) that the spec requests for selection and for confirmation.

    Raises CorpusError when there are too few.
    """
    kept = split_held_out(corpus, confirm=spec.confirmation_lines != 0)
    has = f"the corpus {corpus.name!r} of {len(corpus)} lines has"
    if spec.lines > len(kept.selection):
        whole = len(kept.selection) + len(kept.confirmation)
        instead = (
            "" if not kept.confirmation else f", or {KEY}.confirmation_lines=0 to use all {whole} held-out lines"
        )
        remedy = f"{has} {len(kept.selection)} for selection; use a smaller number{instead}"
        raise CorpusError(f"{KEY}.lines", spec.lines, remedy)
    confirmation = min(spec.lines, len(kept.confirmation))
    if spec.confirmation_lines is not None:
        confirmation = spec.confirmation_lines
    if confirmation > len(kept.confirmation):
        remedy = f"{has} {len(kept.confirmation)} for confirmation; use a smaller number, or 0"
        raise CorpusError(f"{KEY}.confirmation_lines", confirmation, remedy)
    return HeldOutLines(kept.selection[: spec.lines], kept.confirmation[:confirmation])


def in_blocks(lines: Sequence[int]) -> list[Sequence[int]]:
    """Cut the lines into blocks: the first has FIRST_BLOCK lines, the others twice as many as the one before.

    The last block has what is left: at least as many lines as the one before, and less than four times as many.
    Racing drops trials after each block. The lines are tokenised and padded block by block even without racing, so
    that a trial has bit-identical results whether it raced or not.
    """
    blocks, start, size = [], 0, FIRST_BLOCK
    while start < len(lines):
        rest = len(lines) - start
        # a last block that is shorter than this one would save little
        end = start + (size if rest >= 2 * size else rest)
        blocks.append(lines[start:end])
        start, size = end, 2 * size
    return blocks
