"""Likelihood of held-out lines, for each language: perplexity and bits per byte.

A line is scored alone: every token after one token of context (the tokenizer's beginning-of-sequence token,
else its end-of-sequence token). Perplexity is a token's, so it compares variants of one model; bits per byte
of UTF-8 text compares models with different tokenizers too. Neither compares languages with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlprune.data.calibration import EvaluationSet, evaluation_set
from mlprune.data.corpora import Corpus
from mlprune.evaluation.items import Items
from mlprune.spec.evaluation import PerplexitySpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Perplexity:
    """Held-out lines, the same in every language."""

    rows: EvaluationSet

    def answer(self, nll: Sequence[float]) -> list[Items]:
        """The lines' likelihoods, a language each; a line is named by its number in the corpus."""
        lines = self.rows.lines
        tokens = {
            row: length - 1
            for batch in self.rows.batches
            for row, length in zip(batch.rows, batch.lengths, strict=True)
        }
        of_language: dict[str, list[int]] = {}
        for row, line in enumerate(lines):
            of_language.setdefault(line.language, []).append(row)
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
            )
            for language, rows in of_language.items()
        ]


def perplexity(
    asked: PerplexitySpec,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> Perplexity:
    """The first held-out lines in each language. Raises CorpusError when there are too few, or one is too long."""
    made = evaluation_set(
        corpus, asked.languages, tokenizer, lines=asked.lines, max_positions=positions, pad_free=pad_free
    )
    return Perplexity(made)
