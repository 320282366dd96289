"""Held-out lines of a corpus as token rows, each line scored alone after one token of context.

Which lines are held out, and for what, is decided in `corpora`, and what the likelihoods mean in
`evaluation.perplexity`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from mlprune.data.batches import RowSet, content_key, micro_batches
from mlprune.data.corpora import KEY, Corpus
from mlprune.data.special_tokens import context_id, pad_id
from mlprune.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Line:
    """One line to score. Its row is one token of context, followed by the line's tokens."""

    language: str
    number: int  # in the corpus, from 1
    bytes: int  # size of its UTF-8 text, without the line end


def build_heldout_rows(
    corpus: Corpus,
    languages: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    lines: Sequence[int],
    max_positions: int | None,
    pad_free: bool = False,
) -> tuple[RowSet, tuple[Line, ...]]:
    """Tokenise `lines` (from 0) in each of `languages`; return the rows, and the line of each row.

    `pad_free`: see `micro_batches`.

    Raises CorpusError when a language is missing, or a line with its context is longer than `max_positions`
    tokens; ModelError when the tokenizer has no token to begin with.
    """
    context = context_id(tokenizer)
    line_of_row, rows = [], []
    for language in languages:
        column = corpus.column(language, "evaluation.perplexity.languages")
        for index in lines:
            text = column[index]
            rows.append([context, *tokenizer(text, add_special_tokens=False).input_ids])
            line_of_row.append(Line(language, index + 1, len(text.encode())))
            _check_fits(corpus, line_of_row[-1], len(rows[-1]), max_positions)
    batches = micro_batches(rows, pad_id(tokenizer), pad_free)
    key = content_key(batches, [astuple(line) for line in line_of_row])
    return RowSet(len(rows), batches, key), tuple(line_of_row)


def _check_fits(corpus: Corpus, line: Line, tokens: int, max_positions: int | None) -> None:
    if max_positions is not None and tokens > max_positions:
        remedy = f"line {line.number} of {line.language} is {tokens} tokens with its context; the model takes "
        raise CorpusError(KEY, repr(corpus.name), f"{remedy}{max_positions}: shorten the line")
