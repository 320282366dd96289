"""Requests of the harness as tokens, and their responses from a pipeline.

The harness's text becomes tokens in `encoder`; responses become metrics in `task`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm_eval.models.utils import postprocess_generated_text

from mlprune.data.batches import RowSet, build_row_set
from mlprune.evaluation.suite import EvaluatedModel
from mlprune.shards.decoding import grouped
from mlprune.shards.pipeline import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# To a request for one continuation: its log-likelihood (nats), and whether greedy decoding would write it. To a
# request for a document: its log-likelihood. To a request for generation: the text.
Response = tuple[float, bool] | float | str


@dataclass(frozen=True)
class Row:
    """Token ids, scored from `start` on."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class LikelihoodRequest:
    """A request for the likelihood of one row, or of a document, which has as many rows as it has windows."""

    rows: tuple[Row, ...]
    document: bool  # the response to a document does not say whether greedy decoding would write it


@dataclass(frozen=True)
class GenerationRequest:
    """A request for generated text."""

    prompt: tuple[int, ...]  # token ids
    max_new: int  # the most tokens to generate
    stops: tuple[tuple[str, int], ...]  # texts before which the text ends, and how many tokens to search for each
    ends: frozenset[int]  # tokens that end the text
    tokenizer: PreTrainedTokenizerBase

    def has_ended(self, tokens: Sequence[int]) -> bool:
        """Return whether the text ends with the last of its generated tokens."""
        return tokens[-1] in self.ends or any(
            stop in self.tokenizer.decode(list(tokens[-length:])) for stop, length in self.stops
        )

    def text(self, tokens: Sequence[int]) -> str:
        """Return the generated tokens as text, cut before the first stop."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return str(postprocess_generated_text(text, [stop for stop, _ in self.stops], None))


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests as tokens. All their likelihoods come from one pass."""

    rows: RowSet
    likelihoods: tuple[tuple[int, range, bool], ...]  # number of the request, its rows, whether it is a document
    generations: dict[int, GenerationRequest]  # by number of the request

    @classmethod
    def build(
        cls, requests: Sequence[LikelihoodRequest | GenerationRequest], pad: int, pad_free: bool
    ) -> Requests:
        """Lay out the rows of all requests. `pad` and `pad_free`: see `build_row_set`."""
        rows: list[Row] = []
        likelihoods = []
        for number, request in enumerate(requests):
            if isinstance(request, LikelihoodRequest):
                span = range(len(rows), len(rows) + len(request.rows))
                likelihoods.append((number, span, request.document))
                rows += request.rows
        row_set = build_row_set([row.ids for row in rows], [row.start for row in rows], pad, pad_free)
        generations = {
            number: request for number, request in enumerate(requests) if isinstance(request, GenerationRequest)
        }
        return cls(row_set, tuple(likelihoods), generations)

    @property
    def key(self) -> str:
        """A content hash of all tokens, and of how generated text ends."""
        texts = [
            [request.prompt, request.max_new, request.stops, sorted(request.ends)]
            for request in self.generations.values()
        ]
        return hashlib.sha256(json.dumps([self.rows.key, texts]).encode()).hexdigest()[:32]

    def by_length(self) -> dict[int, list[int]]:
        """Group the numbers of the generation requests by the most tokens that they may generate."""
        numbers: dict[int, list[int]] = {}
        for number, request in self.generations.items():
            numbers.setdefault(request.max_new, []).append(number)
        return numbers

    @property
    def tokens(self) -> int:
        """The number of tokens of all rows and prompts, padding included."""
        total = sum(batch.input_ids.numel() for batch in self.rows.batches)
        for max_new, numbers in self.by_length().items():
            groups = grouped([self.generations[number].prompt for number in numbers], max_new)
            total += sum(group.step().input_ids.numel() for group in groups)
        return total

    @property
    def longest_generation(self) -> int:
        """The number of tokens of the longest prompt and its text; 0 if nothing is generated."""
        return max((len(request.prompt) + request.max_new for request in self.generations.values()), default=0)

    @property
    def longest_row(self) -> int:
        """The number of tokens of the longest row, or of the longest prompt and its text."""
        return max(self.longest_generation, *(batch.input_ids.shape[1] for batch in self.rows.batches), 0)

    def responses(
        self, model: EvaluatedModel, variant: str | None, progress: Progress | None = None
    ) -> list[Response]:
        """Return the response to each request, in order, of the dense model (`variant` None) or of a variant."""
        responses: dict[int, Response] = {}
        likelihoods = model.likelihood_and_greedy(self.rows, variant, progress) if self.rows.count else []
        for number, rows, document in self.likelihoods:
            total = -sum(likelihoods[row][0] for row in rows)
            responses[number] = total if document else (total, all(likelihoods[row][1] for row in rows))
        for max_new, numbers in self.by_length().items():
            requests = [self.generations[number] for number in numbers]
            generated = _generate(model, requests, max_new, variant, progress)
            for number, request, tokens in zip(numbers, requests, generated, strict=True):
                responses[number] = request.text(tokens)
        return [responses[number] for number in range(len(responses))]


def _generate(
    model: EvaluatedModel,
    requests: Sequence[GenerationRequest],
    max_new: int,
    variant: str | None,
    progress: Progress | None,
) -> list[list[int]]:
    def has_ended(row: int, tokens: Sequence[int]) -> bool:
        return requests[row].has_ended(tokens)

    return model.generate([request.prompt for request in requests], max_new, has_ended, variant, progress)
