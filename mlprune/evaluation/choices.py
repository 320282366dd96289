"""Choice tasks, XNLI and reviews: the answer to a question is the most likely of its filled templates.

This is the method of Kim et al. (2024, arXiv 2409.16911), after XGLM (Lin et al. 2022, arXiv 2112.10668): a
question's texts and each label in turn fill one template, and the label whose template has the highest mean
log-probability per token is the answer. The mean is over all tokens of the filled template, the first one
included: one token of context (`data.special_tokens.context_id`) stands before it.

Departures from the paper's code: it takes the context token only from tokenizers that add one (XGLM's does), so
that with others (BLOOM, mGPT) the first token of a template is not scored; it divides by one token more than it
scores; and where a batch is padded on the left (BLOOM), it scores the first token after padding tokens.

A review that is longer than the model's positions loses whole tokens at its beginning, the same number for every
label. The label therefore always remains, and all labels are scored on the same text.

Reading the questions is in `data.questions`, the accuracy in `items`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlprune.data.batches import RowSet, build_row_set
from mlprune.data.questions import INFERENCE, SENTIMENT, Form, Question, open_questions
from mlprune.data.special_tokens import context_id, pad_id
from mlprune.errors import CorpusError, SpecError
from mlprune.evaluation.items import Items
from mlprune.spec.evaluation import ReviewsSpec, XnliSpec
from mlprune.spec.templates import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "\0"  # replaces a text, to find what stands before it
_Questions = Mapping[str, Sequence[Question]]  # by language


@dataclass(frozen=True, eq=False)
class Choices:
    """A likelihood task with one row per filled template.

    The rows are ordered by language, then question, then label. The key of `rows` covers the right answers too.
    """

    task: str
    rows: RowSet
    questions: _Questions
    tokens: tuple[int, ...]  # number of tokens of each row, without the context token
    labels: int

    def items(self, nll: Sequence[float]) -> list[Items]:
        """Return one Items per language; a score is the mean log-probability, in nats, of a template's tokens.

        `nll`: negative log-likelihood of each row, in nats.
        """
        means = iter([-value / tokens for value, tokens in zip(nll, self.tokens, strict=True)])
        return [
            Items(
                self.task,
                language,
                "choice",
                ids=tuple(question.id for question in questions),
                columns={
                    "scores": tuple([next(means) for _ in range(self.labels)] for _ in questions),
                    "answer": tuple(question.answer for question in questions),
                },
            )
            for language, questions in self.questions.items()
        ]


def build_xnli(
    spec: XnliSpec, tokenizer: PreTrainedTokenizerBase, positions: int | None, pad_free: bool
) -> Choices:
    """Build the task of natural language inference.

    `positions`: the longest row that the model accepts, in tokens; `pad_free`: see `data.batches.micro_batches`.
    Raises SpecError for a template that cannot be filled, CorpusError when data are missing, malformed or too
    long, ModelError when the tokenizer has no token to begin with.
    """
    key = "evaluation.xnli"
    questions = _open(spec, INFERENCE, key)
    filled = _fill(spec, questions, tokenizer)
    if positions is not None:
        _check_fit(spec, questions, filled, positions)
    return _choices("xnli", spec, questions, filled, tokenizer, pad_free)


def build_reviews(
    spec: ReviewsSpec, tokenizer: PreTrainedTokenizerBase, positions: int | None, pad_free: bool
) -> Choices:
    """Build the task of negative or positive reviews, long ones cut. Arguments and errors as in `build_xnli`."""
    questions = _open(spec, SENTIMENT, "evaluation.reviews")
    if (words := spec.max_words) is not None:
        questions = {
            language: [_shortened(question, words) for question in in_language]
            for language, in_language in questions.items()
        }
    filled = _fill(spec, questions, tokenizer)
    if positions is not None:
        filled = _cut(spec, filled, tokenizer, positions - 1)
    return _choices("reviews", spec, questions, filled, tokenizer, pad_free)


def _open(spec: XnliSpec | ReviewsSpec, form: Form, key: str) -> _Questions:
    check_template(spec.template, f"{key}.template", (*form.columns, "label"))
    return {
        language: open_questions(spec.data, language, form, spec.items, key, spec.shuffle_seed)
        for language in spec.languages
    }


def _shortened(question: Question, words: int) -> Question:
    """Return a review cut after `words` words, as in the paper's code. White space separates words.

    Japanese and Chinese reviews mostly have none, so they stay whole.
    """
    return replace(question, texts={"review": " ".join(question.texts["review"].split()[:words])})


def _fill(
    spec: XnliSpec | ReviewsSpec, questions: _Questions, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Return the tokens of every filled template, by language, question, label."""
    rows: list[list[int]] = []
    for in_language in questions.values():
        texts = [
            spec.template.format(**question.texts, label=label)
            for question in in_language
            for label in spec.labels
        ]
        rows += tokenizer(texts, add_special_tokens=False).input_ids
    return rows


def _check_fit(spec: XnliSpec, questions: _Questions, filled: Sequence[Sequence[int]], positions: int) -> None:
    names = (
        (language, question.id)
        for language, in_language in questions.items()
        for question in in_language
        for _ in spec.labels
    )
    for (language, name), ids in zip(names, filled, strict=True):
        if len(ids) >= positions:
            remedy = f"{language}: question {name} is {len(ids) + 1} tokens with its context; the model takes "
            raise CorpusError("evaluation.xnli.data", repr(spec.data), f"{remedy}{positions}: shorten it")


def _cut(
    spec: ReviewsSpec, filled: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[list[int]]:
    """Drop tokens from the beginning of each review until all its rows have at most `limit` tokens."""
    before = [
        spec.template.format(review=_PLACEHOLDER, label=label).partition(_PLACEHOLDER)[0] for label in spec.labels
    ]
    # a space is tokenised together with the review's first word
    heads = [len(tokenizer(text.rstrip(" "), add_special_tokens=False).input_ids) for text in before]
    empty = max(
        len(tokenizer(spec.template.format(review="", label=label), add_special_tokens=False).input_ids)
        for label in spec.labels
    )
    if empty >= limit:
        remedy = f"is {empty} tokens without a review; the model takes {limit + 1}: shorten it"
        raise SpecError("evaluation.reviews.template", repr(spec.template), remedy)
    rows = []
    for start in range(0, len(filled), len(heads)):
        of_review = filled[start : start + len(heads)]
        excess = max(0, max(map(len, of_review)) - limit)
        rows += [ids[:head] + ids[head + excess :] for head, ids in zip(heads, of_review, strict=True)]
    return rows


def _choices(
    task: str,
    spec: XnliSpec | ReviewsSpec,
    questions: _Questions,
    filled: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    pad_free: bool,
) -> Choices:
    context = context_id(tokenizer)
    rows = build_row_set([[context, *ids] for ids in filled], [1] * len(filled), pad_id(tokenizer), pad_free)
    answers = [
        [language, [[question.id, question.answer] for question in in_language]]
        for language, in_language in questions.items()
    ]
    # the answers are part of the key, because a corrected answer changes no token
    key = hashlib.sha256(json.dumps([rows.key, task, answers]).encode()).hexdigest()[:32]
    tokens = tuple(len(ids) for ids in filled)
    return Choices(task, replace(rows, key=key), questions, tokens, len(spec.labels))
