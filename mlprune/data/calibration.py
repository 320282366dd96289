"""Text to token batches, for calibration and for evaluation.

A calibration prompt is tokenised as `tokenizer(text, truncation=True, max_length=max_tokens)`, with nothing
added, so that a manifest of line numbers is enough for anyone to make the same tokens. The paper's code pads
every prompt to the full length and calls the model without a mask, so that pads are attended to and counted; here
that is `count_padding`, to be asked for. Else rows are padded only to the longest of their micro-batch, and each
batch has its own lengths.

Shapes: B rows of a micro-batch, T tokens of its longest row.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlprune.data.code import CodeFiles
from mlprune.data.corpora import KEY, Corpus, held_out
from mlprune.data.demonstrations import prompt, sample_files, sample_lines
from mlprune.errors import CorpusError, ModelError
from mlprune.spec.variants import Demonstration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MICRO_BATCH_TOKENS = 1024  # pads included: what bounds the activations of a layer; smaller batches have fewer pads
# Of a file of code this many characters a token that is kept are tokenised: a token has three or four, so the ids
# are those of the whole file, at a fraction of the time.
CODE_CHARACTERS = 64


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch, right-padded."""

    input_ids: Tensor  # [B, T] int64
    lengths: tuple[int, ...]  # tokens of each row
    rows: tuple[int, ...]  # index of each row's prompt, or line, in the set
    starts: tuple[int, ...] = ()  # of each row the first token that is scored, from 1 on; () is 1 for all

    @property
    def attention_mask(self) -> Tensor:
        """[B, T] int64: 1 for a token, 0 for a pad."""
        positions_T = torch.arange(self.input_ids.shape[1])
        return (positions_T < torch.tensor(self.lengths)[:, None]).long()

    @property
    def scored_mask(self) -> Tensor:
        """[B, T] bool: where the state tells a token that is scored, the one after it."""
        told_T = torch.arange(1, self.input_ids.shape[1] + 1)
        starts_B = torch.tensor(self.starts or [1] * len(self.rows))
        return (told_T >= starts_B[:, None]) & (told_T < torch.tensor(self.lengths)[:, None])

    @property
    def tokens(self) -> int:
        """Tokens without pads."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Prompt:
    """One calibration prompt, and where its text comes from: lines of a corpus, or a file of code."""

    kind: str  # the demonstration, as translation:en-fr
    corpus: str  # its name, or the code's
    ids: tuple[int, ...]  # without pads
    lines: tuple[int, ...] = ()  # numbers from 1
    source: str = ""  # of code: the file's path, or the row
    sha256: str = ""  # of code: of the file's whole text, hex

    def manifest(self) -> dict[str, object]:
        """What it takes to make the prompt again: plain values for JSON."""
        lines = {"lines": list(self.lines)}
        text = {"source": self.source, "sha256": self.sha256}
        about = text if self.kind == "code" else lines
        return {"corpus": self.corpus, "kind": self.kind, **about, "tokens": len(self.ids)}


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Prompts as token batches. `key` is a content hash of token ids and batch layout."""

    prompts: tuple[Prompt, ...]
    batches: tuple[Batch, ...]
    key: str

    @property
    def tokens(self) -> int:
        """Tokens that count: pads are none, unless they were asked to count."""
        return sum(batch.tokens for batch in self.batches)


@dataclass(frozen=True)
class Line:
    """One line to score: the row is one token of context, then the line's tokens."""

    language: str
    number: int  # in the corpus, from 1
    bytes: int  # of its UTF-8 text, without the line end


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Held-out lines as token batches. `key` is a content hash of lines, token ids and batch layout."""

    lines: tuple[Line, ...]  # Batch.rows points into these; the same line numbers in every language
    batches: tuple[Batch, ...]
    key: str

    @property
    def count(self) -> int:
        return len(self.lines)


@dataclass(frozen=True, eq=False)
class RowSet:
    """Token rows to be scored: of each, the likelihood of its tokens from its start on.

    `key` is a content hash of token ids, starts and batch layout.
    """

    count: int
    batches: tuple[Batch, ...]
    key: str


def calibration_set(
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
    """`samples` prompts of `shots` lines of `corpus`, or of a file of `code`, each cut to `max_tokens` tokens.

    A line is set out by `template` (see `check_template`), and `separator` follows it: None is the tokenizer's
    end-of-sequence token. `count_padding`, as the paper's code has it: prompts are padded to `max_tokens` on the
    tokenizer's side, and pads count as tokens. `pad_free`: see `_batches`.

    Raises CorpusError when lines, files or a language are wanting, ModelError when the tokenizer lacks the
    end-of-sequence token, or one to pad with.
    """

    def ids_of(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, truncation=True, max_length=max_tokens).input_ids)

    if demonstration.kind == "code":
        assert code is not None
        prompts = [
            Prompt("code", code.name, ids_of(text[: CODE_CHARACTERS * max_tokens]), (), source, _sha256(text))
            for source, text in sample_files(code, samples, seed)
        ]
    else:
        assert corpus is not None
        ends = end_of_line(tokenizer) if separator is None else separator
        set_out = partial(prompt, corpus, demonstration, template=template, separator=ends)
        prompts = [
            Prompt(str(demonstration), corpus.name, ids_of(set_out(lines)), tuple(line + 1 for line in lines))
            for lines in sample_lines(corpus, samples, shots, seed)
        ]
    rows = [made.ids for made in prompts]
    if count_padding:
        rows = _padded(rows, max_tokens, tokenizer)
    batches = _batches(rows, pad_id(tokenizer), pad_free)
    return CalibrationSet(tuple(prompts), batches, _key(batches))


def _padded(
    rows: Sequence[tuple[int, ...]], max_tokens: int, tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[int, ...]]:
    """As `tokenizer(..., padding="max_length")`; no token is added to a vocabulary that lacks one to pad with."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise _tokenizer_error(tokenizer, "has no token to pad with, which calibration.count_padding needs")
    pads = [(pad_id(tokenizer),) * (max_tokens - len(row)) for row in rows]
    left = tokenizer.padding_side == "left"
    return [pad + row if left else row + pad for pad, row in zip(pads, rows, strict=True)]


def evaluation_set(
    corpus: Corpus,
    languages: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    lines: int,
    max_positions: int | None,
    pad_free: bool = False,
) -> EvaluationSet:
    """The first `lines` held-out lines in each of `languages`, each scored alone after one token of context.

    Raises CorpusError when lines or a language are wanting, or a line with its context is longer than
    `max_positions` tokens; ModelError when the tokenizer has no token to begin with.
    """
    kept = held_out(corpus)
    if lines > len(kept):
        remedy = f"the corpus {corpus.name!r} of {len(corpus)} lines holds out {len(kept)}; ask for no more"
        raise CorpusError("evaluation.perplexity.lines", lines, remedy)
    context = context_id(tokenizer)
    about, rows = [], []
    for language in languages:
        column = corpus.column(language, "evaluation.perplexity.languages")
        for index in kept[:lines]:
            text = column[index]
            rows.append([context, *tokenizer(text, add_special_tokens=False).input_ids])
            about.append(Line(language, index + 1, len(text.encode())))
            _check_fits(corpus, about[-1], len(rows[-1]), max_positions)
    batches = _batches(rows, pad_id(tokenizer), pad_free)
    return EvaluationSet(tuple(about), batches, _key(batches, [astuple(line) for line in about]))


def row_set(rows: Sequence[Sequence[int]], starts: Sequence[int], pad: int, pad_free: bool = False) -> RowSet:
    """Rows of token ids, each to be scored from its start on: at least 1, and before the row's end.

    `pad`: any id of the vocabulary, as `pad_id` tells. `pad_free`: see `_batches`.
    """
    assert all(1 <= start < len(row) for row, start in zip(rows, starts, strict=True))
    plain = _batches(rows, pad, pad_free)
    batches = tuple(replace(batch, starts=tuple(starts[row] for row in batch.rows)) for batch in plain)
    return RowSet(len(rows), batches, _key(batches, starts))


def _check_fits(corpus: Corpus, line: Line, tokens: int, max_positions: int | None) -> None:
    if max_positions is not None and tokens > max_positions:
        remedy = f"line {line.number} of {line.language} is {tokens} tokens with its context; the model takes "
        raise CorpusError(KEY, repr(corpus.name), f"{remedy}{max_positions}: shorten the line")


def _batches(rows: Sequence[Sequence[int]], pad: int, pad_free: bool) -> tuple[Batch, ...]:
    """Micro-batches of at most MICRO_BATCH_TOKENS, pads included, or of one row; every row is in one.

    Longest rows first, so that memory peaks at once and not at the end. `pad_free`: a batch holds rows of
    one length, for mixtures of experts, whose router would send pads to experts as if they were tokens.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(rows)), key=lambda row: -len(rows[row])):
        longest = len(rows[groups[-1][0]]) if groups else 0
        full = not groups or (len(groups[-1]) + 1) * longest > MICRO_BATCH_TOKENS
        if full or (pad_free and len(rows[row]) < longest):
            groups.append([])
        groups[-1].append(row)
    return tuple(_batch(rows, group, pad) for group in groups)


def _batch(rows: Sequence[Sequence[int]], group: Sequence[int], pad: int) -> Batch:
    lengths = tuple(len(rows[row]) for row in group)
    padded = [[*rows[row], *[pad] * (lengths[0] - len(rows[row]))] for row in group]
    return Batch(torch.tensor(padded, dtype=torch.int64), lengths, tuple(group))


def _key(batches: Sequence[Batch], about: Sequence[object] = ()) -> str:
    """A content hash of the batches and what else there is to tell, the same in every process: 32 hex digits."""
    layout = [[batch.rows, batch.lengths, batch.input_ids.tolist()] for batch in batches]
    return _sha256(json.dumps([layout, list(about)]))[:32]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Any id that is in the vocabulary will do where no pad is attended to or counted."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def context_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token before a line, so that the line's first token has a likelihood too.

    Raises ModelError when the tokenizer has none.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise _tokenizer_error(tokenizer, "has no begin- or end-of-sequence token to put before a line")


def end_of_line(tokenizer: "PreTrainedTokenizerBase") -> str:
    if tokenizer.eos_token is None:
        raise _tokenizer_error(tokenizer, "has no end-of-sequence token, which ends each line of a prompt")
    return str(tokenizer.eos_token)


def _tokenizer_error(tokenizer: "PreTrainedTokenizerBase", fault: str) -> ModelError:
    return ModelError("tokenizer", repr(tokenizer.name_or_path), f"{fault}; set one in tokenizer_config.json")
