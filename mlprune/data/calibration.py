"""Text to token batches, for calibration and for evaluation.

A calibration prompt is tokenised as `tokenizer(text, truncation=True, max_length=max_tokens)`, with nothing
added, so that a manifest of line numbers is enough for anyone to make the same tokens. The paper's code pads
every prompt to the full length and keeps one mask for all; here rows are padded only to the longest of their
micro-batch, and each batch has its own lengths.

Shapes: B rows of a micro-batch, T tokens of its longest row.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlprune.data.corpora import KEY, Corpus, held_out
from mlprune.data.demonstrations import prompt, sample_lines
from mlprune.errors import CorpusError, ModelError
from mlprune.variants import Demonstration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MICRO_BATCH_TOKENS = 1024  # pads included: what bounds the activations of a layer; smaller batches have fewer pads


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch, right-padded."""

    input_ids: Tensor  # [B, T] int64
    lengths: tuple[int, ...]  # tokens of each row
    rows: tuple[int, ...]  # index of each row's prompt, or line, in the set

    @property
    def attention_mask(self) -> Tensor:
        """[B, T] int64: 1 for a token, 0 for a pad."""
        positions_T = torch.arange(self.input_ids.shape[1])
        return (positions_T < torch.tensor(self.lengths)[:, None]).long()

    @property
    def tokens(self) -> int:
        """Tokens without pads."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Prompt:
    """One calibration prompt, and where its text comes from."""

    kind: str  # the demonstration, as translation:en-fr
    corpus: str  # its name
    lines: tuple[int, ...]  # numbers from 1
    ids: tuple[int, ...]

    def manifest(self) -> dict[str, object]:
        """What it takes to make the prompt again: plain values for JSON."""
        return {"corpus": self.corpus, "kind": self.kind, "lines": list(self.lines), "tokens": len(self.ids)}


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Prompts as token batches. `key` is a content hash of token ids and batch layout."""

    prompts: tuple[Prompt, ...]
    batches: tuple[Batch, ...]
    key: str

    @property
    def tokens(self) -> int:
        """Tokens without pads."""
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


def calibration_set(
    corpus: Corpus,
    demonstration: Demonstration,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    shots: int,
    max_tokens: int,
    seed: int,
    pad_free: bool = False,
) -> CalibrationSet:
    """`samples` prompts of `shots` lines, each cut to `max_tokens` tokens.

    Raises CorpusError when lines or a language are wanting, ModelError when the tokenizer has no
    end-of-sequence token. `pad_free`: see `_batches`.
    """
    if tokenizer.eos_token is None:
        raise _tokenizer_error(tokenizer, "has no end-of-sequence token, which ends each line of a prompt")
    prompts = []
    for lines in sample_lines(corpus, samples, shots, seed):
        text = prompt(corpus, demonstration, lines, tokenizer.eos_token)
        ids = tokenizer(text, truncation=True, max_length=max_tokens).input_ids
        prompts.append(Prompt(str(demonstration), corpus.name, tuple(line + 1 for line in lines), tuple(ids)))
    batches = _batches([made.ids for made in prompts], _pad_id(tokenizer), pad_free)
    return CalibrationSet(tuple(prompts), batches, _key(batches))


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
    context = _context_id(tokenizer)
    about, rows = [], []
    for language in languages:
        column = corpus.column(language, "evaluation.perplexity.languages")
        for index in kept[:lines]:
            text = column[index]
            rows.append([context, *tokenizer(text, add_special_tokens=False).input_ids])
            about.append(Line(language, index + 1, len(text.encode())))
            _check_fits(corpus, about[-1], len(rows[-1]), max_positions)
    batches = _batches(rows, _pad_id(tokenizer), pad_free)
    return EvaluationSet(tuple(about), batches, _key(batches, about))


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


def _key(batches: Sequence[Batch], lines: Sequence[Line] = ()) -> str:
    """A content hash, the same in every process: 32 hex digits."""
    layout = [[batch.rows, batch.lengths, batch.input_ids.tolist()] for batch in batches]
    about = [[line.language, line.number, line.bytes] for line in lines]
    return hashlib.sha256(json.dumps([layout, about]).encode()).hexdigest()[:32]


def _pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Any id that is in the vocabulary will do: no pad is attended to or counted."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def _context_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token before a line, so that the line's first token has a likelihood too."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise _tokenizer_error(tokenizer, "has no begin- or end-of-sequence token to put before a line")


def _tokenizer_error(tokenizer: "PreTrainedTokenizerBase", fault: str) -> ModelError:
    return ModelError("tokenizer", repr(tokenizer.name_or_path), f"{fault}; set one in tokenizer_config.json")
