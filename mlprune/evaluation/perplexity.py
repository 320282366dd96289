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
from mlprune.data.corpora import Corpus
from mlprune.data.heldout import Line, build_heldout_rows
from mlprune.evaluation.items import Items
from mlprune.spec.evaluation import PerplexitySpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> Perplexity:
    """Take the first held-out lines in each language.

    `positions`: the longest row that the model accepts, in tokens. Raises CorpusError when there are too few lines
    or one is too long.
    """
    rows, lines = build_heldout_rows(
        corpus, spec.languages, tokenizer, lines=spec.lines, max_positions=positions, pad_free=pad_free
    )
    return Perplexity(rows, lines, corpus.named_documents(line.number - 1 for line in lines))
