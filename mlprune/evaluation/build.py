"""Builds the evaluation suites from a spec.

Mistakes in the spec's evaluation section raise here, before a model is loaded. The tasks are in other modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlprune.data.corpora import Corpus, calibration_lines, measuring_lines, split_held_out
from mlprune.data.lossless import warn_of_lost_characters
from mlprune.evaluation.choices import build_reviews, build_xnli
from mlprune.evaluation.knowledge import compressed_bits_per_byte
from mlprune.evaluation.perplexity import build_perplexity, held_out_lines, in_blocks
from mlprune.evaluation.suite import LikelihoodTask, PipelineTask, Suite
from mlprune.evaluation.translation import build_translation
from mlprune.spec.evaluation import EvaluationSpec
from mlprune.spec.schema import SweepSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MEASURING_LINES = 8  # per language; each layer of the model is evaluated on them


def required_languages(evaluation: EvaluationSpec) -> tuple[str, ...]:
    """Return the languages that the calibration corpus must have for the evaluation."""
    pairs = evaluation.translation.pairs if evaluation.translation else ()
    return tuple(
        dict.fromkeys((*evaluation.perplexity.languages, *(code for pair in pairs for code in pair.split("-"))))
    )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What trials are evaluated by.

    All trials run `selection`, which is the same as all `blocks` one after another: block by block, more held-out
    lines, and in the last one the other tasks. The best ones also run `confirmation`; None: it is switched off.
    """

    selection: Suite
    blocks: tuple[Suite, ...]
    confirmation: Suite | None
    compressed_bits: Mapping[str, float]  # language -> bits per byte of a compressor


def build_evaluation(
    spec: SweepSpec,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> Evaluation:
    """Read and tokenise the data of all tasks of the spec.

    `positions`: the longest row that the model accepts, in tokens. `pad_free`: see `data.batches.micro_batches`.
    Raises UserError for the first mistake.
    """
    perplexity = spec.evaluation.perplexity
    lines = held_out_lines(perplexity, corpus)
    for code in perplexity.languages:
        warn_of_lost_characters(code, [corpus.lines[code][line] for line in lines.selection], tokenizer)

    def likelihood_of(part: Sequence[int]) -> LikelihoodTask:
        return build_perplexity(perplexity, corpus, part, tokenizer, positions, pad_free)

    blocks = [likelihood_of(block) for block in in_blocks(lines.selection)]
    choices: list[LikelihoodTask] = []
    if spec.evaluation.xnli is not None:
        choices.append(build_xnli(spec.evaluation.xnli, tokenizer, positions, pad_free))
    if spec.evaluation.reviews is not None:
        choices.append(build_reviews(spec.evaluation.reviews, tokenizer, positions, pad_free))
    others = _pipeline_tasks(spec, corpus, tokenizer, positions, pad_free)
    return Evaluation(
        selection=Suite((*blocks, *choices), others),
        blocks=(*(Suite((block,)) for block in blocks[:-1]), Suite((blocks[-1], *choices), others)),
        confirmation=Suite((likelihood_of(lines.confirmation),)) if lines.confirmation else None,
        compressed_bits=_compressed_bits(corpus, perplexity.languages, lines.selection),
    )


def build_measuring(
    spec: SweepSpec,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> Suite:
    """Return the likelihood of a few calibration lines in each language, on which single layers are measured.

    They are not held out, so that an allocation is chosen without the lines that trials are ranked by.
    """
    lines = measuring_lines(corpus, MEASURING_LINES)
    perplexity = spec.evaluation.perplexity
    return Suite((build_perplexity(perplexity, corpus, lines, tokenizer, positions, pad_free),))


def _compressed_bits(corpus: Corpus, languages: Sequence[str], selection: Sequence[int]) -> dict[str, float]:
    """Return the bits per byte of a compressor that has seen all text for calibration."""
    training = calibration_lines(corpus, seed=0)
    return {
        code: compressed_bits_per_byte(
            [corpus.lines[code][line] for line in training], [corpus.lines[code][line] for line in selection]
        )
        for code in languages
    }


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
            selection=split_held_out(corpus, confirm=evaluation.perplexity.confirmation_lines != 0).selection,
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
