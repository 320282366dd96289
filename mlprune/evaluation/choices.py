"""Questions answered by the likeliest of their filled templates: XNLI and reviews, as Kim et al. score them.

Kim et al. (2024, arXiv 2409.16911), after XGLM (Lin et al. 2022, arXiv 2112.10668): a question's texts and each
label in turn fill one template, and the label whose template has the highest mean log-probability of its tokens is
the answer. The mean is over all tokens of the filled template, the first one included: one token of context (the
beginning-of-sequence token, else the end-of-sequence token) stands before it.

A review that is longer than the model's positions loses whole tokens at its beginning, the same number for every
label: so the label is still there, and all labels are asked about the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlprune.data.calibration import RowSet, context_id, pad_id, row_set
from mlprune.data.questions import INFERENCE, SENTIMENT, Form, Question, open_questions
from mlprune.errors import CorpusError, SpecError
from mlprune.evaluation.items import Items
from mlprune.spec.evaluation import ReviewsSpec, XnliSpec
from mlprune.spec.templates import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\0"  # in place of a text, to see what stands before it
_Questions = Mapping[str, Sequence[Question]]  # by language


@dataclass(frozen=True, eq=False)
class Choices:
    """A task whose questions are answered by the likeliest of their filled templates.

    `rows` holds them by language, by question, by label; its key covers the right answers too.
    """

    task: str
    rows: RowSet
    questions: _Questions
    tokens: tuple[int, ...]  # of each row, without the one of context
    labels: int

    def answer(self, nll: Sequence[float]) -> list[Items]:
        """A language each; a score is the mean log-probability, in nats, of a filled template's tokens."""
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


def xnli(asked: XnliSpec, tokenizer: PreTrainedTokenizerBase, positions: int | None, pad_free: bool) -> Choices:
    """Natural language inference. `positions`: tokens that the model takes at most; `pad_free`: see `row_set`.

    Raises SpecError for a template that cannot be filled, CorpusError when data are wanting, malformed or too
    long, ModelError when the tokenizer has no token to begin with.
    """
    key = "evaluation.xnli"
    questions = _opened(asked, INFERENCE, key)
    filled = _filled(asked, questions, tokenizer)
    if positions is not None:
        _check_fit(asked, questions, filled, positions)
    return _choices("xnli", asked, questions, filled, tokenizer, pad_free)


def reviews(
    asked: ReviewsSpec, tokenizer: PreTrainedTokenizerBase, positions: int | None, pad_free: bool
) -> Choices:
    """Whether reviews are negative or positive. Arguments and errors as those of `xnli`; long reviews are cut."""
    questions = _opened(asked, SENTIMENT, "evaluation.reviews")
    filled = _filled(asked, questions, tokenizer)
    if positions is not None:
        filled = _cut(asked, filled, tokenizer, positions - 1)
    return _choices("reviews", asked, questions, filled, tokenizer, pad_free)


def _opened(asked: XnliSpec | ReviewsSpec, form: Form, key: str) -> _Questions:
    check_template(asked.template, f"{key}.template", (*form.columns, "label"))
    return {language: open_questions(asked.data, language, form, asked.items, key) for language in asked.languages}


def _filled(
    asked: XnliSpec | ReviewsSpec, questions: _Questions, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Tokens of every filled template, by language, question, label."""
    rows: list[list[int]] = []
    for of_language in questions.values():
        texts = [
            asked.template.format(**question.texts, label=label)
            for question in of_language
            for label in asked.labels
        ]
        rows += tokenizer(texts, add_special_tokens=False).input_ids
    return rows


def _check_fit(asked: XnliSpec, questions: _Questions, filled: Sequence[Sequence[int]], positions: int) -> None:
    about = ((code, one.id) for code, these in questions.items() for one in these for _ in asked.labels)
    for (language, name), ids in zip(about, filled, strict=True):
        if len(ids) >= positions:
            remedy = f"{language}: question {name} is {len(ids) + 1} tokens with its context; the model takes "
            raise CorpusError("evaluation.xnli.data", repr(asked.data), f"{remedy}{positions}: shorten it")


def _cut(
    asked: ReviewsSpec, filled: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, room: int
) -> list[list[int]]:
    """The rows with as many tokens dropped from the review's beginning as leaves `room` for all of its labels."""
    before = [asked.template.format(review=_MARK, label=label).partition(_MARK)[0] for label in asked.labels]
    # a space goes with the review's first word
    heads = [len(tokenizer(text.rstrip(" "), add_special_tokens=False).input_ids) for text in before]
    empty = max(
        len(tokenizer(asked.template.format(review="", label=label), add_special_tokens=False).input_ids)
        for label in asked.labels
    )
    if empty >= room:
        remedy = f"is {empty} tokens without a review; the model takes {room + 1}: shorten it"
        raise SpecError("evaluation.reviews.template", repr(asked.template), remedy)
    rows = []
    for start in range(0, len(filled), len(heads)):
        of_review = filled[start : start + len(heads)]
        over = max(0, max(map(len, of_review)) - room)
        rows += [ids[:head] + ids[head + over :] for head, ids in zip(heads, of_review, strict=True)]
    return rows


def _choices(
    task: str,
    asked: XnliSpec | ReviewsSpec,
    questions: _Questions,
    filled: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    pad_free: bool,
) -> Choices:
    context = context_id(tokenizer)
    rows = row_set([[context, *ids] for ids in filled], [1] * len(filled), pad_id(tokenizer), pad_free)
    about = [[language, [[one.id, one.answer] for one in these]] for language, these in questions.items()]
    # a right answer that is corrected changes no token
    key = hashlib.sha256(json.dumps([rows.key, task, about]).encode()).hexdigest()[:32]
    tokens = tuple(len(ids) for ids in filled)
    return Choices(task, replace(rows, key=key), questions, tokens, len(asked.labels))
