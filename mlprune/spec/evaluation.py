"""The `evaluation` section of the spec: the tasks by which every trial is evaluated."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from mlprune.errors import SpecError
from mlprune.spec.languages import language_name
from mlprune.spec.limits import absolute_path
from mlprune.spec.section import Count, Section

Seed = Annotated[int, Field(ge=0, strict=True)]


def checked_languages(values: tuple[str, ...], key: str) -> tuple[str, ...]:
    """Return each language code once. Raises SpecError, naming `key` and the place, for what is not a language."""
    for n, code in enumerate(values):
        language_name(code, f"{key}[{n}]")
    return tuple(dict.fromkeys(values))


class PerplexitySpec(Section):
    """The likelihood of held-out lines."""

    languages: Annotated[tuple[str, ...], Field(min_length=1)] = ("en", "fr", "de")
    lines: Count = 64
    confirmation_lines: Annotated[int, Field(ge=0, strict=True)] | None = None  # None: as many as `lines`

    @field_validator("languages")
    @classmethod
    def _languages(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return checked_languages(values, "evaluation.perplexity.languages")


class XnliSpec(Section):
    """XNLI by filled templates; the labels stand for entailment, neutral, contradiction."""

    languages: Annotated[tuple[str, ...], Field(min_length=1)]
    data: str = "facebook/xnli"
    items: Count | None = None
    shuffle_seed: Seed | None = None
    template: str = "{premise} , right? {label} , {hypothesis}"
    labels: Annotated[tuple[str, ...], Field(min_length=3, max_length=3)] = ("Yes", "Also", "No")

    @field_validator("languages")
    @classmethod
    def _languages(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return checked_languages(values, "evaluation.xnli.languages")


class ReviewsSpec(Section):
    """Sentiment of reviews by filled templates; the labels stand for negative, positive."""

    languages: Annotated[tuple[str, ...], Field(min_length=1)]
    data: str
    items: Count | None = None
    shuffle_seed: Seed | None = None
    max_words: Count | None = None
    template: str = "{review} It is {label}"
    labels: Annotated[tuple[str, ...], Field(min_length=2, max_length=2)] = ("negative", "positive")

    @field_validator("languages")
    @classmethod
    def _languages(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return checked_languages(values, "evaluation.reviews.languages")


class TranslationSpec(Section):
    """Few-shot greedy translation of held-out lines of the calibration corpus."""

    pairs: Annotated[tuple[str, ...], Field(min_length=1)]
    shots: Count = 4
    lines: Count = 32
    max_new_tokens: Count = 96

    @field_validator("pairs")
    @classmethod
    def _pairs(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for n, pair in enumerate(values):
            key, codes = f"evaluation.translation.pairs[{n}]", pair.split("-")
            if len(set(codes)) != 2 or len(codes) != 2:
                raise SpecError(key, repr(pair), "write two languages, source first, e.g. fr-en")
            for code in codes:
                language_name(code, key)
        return tuple(dict.fromkeys(values))


class EvaluationSpec(Section):
    """The tasks by which every trial is evaluated."""

    perplexity: PerplexitySpec = PerplexitySpec()
    xnli: XnliSpec | None = None
    reviews: ReviewsSpec | None = None
    translation: TranslationSpec | None = None
    tasks: tuple[str, ...] = ()  # names of lm-evaluation-harness
    task_path: str | None = None
    task_items: Count | None = None

    @field_validator("tasks")
    @classmethod
    def _unique(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    @field_validator("task_path")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else absolute_path(value, "evaluation.task_path")
