"""`mlprune trim`: a model with the tokens alone that the text of some languages needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlprune import __version__
from mlprune.commands.checkpoint import WrittenSize, check_output, write_checkpoint
from mlprune.commands.evaluate import evaluate_checkpoint
from mlprune.console import step
from mlprune.data.corpora import Corpus, calibration_lines, open_corpus, split_held_out
from mlprune.models.source import ModelSource, find_model
from mlprune.models.vocabulary import kept_tokens, tokenizer_values
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.schema import SweepSpec
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import run_on_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrimmedModel:
    """A written checkpoint, and what changed. By language: tokens and bits per byte of held-out text."""

    tokens: tuple[int, int]  # of the vocabulary: before, now
    size: WrittenSize
    dense: WrittenSize
    lengths: Mapping[str, tuple[int, int]]
    bits_per_byte: Mapping[str, tuple[float, float]]


def trim(spec: SweepSpec, output: Path) -> TrimmedModel:
    """Write the spec's model with the vocabulary of its evaluation's languages to the new folder `output`.

    The tokens are those of the corpus's lines that are not held out. Raises UserError for a mistake, before
    weights are loaded.
    """
    check_output(output, 0)
    languages = spec.evaluation.perplexity.languages
    prepared = prepare(spec, [])
    check_output(output, prepared.model_size.total)
    corpus = open_corpus(spec.calibration.corpus, languages)
    vocabulary = find_vocabulary(prepared.source, corpus)
    size = run_on_model(prepared, "writing the model", partial(_write, prepared, vocabulary, output))
    smaller = spec.model_copy(update={"model": spec.model.model_copy(update={"path": str(output)})})
    before, now = evaluate_checkpoint(spec), evaluate_checkpoint(smaller)
    lengths = [
        held_out_tokens(source.tokenizer(), corpus) for source in (prepared.source, find_model(str(output)))
    ]
    names = {language: f"bits_per_byte.{language}" for language in languages}
    return TrimmedModel(
        tokens=(prepared.model_size.vocabulary, len(vocabulary)),
        size=size,
        dense=WrittenSize.of_dense(prepared.model_size),
        lengths={language: (lengths[0][language], lengths[1][language]) for language in languages},
        bits_per_byte={language: (before[name], now[name]) for language, name in names.items()},
    )


def find_vocabulary(source: ModelSource, corpus: Corpus) -> tuple[int, ...]:
    """Return the tokens that the corpus's lines, without held-out ones, need at the start of a text and within."""
    values, tokenizer = tokenizer_values(source), source.tokenizer()
    lines = calibration_lines(corpus, 0)
    texts = [
        f"{before}{column[line]}" for column in corpus.lines.values() for line in lines for before in ("", " ")
    ]
    return kept_tokens(values, {token for ids in tokenizer(texts).input_ids for token in ids})


def held_out_tokens(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> dict[str, int]:
    """Return the number of tokens of the held-out lines, by language."""
    lines = split_held_out(corpus, confirm=False).selection
    return {
        language: sum(len(ids) for ids in tokenizer([column[line] for line in lines]).input_ids)
        for language, column in corpus.lines.items()
    }


def _write(prepared: Prepared, vocabulary: Sequence[int], output: Path, pipeline: Pipeline) -> WrittenSize:
    config = prepared.source.config()
    config.dtype = prepared.model_size.dtype
    manifest = {
        "mlprune": __version__,
        "model": {"path": prepared.spec.model.path, "fingerprint": prepared.fingerprint},
        "vocabulary": {
            "languages": list(prepared.spec.evaluation.perplexity.languages),
            "corpus": prepared.spec.calibration.corpus,
            "tokens": [prepared.model_size.vocabulary, len(vocabulary)],
        },
    }
    pieces = len(prepared.model_size.layers) + 1
    with step(f"writing {output}", "layers") as progress:
        return write_checkpoint(
            prepared.source,
            config,
            pipeline.weights(None),
            manifest,
            output,
            lambda done: progress(done, pieces),
            vocabulary,
        )
