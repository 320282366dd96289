"""The evaluation section of a spec, to the tasks that a model is asked; every mistake in it is answered here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlprune.data.corpora import Corpus
from mlprune.evaluation.choices import reviews, xnli
from mlprune.evaluation.perplexity import perplexity
from mlprune.evaluation.suite import Asking, Scored, Suite
from mlprune.evaluation.translation import translation
from mlprune.spec.evaluation import EvaluationSpec
from mlprune.spec.schema import SweepSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def asked_languages(asked: EvaluationSpec) -> tuple[str, ...]:
    """The languages that the calibration corpus must have for the evaluation."""
    pairs = asked.translation.pairs if asked.translation else ()
    return tuple(
        dict.fromkeys((*asked.perplexity.languages, *(code for pair in pairs for code in pair.split("-"))))
    )


def suite_of(
    spec: SweepSpec,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> Suite:
    """The tasks of the spec, their data read and tokenised. Raises UserError for the first mistake in them."""
    asked, calibration = spec.evaluation, spec.calibration
    scored: list[Scored] = [perplexity(asked.perplexity, corpus, tokenizer, positions, pad_free)]
    if asked.xnli is not None:
        scored.append(xnli(asked.xnli, tokenizer, positions, pad_free))
    if asked.reviews is not None:
        scored.append(reviews(asked.reviews, tokenizer, positions, pad_free))
    asking: list[Asking] = []
    if asked.translation is not None:
        made = translation(
            asked.translation,
            corpus,
            tokenizer,
            positions,
            seed=calibration.seed,
            template=calibration.template,
            separator=calibration.separator,
        )
        asking.append(made)
    if asked.tasks:
        from mlprune.evaluation.harness import harness  # seconds of imports

        asking.append(harness(asked.tasks, asked.task_path, asked.task_items, tokenizer, positions, pad_free))
    return Suite(tuple(scored), tuple(asking))
