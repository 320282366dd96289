"""Few-shot translation of held-out lines, written greedily, as Kim et al. (2024, arXiv 2409.16911) evaluate it.

A prompt is laid out as calibration's translation demonstrations are, by the same template and separator:

    French: <line><eos>English: <line><eos> ... French: <line to translate><eos>English:

The space before the answer is left to the model, since most tokenizers put it into the answer's first token. The
shots are the same for all lines of all pairs: the first lines for calibration in the seed's order, never held-out
ones.

The answer is what is written before the separator, the end-of-sequence token or a line end, whichever is first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlprune.data.calibration import end_of_line
from mlprune.data.corpora import Corpus, calibration_lines, held_out
from mlprune.data.demonstrations import prompt
from mlprune.errors import CorpusError
from mlprune.evaluation.items import Items
from mlprune.shards.decoding import grouped, kept_at_once
from mlprune.shards.pipeline import Pipeline, Progress
from mlprune.spec.evaluation import TranslationSpec
from mlprune.spec.languages import language_name
from mlprune.spec.variants import Demonstration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "evaluation.translation"
_MARK = "\0"  # in place of a text, to see what stands around it


@dataclass(frozen=True)
class Request:
    """One line to translate."""

    pair: str  # fr-en
    line: int  # its number in the corpus, from 1
    prompt: tuple[int, ...]  # token ids
    after: str  # what the template puts after the answer
    reference: str


@dataclass(frozen=True, eq=False)
class Translation:
    """Lines to translate, each with its prompt."""

    requests: tuple[Request, ...]
    max_new: int  # tokens of an answer
    ends: tuple[str, ...]  # texts before which an answer ends
    tokenizer: PreTrainedTokenizerBase

    @property
    def key(self) -> str:
        """A content hash of all that the answers and their scores depend on, but the model: 32 hex digits."""
        content = [[vars(request) for request in self.requests], self.max_new, self.ends]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @property
    def tokens(self) -> int:
        """Of all prompts, pads included."""
        groups = grouped([request.prompt for request in self.requests], self.max_new)
        return sum(group.step().input_ids.numel() for group in groups)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(len(request.prompt) for request in self.requests) + self.max_new

    @property
    def written(self) -> int:
        """Tokens of the rows that are written at the same time, their prompts included."""
        return kept_at_once(len(self.requests), self.longest)

    def ask(self, pipeline: Pipeline, variant: str | None, progress: Progress | None = None) -> list[Items]:
        """What the dense model (`variant` None), or a variant, answers: a pair each, lines by their numbers."""
        prompts = [request.prompt for request in self.requests]
        written = pipeline.generate(prompts, self.max_new, self._ended, variant, progress)
        outputs = [self._answer(request, tokens) for request, tokens in zip(self.requests, written, strict=True)]
        of_pair: dict[str, list[tuple[Request, str]]] = {}
        for request, output in zip(self.requests, outputs, strict=True):
            of_pair.setdefault(request.pair, []).append((request, output))
        return [
            Items(
                "translation",
                pair,
                "translation",
                ids=tuple(str(request.line) for request, _ in answered),
                columns={
                    "output": tuple(output for _, output in answered),
                    "reference": tuple(request.reference for request, _ in answered),
                },
            )
            for pair, answered in of_pair.items()
        ]

    def _ended(self, row: int, written: Sequence[int]) -> bool:
        text = self._decoded(written)
        return any(end in text for end in self.ends)

    def _answer(self, request: Request, written: Sequence[int]) -> str:
        text = self._decoded(written)
        first = min((text.find(end) for end in self.ends if end in text), default=len(text))
        return text[:first].strip().removesuffix(request.after.strip()).rstrip()

    def _decoded(self, written: Sequence[int]) -> str:
        """Special tokens are told too, since one of them may be the end."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(written), **options))


def translation(
    asked: TranslationSpec,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    *,
    seed: int,
    template: str,
    separator: str | None,
) -> Translation:
    """The first `asked.lines` held-out lines in each pair of languages.

    `positions`: tokens that the model takes at most. `template` and `separator`: calibration's, checked there.
    Raises CorpusError when a language or lines are wanting, or a prompt with its answer is too long; ModelError
    when the separator is to be the end-of-sequence token, and the tokenizer has none.
    """
    separator = end_of_line(tokenizer) if separator is None else separator
    shots, lines = _shots(asked, corpus, seed), _lines(asked, corpus)
    requests = tuple(
        request
        for pair in asked.pairs
        for request in _requests(corpus, tokenizer, pair, shots, lines, template, separator)
    )
    if positions is not None:
        _check_fit(asked, requests, positions)
    ends = dict.fromkeys((tokenizer.eos_token, "\n", separator))
    # a separator of spaces, or none, ends no answer: words have them in between
    return Translation(requests, asked.max_new_tokens, tuple(filter(_is_end, ends)), tokenizer)


def _is_end(text: str | None) -> bool:
    return text is not None and bool(text.strip(" "))


def _shots(asked: TranslationSpec, corpus: Corpus, seed: int) -> tuple[int, ...]:
    order = calibration_lines(corpus, seed)
    if asked.shots > len(order):
        remedy = f"the corpus {corpus.name!r} has {len(order)} lines for calibration; ask for no more"
        raise CorpusError(f"{KEY}.shots", asked.shots, remedy)
    return order[: asked.shots]


def _lines(asked: TranslationSpec, corpus: Corpus) -> tuple[int, ...]:
    kept = held_out(corpus)
    if asked.lines > len(kept):
        remedy = f"the corpus {corpus.name!r} of {len(corpus)} lines holds out {len(kept)}; ask for no more"
        raise CorpusError(f"{KEY}.lines", asked.lines, remedy)
    return kept[: asked.lines]


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
    demonstrated = prompt(corpus, Demonstration("translation", (source, target)), shots, template, separator)
    before, _, after = template.format(language=language_name(target), text=_MARK).partition(_MARK)
    for line in lines:
        asked = prompt(corpus, Demonstration("mono", (source,)), [line], template, separator)
        ids = _ids(tokenizer, demonstrated + asked + before.rstrip(" "))
        yield Request(pair, line + 1, ids, after, corpus.column(target, f"{KEY}.pairs")[line])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """As calibration's prompts, but that no end-of-sequence token is added, as some tokenizers do: it ends all."""
    ids = tokenizer(text).input_ids
    added = ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return tuple(ids[:-1] if added else ids)


def _check_fit(asked: TranslationSpec, requests: Sequence[Request], positions: int) -> None:
    for request in requests:
        tokens = len(request.prompt)
        if tokens + asked.max_new_tokens > positions:
            remedy = f"{request.pair}: the prompt of line {request.line} is {tokens} tokens, max_new_tokens is "
            remedy += f"{asked.max_new_tokens}; the model takes {positions}: ask for fewer of either"
            raise CorpusError(f"{KEY}.shots", asked.shots, remedy)
