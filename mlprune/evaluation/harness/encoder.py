"""How requests of lm-evaluation-harness become tokens. No model runs here.

They become tokens as in the harness's own `hf` model: context and continuation are tokenised together and then
split, an empty context is the beginning-of-sequence token (else the end-of-sequence token), a context loses its
beginning where the model has too few positions, a long document is read in windows, and text ends where Hugging
Face's `generate` ends it. Departures: probabilities are taken in float32 (as `hf` with `softmax_dtype=float32`;
by default `hf` takes them in the model's dtype); text is generated greedily or not at all; only the end tokens of
generation_config.json are used; there are no chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlprune.data.special_tokens import begin_id
from mlprune.evaluation.harness.requests import GenerationRequest, LikelihoodRequest, Row

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

LOOKBACK = 2  # tokens more than a stop string has, because a model may write it in other tokens
SAMPLING_OPTIONS = {"do_sample", "temperature", "top_k", "top_p"}  # without effect when do_sample is false


class Encoder(TemplateLM):  # type: ignore[misc]
    """A model for the harness that returns, instead of a response, each request in tokens.

    `positions`: the longest row that the model accepts, in tokens. Raises ValueError, in one line, for a request
    that is not supported: a continuation of no tokens or too many, text that is not generated greedily; ModelError
    for a tokenizer without a token to begin with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = positions or resolve_max_length(None, tokenizer)
        self._prefix = begin_id(tokenizer)
        self._prefix_text = tokenizer.decode(self._prefix)
        self._ends = frozenset(_end_tokens(tokenizer))

    def encode(self, request: Instance) -> LikelihoodRequest | GenerationRequest:
        """Return one request of any type in tokens."""
        match request.request_type:
            case "loglikelihood":
                return self.loglikelihood([request])[0]
            case "loglikelihood_rolling":
                return self.loglikelihood_rolling([request])[0]
            case "generate_until":
                return self.generate_until([request])[0]
        raise ValueError(f"a request of type {request.request_type}")

    @property
    def eot_token_id(self) -> int | None:
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokenise. Special tokens are added as the tokenizer does, but never a second one at the beginning."""
        if add_special_tokens is None and has_bos_prefix(string, self._prefix_text):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[LikelihoodRequest]:
        encoded: list[LikelihoodRequest] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return encoded

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[LikelihoodRequest]:
        """The base class calls this with the tokens of each context and continuation."""
        return [
            LikelihoodRequest((self._row(context, continuation),), False) for _, context, continuation in requests
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[LikelihoodRequest]:
        encoded = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self._prefix, self.max_length, context_len=1)
            rows = tuple(self._row(*make_disjoint_window(window)) for window in windows)
            encoded.append(LikelihoodRequest(rows, True))
        return encoded

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[GenerationRequest]:
        return [self._generation(*request.args) for request in requests]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if not context:
            raise ValueError("the likelihood of text after a context of spaces alone, which has no token")
        if not 1 <= len(continuation) <= self.max_length:
            size = len(continuation)
            raise ValueError(f"the likelihood of {size} tokens; the model can score 1 to {self.max_length}")
        # the last token is predicted but is no input, so the row is one longer than the model's positions
        ids = (context + continuation)[-(self.max_length + 1) :]
        return Row(tuple(ids), len(ids) - len(continuation))

    def _generation(self, context: str, arguments: Mapping[str, object]) -> GenerationRequest:
        options = normalize_gen_kwargs(arguments, DEFAULT_MAX_GEN_TOKS)
        max_new = options.pop("max_gen_toks")
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        stops = [stop for stop in handle_stop_sequences(options.pop("until"), eos) if stop]
        if options["do_sample"] or not options.keys() <= SAMPLING_OPTIONS:
            raise ValueError(
                f"text generated with {arguments}; only greedy decoding with until and max_gen_toks is supported"
            )
        limit = self.max_length - max_new
        if limit < 1:
            raise ValueError(f"text of {max_new} tokens; the model takes {self.max_length}, the prompt included")
        begun = has_bos_prefix(context, self.tokenizer.bos_token)
        ids = self.tokenizer.encode(context, **({"add_special_tokens": False} if begun else {}))[-limit:]
        if not ids:
            raise ValueError("text after a prompt of no tokens")
        lengths = [len(self.tokenizer.encode(stop, add_special_tokens=False)) + LOOKBACK for stop in stops]
        stops_and_lengths = tuple(zip(stops, lengths, strict=True))
        return GenerationRequest(tuple(ids), max_new, stops_and_lengths, self._ends, self.tokenizer)


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return where Hugging Face's `generate` ends: the checkpoint's own end tokens, and the tokenizer's."""
    file = Path(tokenizer.name_or_path) / "generation_config.json"
    own = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    ends = (tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]))
    return {int(token) for token in ends if token is not None}
