"""Perplexity and bits per byte of held-out lines, for each language.

A line is scored alone: every token after one token of context (the tokenizer's beginning-of-sequence token,
else its end-of-sequence token). Perplexity is a token's, so it compares variants of one model; bits per byte
of UTF-8 text compares models with different tokenizers too. Neither compares languages with each other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlprune.data.calibration import EvaluationSet
from mlprune.shards.pipeline import Pipeline, Progress


@dataclass(frozen=True)
class LanguageScore:
    """One language's held-out lines: their negative log-likelihood in nats, tokens and bytes."""

    nll: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.tokens, 700.0))  # beyond it a float is infinite

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.bytes


def evaluate(
    pipeline: Pipeline, evaluation: EvaluationSet, variant: str | None = None, progress: Progress | None = None
) -> dict[str, LanguageScore]:
    """Score every language of the set; `variant` None is the dense model."""
    return score_lines(evaluation, pipeline.likelihood(evaluation, variant, progress))


def score_lines(evaluation: EvaluationSet, nll: Sequence[float]) -> dict[str, LanguageScore]:
    """Sum the lines' likelihoods by language."""
    tokens = {
        row: length - 1
        for batch in evaluation.batches
        for row, length in zip(batch.rows, batch.lengths, strict=True)
    }
    scores: dict[str, LanguageScore] = {}
    for row, line in enumerate(evaluation.lines):
        before = scores.get(line.language, LanguageScore(0.0, 0, 0))
        scores[line.language] = LanguageScore(
            before.nll + nll[row], before.tokens + tokens[row], before.bytes + line.bytes
        )
    return scores


def metrics(scores: Mapping[str, LanguageScore]) -> dict[str, float]:
    """`bits_per_byte.fr`, `perplexity.fr`, ..., and over the languages `bits_per_byte.mean` and `.worst`."""
    bits = {language: score.bits_per_byte for language, score in scores.items()}
    return {
        **{f"bits_per_byte.{language}": value for language, value in bits.items()},
        **{f"perplexity.{language}": score.perplexity for language, score in scores.items()},
        "bits_per_byte.mean": sum(bits.values()) / len(bits),
        "bits_per_byte.worst": max(bits.values()),
    }
