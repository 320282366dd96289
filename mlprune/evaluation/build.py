"""Builds the evaluation suite from a spec.

Mistakes in the spec's evaluation section raise here, before a model is loaded. The tasks are in other modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlprune.data.corpora import Corpus
from mlprune.evaluation.choices import build_reviews, build_xnli
from mlprune.evaluation.perplexity import build_perplexity
from mlprune.evaluation.suite import LikelihoodTask, PipelineTask, Suite
from mlprune.evaluation.translation import build_translation
from mlprune.spec.evaluation import EvaluationSpec
from mlprune.spec.schema import SweepSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def required_languages(evaluation: EvaluationSpec) -> tuple[str, ...]:
    """Return the languages that the calibration corpus must have for the evaluation."""
    pairs = evaluation.translation.pairs if evaluation.translation else ()
    return tuple(
        dict.fromkeys((*evaluation.perplexity.languages, *(code for pair in pairs for code in pair.split("-"))))
    )


def build_suite(
    spec: SweepSpec,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> Suite:
    """Read and tokenise the data of all tasks of the spec.

    `positions`: the longest row that the model accepts, in tokens. `pad_free`: see `data.batches.micro_batches`.
    Raises UserError for the first mistake.
    """
    evaluation = spec.evaluation
    likelihood: list[LikelihoodTask] = [
        build_perplexity(evaluation.perplexity, corpus, tokenizer, positions, pad_free)
    ]
    if evaluation.xnli is not None:
        likelihood.append(build_xnli(evaluation.xnli, tokenizer, positions, pad_free))
    if evaluation.reviews is not None:
        likelihood.append(build_reviews(evaluation.reviews, tokenizer, positions, pad_free))
    return Suite(tuple(likelihood), _pipeline_tasks(spec, corpus, tokenizer, positions, pad_free))


def _pipeline_tasks(
    spec: SweepSpec,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> tuple[PipelineTask, ...]:
    evaluation, calibration = spec.evaluation, spec.calibration
    tasks: list[PipelineTask] = []
    if evaluation.translation is not None:
        translation = build_translation(
            evaluation.translation,
            corpus,
            tokenizer,
            positions,
            seed=calibration.seed,
            template=calibration.template,
            separator=calibration.separator,
        )
        tasks.append(translation)
    if evaluation.tasks:
        from mlprune.evaluation.harness.loading import build_harness  # takes seconds to import

        tasks.append(
            build_harness(
                evaluation.tasks, evaluation.task_path, evaluation.task_items, tokenizer, positions, pad_free
            )
        )
    return tuple(tasks)
