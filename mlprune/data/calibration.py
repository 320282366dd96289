"""Calibration sets: prompts of demonstrations, or files of code, as token batches with a manifest.

A prompt is tokenised as `tokenizer(text, truncation=True, max_length=max_tokens)`, with nothing added, so that a
manifest of line numbers is enough for anyone to make the same tokens. The paper's code (Kim et al. 2024, arXiv
2409.16911) pads every prompt to the full length and calls the model without a mask, so that padding is attended
to and counted; here that is the option `count_padding`, off by default. Otherwise rows are padded only to the
longest row of their micro-batch, and each batch records the lengths of its rows.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mlprune.data.batches import Batch, content_key, micro_batches
from mlprune.data.code import CodeFiles
from mlprune.data.corpora import Corpus
from mlprune.data.demonstrations import build_prompt, sample_files, sample_lines
from mlprune.data.special_tokens import line_end, pad_id, tokenizer_error
from mlprune.spec.calibrations import Demonstration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Only this many characters of a file of code are tokenised for each token that is kept: a token has three or four
# characters, so the ids are those of the whole file, at a fraction of the time.
CODE_CHARACTERS = 64


@dataclass(frozen=True)
class Prompt:
    """One calibration prompt, and where its text comes from: lines of a corpus, or a file of code."""

    kind: str  # the demonstration, e.g. translation:en-fr
    corpus: str  # name of the corpus, or of the code
    ids: tuple[int, ...]  # token ids, without padding
    lines: tuple[int, ...] = ()  # line numbers in the corpus, from 1
    source: str = ""  # code only: path of the file, or number of the row
    sha256: str = ""  # code only: hash of the file's whole text, in hex

    def manifest(self) -> dict[str, object]:
        """Return what is needed to make the prompt again: plain values for JSON."""
        lines = {"lines": list(self.lines)}
        file = {"source": self.source, "sha256": self.sha256}
        origin = file if self.kind == "code" else lines
        return {"corpus": self.corpus, "kind": self.kind, **origin, "tokens": len(self.ids)}


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Prompts as token batches. `key` is a content hash of token ids and batch layout."""

    prompts: tuple[Prompt, ...]
    batches: tuple[Batch, ...]
    key: str

    @property
    def tokens(self) -> int:
        """The number of tokens that count. Padding is ignored, unless the set was built with `count_padding`."""
        return sum(batch.tokens for batch in self.batches)


def build_calibration_set(
    corpus: Corpus | None,
    demonstration: Demonstration,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    shots: int,
    max_tokens: int,
    seed: int,
    pad_free: bool = False,
    template: str = "{language}: {text}",
    separator: str | None = None,
    count_padding: bool = False,
    code: CodeFiles | None = None,
) -> CalibrationSet:
    """Build `samples` prompts of at most `max_tokens` tokens: lines of `corpus`, or a file of `code`, each.

    Each line is formatted with `template` (see `check_template`) and followed by `separator`; None means the
    tokenizer's end-of-sequence token. `count_padding` does what the paper's code does: prompts are padded to
    `max_tokens` on the tokenizer's side, and padding counts as tokens. `pad_free`: see `micro_batches`.

    Raises CorpusError when there are too few lines or files, or a language is missing; ModelError when the
    tokenizer lacks the end-of-sequence token, or a token to pad with.
    """

    def tokenize(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, truncation=True, max_length=max_tokens).input_ids)

    if demonstration.kind == "code":
        assert code is not None
        prompts = _code_prompts(code, samples, seed, max_tokens, tokenize)
    else:
        assert corpus is not None
        ends = line_end(tokenizer) if separator is None else separator
        text_of = partial(build_prompt, corpus, demonstration, template=template, separator=ends)
        prompts = [
            Prompt(str(demonstration), corpus.name, tokenize(text_of(lines)), tuple(line + 1 for line in lines))
            for lines in sample_lines(corpus, samples, shots, seed)
        ]
    rows = [prompt.ids for prompt in prompts]
    if count_padding:
        rows = _padded(rows, max_tokens, tokenizer)
    batches = micro_batches(rows, pad_id(tokenizer), pad_free)
    return CalibrationSet(tuple(prompts), batches, content_key(batches))


def _code_prompts(
    code: CodeFiles, samples: int, seed: int, max_tokens: int, tokenize: Callable[[str], tuple[int, ...]]
) -> list[Prompt]:
    prompts = []
    for source, text in sample_files(code, samples, seed):
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        prompts.append(
            Prompt("code", code.name, tokenize(text[: CODE_CHARACTERS * max_tokens]), (), source, sha256)
        )
    return prompts


def _padded(
    rows: Sequence[tuple[int, ...]], max_tokens: int, tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[int, ...]]:
    """Pad as `tokenizer(..., padding="max_length")` does, but never add a padding token to the vocabulary."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise tokenizer_error(tokenizer, "has no token to pad with, which calibration.count_padding needs")
    pads = [(pad_id(tokenizer),) * (max_tokens - len(row)) for row in rows]
    left = tokenizer.padding_side == "left"
    return [pad + row if left else row + pad for pad, row in zip(pads, rows, strict=True)]
