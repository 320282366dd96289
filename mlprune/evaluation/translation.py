"""Few-shot translation of held-out lines, generated greedily, as Kim et al. (2024, arXiv 2409.16911) evaluate it.

A prompt has the format of calibration's translation demonstrations, with the same template and separator:

    French: <line><eos>English: <line><eos> ... French: <line to translate><eos>English:

The space before the answer is left to the model, since most tokenizers put it into the answer's first token. The
shots are the same for all lines of all pairs: the first calibration lines in the order of the seed, never held-out
ones.

The answer is the generated text before the separator, the end-of-sequence token or a line end, whichever comes
first. BLEU and chrF are computed in `items`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlprune.data.corpora import Corpus, calibration_lines
from mlprune.data.demonstrations import build_prompt
from mlprune.data.special_tokens import line_end
from mlprune.errors import CorpusError
from mlprune.evaluation.items import Items
from mlprune.evaluation.suite import EvaluatedModel
from mlprune.shards.decoding import grouped, kept_at_once
from mlprune.shards.pipeline import Progress
from mlprune.spec.calibrations import Demonstration
from mlprune.spec.evaluation import TranslationSpec
from mlprune.spec.languages import language_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "evaluation.translation"
_PLACEHOLDER = "\0"  # replaces a text, to find what stands around it


@dataclass(frozen=True)
class Request:
    """One line to translate."""

    pair: str  # source and target, e.g. fr-en
    line: int  # line number in the corpus, from 1
    prompt: tuple[int, ...]  # token ids
    after: str  # the text that the template puts after the answer
    reference: str


@dataclass(frozen=True, eq=False)
class Translation:
    """A pipeline task: lines to translate, each with its prompt."""

    requests: tuple[Request, ...]
    documents: tuple[str, ...]  # the document of each request's line; empty if the corpus names none
    max_new: int  # the most tokens of an answer
    ends: tuple[str, ...]  # texts before which an answer ends
    tokenizer: PreTrainedTokenizerBase

    @property
    def key(self) -> str:
        """A content hash of everything that the answers and their scores depend on, except the model."""
        content = [[vars(request) for request in self.requests], self.max_new, self.ends]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @property
    def tokens(self) -> int:
        """The number of tokens of all prompts, padding included."""
        groups = grouped([request.prompt for request in self.requests], self.max_new)
        return sum(group.step().input_ids.numel() for group in groups)

    @property
    def longest_row(self) -> int:
        """The number of tokens of the longest prompt and its answer."""
        return max(len(request.prompt) for request in self.requests) + self.max_new

    @property
    def cached_tokens(self) -> int:
        """Tokens of the rows that are generated at the same time, their prompts included."""
        return kept_at_once(len(self.requests), self.longest_row)

    def run(self, model: EvaluatedModel, variant: str | None, progress: Progress | None = None) -> list[Items]:
        """Return the answers of the dense model (`variant` None) or of a variant: one Items per pair."""
        prompts = [request.prompt for request in self.requests]
        generated = model.generate(prompts, self.max_new, self._has_ended, variant, progress)
        answers = [self._answer(request, tokens) for request, tokens in zip(self.requests, generated, strict=True)]
        by_pair: dict[str, list[int]] = {}
        for index, request in enumerate(self.requests):
            by_pair.setdefault(request.pair, []).append(index)
        return [
            Items(
                "translation",
                pair,
                "translation",
                ids=tuple(str(self.requests[index].line) for index in indices),
                columns={
                    "output": tuple(answers[index] for index in indices),
                    "reference": tuple(self.requests[index].reference for index in indices),
                },
                documents=tuple(self.documents[index] for index in indices) if self.documents else (),
            )
            for pair, indices in by_pair.items()
        ]

    def _has_ended(self, row: int, tokens: Sequence[int]) -> bool:
        text = self._decode(tokens)
        return any(end in text for end in self.ends)

    def _answer(self, request: Request, tokens: Sequence[int]) -> str:
        text = self._decode(tokens)
        first = min((text.find(end) for end in self.ends if end in text), default=len(text))
        return text[:first].strip().removesuffix(request.after.strip()).rstrip()

    def _decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens, special ones included, since one of them may be the end."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(tokens), **options))


def build_translation(
    spec: TranslationSpec,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    *,
    selection: Sequence[int],
    seed: int,
    template: str,
    separator: str | None,
) -> Translation:
    """Make prompts for the first `spec.lines` of the lines for `selection` (from 0) in each pair of languages.

    `positions`: the longest row that the model accepts, in tokens. `template` and `separator` are those of
    calibration, and are checked there. Raises CorpusError when a language or lines are missing, or a prompt with
    its answer is too long; ModelError when the separator is the end-of-sequence token and the tokenizer has none.
    """
    separator = line_end(tokenizer) if separator is None else separator
    shots, lines = _shots(spec, corpus, seed), _lines(spec, corpus, selection)
    requests = tuple(
        request
        for pair in spec.pairs
        for request in _requests(corpus, tokenizer, pair, shots, lines, template, separator)
    )
    if positions is not None:
        _check_fit(spec, requests, positions)
    ends = dict.fromkeys((tokenizer.eos_token, "\n", separator))
    # an empty separator, or one of spaces, cannot end an answer: there are spaces between its words
    documents = corpus.named_documents(request.line - 1 for request in requests)
    return Translation(requests, documents, spec.max_new_tokens, tuple(filter(_is_end, ends)), tokenizer)


def _is_end(text: str | None) -> bool:
    return text is not None and bool(text.strip(" "))


def _shots(spec: TranslationSpec, corpus: Corpus, seed: int) -> tuple[int, ...]:
    order = calibration_lines(corpus, seed)
    if spec.shots > len(order):
        remedy = f"the corpus {corpus.name!r} has {len(order)} lines for calibration; use a smaller number"
        raise CorpusError(f"{KEY}.shots", spec.shots, remedy)
    return order[: spec.shots]


def _lines(spec: TranslationSpec, corpus: Corpus, selection: Sequence[int]) -> Sequence[int]:
    if spec.lines > len(selection):
        has = f"the corpus {corpus.name!r} of {len(corpus)} lines has {len(selection)} for selection"
        raise CorpusError(f"{KEY}.lines", spec.lines, f"{has}; use a smaller number")
    return selection[: spec.lines]


def _requests(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    pair: str,
    shots: Sequence[int],
    lines: Sequence[int],
    template: str,
    separator: str,
) -> Iterator[Request]:
    source, target = pair.split("-")
    for language in (source, target):
        corpus.column(language, f"{KEY}.pairs")
    examples = build_prompt(corpus, Demonstration("translation", (source, target)), shots, template, separator)
    text = template.format(language=language_name(target), text=_PLACEHOLDER)
    before, _, after = text.partition(_PLACEHOLDER)
    for line in lines:
        question = build_prompt(corpus, Demonstration("mono", (source,)), [line], template, separator)
        ids = _tokenize(tokenizer, examples + question + before.rstrip(" "))
        yield Request(pair, line + 1, ids, after, corpus.column(target, f"{KEY}.pairs")[line])


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokenise as calibration does, but without an end-of-sequence token at the end.

    Some tokenizers add one; a model would generate nothing sensible after it.
    """
    ids = tokenizer(text).input_ids
    added = ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return tuple(ids[:-1] if added else ids)


def _check_fit(spec: TranslationSpec, requests: Sequence[Request], positions: int) -> None:
    for request in requests:
        tokens = len(request.prompt)
        if tokens + spec.max_new_tokens > positions:
            remedy = f"{request.pair}: the prompt of line {request.line} is {tokens} tokens, max_new_tokens is "
            remedy += f"{spec.max_new_tokens}; the model takes {positions}: lower either"
            raise CorpusError(f"{KEY}.shots", spec.shots, remedy)
