"""A sharded, masked model as lm-evaluation-harness sees one, and how its requests become tokens.

They become tokens as in the harness's own `hf` model: context and continuation are tokenised together and cut
apart, an empty context is the beginning-of-sequence token (else the end-of-sequence token), a context loses its
beginning where the model has too few positions, a long document is read in windows, and text ends where Hugging
Face's `generate` ends it. Departures: probabilities are taken in float32 (as `hf` with `softmax_dtype=float32`;
else it takes them in the model's dtype); text is written greedily or not at all; of generation_config.json only
the end tokens count; there are no chat templates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlprune.data.calibration import RowSet, context_id, pad_id, row_set
from mlprune.shards.decoding import grouped
from mlprune.shards.pipeline import Pipeline, Progress

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

LOOKBACK = 2  # tokens more than a stop string has: a model may write it in other tokens
IDLE = {"do_sample", "temperature", "top_k", "top_p"}  # say nothing more, once nothing is sampled


@dataclass(frozen=True)
class Row:
    """Token ids, scored from `start` on."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Scored:
    """A request for a likelihood: of one row, or of a document, in as many rows as it is long."""

    rows: tuple[Row, ...]
    document: bool  # then nobody asks whether it is what greedy decoding would write


@dataclass(frozen=True)
class Written:
    """A request for text."""

    prompt: tuple[int, ...]  # token ids
    max_new: int  # tokens
    stops: tuple[tuple[str, int], ...]  # the text ends before the first of these; tokens to look back at for each
    ends: frozenset[int]  # and with any of these tokens
    tokenizer: PreTrainedTokenizerBase

    def ended(self, new: Sequence[int]) -> bool:
        """Whether the text ends with the last of its new tokens."""
        return new[-1] in self.ends or any(
            stop in self.tokenizer.decode(list(new[-length:])) for stop, length in self.stops
        )

    def text(self, new: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(new), skip_special_tokens=True)
        return str(postprocess_generated_text(text, [stop for stop, _ in self.stops], None))


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests as tokens; all likelihoods that they ask for come from one pass."""

    rows: RowSet
    scored: tuple[tuple[int, range, bool], ...]  # number of the request, its rows, whether it is a document's
    written: dict[int, Written]  # by number of the request

    @classmethod
    def of(cls, asked: Sequence[Scored | Written], pad: int, pad_free: bool) -> Requests:
        rows: list[Row] = []
        scored = []
        for number, one in enumerate(asked):
            if isinstance(one, Scored):
                scored.append((number, range(len(rows), len(rows) + len(one.rows)), one.document))
                rows += one.rows
        made = row_set([row.ids for row in rows], [row.start for row in rows], pad, pad_free)
        written = {number: one for number, one in enumerate(asked) if isinstance(one, Written)}
        return cls(made, tuple(scored), written)

    @property
    def key(self) -> str:
        """A content hash of all tokens, and of how text is to end."""
        texts = [[one.prompt, one.max_new, one.stops, sorted(one.ends)] for one in self.written.values()]
        return hashlib.sha256(json.dumps([self.rows.key, texts]).encode()).hexdigest()[:32]

    def waves(self) -> dict[int, list[int]]:
        """Of the requests for text, those that may have as many tokens: that number -> theirs."""
        found: dict[int, list[int]] = {}
        for number, one in self.written.items():
            found.setdefault(one.max_new, []).append(number)
        return found

    @property
    def tokens(self) -> int:
        """Of all rows and prompts, pads included."""
        total = sum(batch.input_ids.numel() for batch in self.rows.batches)
        for max_new, numbers in self.waves().items():
            groups = grouped([self.written[number].prompt for number in numbers], max_new)
            total += sum(group.step().input_ids.numel() for group in groups)
        return total

    @property
    def cached(self) -> int:
        """Tokens of the longest prompt and what is written after it; 0 if nothing is written."""
        return max((len(one.prompt) + one.max_new for one in self.written.values()), default=0)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, or prompt with what is written after it."""
        return max(self.cached, *(batch.input_ids.shape[1] for batch in self.rows.batches), 0)

    def answers(self, pipeline: Pipeline, variant: str | None, progress: Progress | None = None) -> list[Any]:
        """In order: log-likelihood (nats) and whether greedy; of a document the first alone; or text."""
        told: dict[int, Any] = {}
        likelihoods = pipeline.likelihood_and_greedy(self.rows, variant, progress) if self.rows.count else []
        for number, rows, document in self.scored:
            total = -sum(likelihoods[row][0] for row in rows)
            told[number] = total if document else (total, all(likelihoods[row][1] for row in rows))
        for max_new, numbers in self.waves().items():
            asked = [self.written[number] for number in numbers]
            new = self._continued(pipeline, asked, max_new, variant, progress)
            told |= {number: one.text(new) for number, one, new in zip(numbers, asked, new, strict=True)}
        return [told[number] for number in range(len(told))]

    def _continued(
        self,
        pipeline: Pipeline,
        asked: Sequence[Written],
        max_new: int,
        variant: str | None,
        progress: Progress | None,
    ) -> list[list[int]]:
        def ended(row: int, new: Sequence[int]) -> bool:
            return asked[row].ended(new)

        return pipeline.generate([one.prompt for one in asked], max_new, ended, variant, progress)


class Encoder(TemplateLM):  # type: ignore[misc]
    """Answers each of the harness's requests with what it is in tokens.

    `positions`: tokens that the model takes at most. Raises ValueError, in one line, for a request that cannot be:
    a continuation of no tokens or too many, text that is not to be greedy; ModelError for a tokenizer without a
    token to begin with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = positions or resolve_max_length(None, tokenizer)
        self._prefix = context_id(tokenizer)
        self._prefix_text = tokenizer.decode(self._prefix)
        self._ends = frozenset(_end_tokens(tokenizer))

    @property
    def eot_token_id(self) -> int | None:
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Special tokens are added as the tokenizer would, but no second one before a text that begins with it."""
        if add_special_tokens is None and has_bos_prefix(string, self._prefix_text):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[Any]:
        found: list[Any] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Scored | Any]:
        return [Scored((self._row(context, continuation),), False) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[Any]:
        found = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self._prefix, self.max_length, context_len=1)
            found.append(Scored(tuple(self._row(*make_disjoint_window(window)) for window in windows), True))
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[Any]:
        return [self._written(*request.args) for request in requests]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if not context:
            raise ValueError("the likelihood of text after a context of spaces alone, which is no token")
        if not 1 <= len(continuation) <= self.max_length:
            size = len(continuation)
            raise ValueError(f"the likelihood of {size} tokens; the model can tell 1 to {self.max_length}")
        # the last token is told, not given, so the row is one longer than the model's positions
        ids = (context + continuation)[-(self.max_length + 1) :]
        return Row(tuple(ids), len(ids) - len(continuation))

    def _written(self, context: str, asked: dict[str, Any]) -> Written:
        options = normalize_gen_kwargs(asked, DEFAULT_MAX_GEN_TOKS)
        max_new = options.pop("max_gen_toks")
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        stops = [stop for stop in handle_stop_sequences(options.pop("until"), eos) if stop]
        if options["do_sample"] or not options.keys() <= IDLE:
            raise ValueError(
                f"text by {asked}; here it is written greedily, with no more options than until and max_gen_toks"
            )
        room = self.max_length - max_new
        if room < 1:
            raise ValueError(f"text of {max_new} tokens; the model takes {self.max_length}, the prompt included")
        begun = has_bos_prefix(context, self.tokenizer.bos_token)
        ids = self.tokenizer.encode(context, **({"add_special_tokens": False} if begun else {}))[-room:]
        if not ids:
            raise ValueError("text after a prompt of no tokens")
        lengths = [len(self.tokenizer.encode(stop, add_special_tokens=False)) + LOOKBACK for stop in stops]
        return Written(tuple(ids), max_new, tuple(zip(stops, lengths, strict=True)), self._ends, self.tokenizer)


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Where Hugging Face's `generate` ends: the checkpoint's own end tokens, beside the tokenizer's."""
    file = Path(tokenizer.name_or_path) / "generation_config.json"
    own = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    ends = (tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]))
    return {int(token) for token in ends if token is not None}


class HarnessModel(Encoder):
    """What `lm_eval.simple_evaluate(model=...)` takes: the dense model (`variant` None), or a variant of it."""

    def __init__(
        self,
        pipeline: Pipeline,
        variant: str | None,
        tokenizer: PreTrainedTokenizerBase,
        positions: int | None,
        pad_free: bool,
    ) -> None:
        super().__init__(tokenizer, positions)
        self._pipeline, self._variant, self._pad_free = pipeline, variant, pad_free

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[Any]:
        return self._answers(super().loglikelihood(requests))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[Any]:
        return self._answers(super().loglikelihood_rolling(requests))

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[Any]:
        return self._answers(super().generate_until(requests))

    def _answers(self, asked: Sequence[Scored | Written]) -> list[Any]:
        requests = Requests.of(asked, pad_id(self.tokenizer), self._pad_free)
        return requests.answers(self._pipeline, self._variant)
