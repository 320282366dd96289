"""A smaller vocabulary: which tokens a text needs, and the tokenizer and configuration without the others.

It works on `tokenizer.json`, the form of the library `tokenizers`, for BPE (of bytes or characters) and Unigram.
Tokens keep their order and get new ids without gaps. What is promised:

- a text all of whose pieces are kept is cut into the same pieces. BPE: every token on the way from characters to a
  kept token is kept with its merges, so each step finds the same best merge. Unigram: the best of all ways to cut
  the text is still the best of those that are left;
- other text is still encoded: by bytes, or where a tokenizer has no tokens for bytes, by single characters, which
  are all kept.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mlprune.errors import ModelError
from mlprune.models.source import ModelSource

Values = dict[str, Any]  # tokenizer.json
SINGLE = set(string.printable) | {"▁", "Ġ", "Ċ"}  # digits, punctuation, and how tokenizers write spaces


def kept_tokens(tokenizer: Values, used: Iterable[int]) -> tuple[int, ...]:
    """Return the ids of the tokens to keep, ascending: the used ones and what their encoding needs.

    Besides them special tokens, bytes, digits and punctuation. `tokenizer`: see `tokenizer_values`.
    """
    model, text_of = tokenizer["model"], _texts(tokenizer)
    id_of = {text: number for number, text in text_of.items()}
    kept = set(used) | {token["id"] for token in tokenizer["added_tokens"]}
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        kept.add(model["unk_id"])
    if model["type"] == "BPE" and model["unk_token"] is not None:
        kept.add(id_of[model["unk_token"]])
    falls_back = model.get("byte_fallback", False)
    for text, number in id_of.items():
        if falls_back and len(text) == 6 and text.startswith("<0x"):
            kept.add(number)
        elif len(text) == 1 and (not falls_back or text in SINGLE):
            kept.add(number)  # of a tokenizer of bytes, these are the bytes
    if model["type"] == "BPE":
        rank = {pair: number for number, pair in enumerate(_merges(model))}
        for number in list(kept):
            kept |= {id_of[text] for text in _on_the_way(text_of[number], rank) if text in id_of}
    return tuple(sorted(kept & text_of.keys()))


def cut_tokenizer(tokenizer: Values, kept: Sequence[int]) -> Values:
    """Return `tokenizer.json` with these tokens alone, renumbered."""
    new = {old: number for number, old in enumerate(kept)}
    model: Values = dict(tokenizer["model"])
    if model["type"] == "BPE":
        vocabulary = {text: new[old] for text, old in model["vocab"].items() if old in new}
        merges = [pair for pair in _merges(model) if {*pair, "".join(pair)} <= vocabulary.keys()]
        model |= {"vocab": vocabulary, "merges": [list(pair) for pair in merges]}
    else:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    added = [{**token, "id": new[token["id"]]} for token in tokenizer["added_tokens"]]
    padding = tokenizer["padding"]
    return {
        **tokenizer,
        "model": model,
        "added_tokens": added,
        "padding": padding and {**padding, "pad_id": new.get(padding["pad_id"], 0)},
        "post_processor": _renumbered(tokenizer["post_processor"], new),
    }


def renumber_config(values: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the keys of a config that name tokens (`eos_token_id` and so on), changed to the new ids.

    A token that does not exist is left out.
    """
    new = {old: number for number, old in enumerate(kept)}
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if key.endswith("_token_id") and isinstance(value, int):
            changed[key] = new.get(value)
        elif key.endswith("_token_id") and isinstance(value, list):
            changed[key] = [new[one] for one in value if one in new]
    return changed


def tokenizer_values(source: ModelSource) -> Values:
    """Return a model's `tokenizer.json`. Raises ModelError unless its vocabulary can be cut."""
    backend = getattr(source.tokenizer(), "backend_tokenizer", None)
    if backend is None:
        raise ModelError("model.path", repr(source.name), "its tokenizer has no tokenizer.json and cannot be cut")
    values: Values = json.loads(backend.to_str())
    kind = values["model"].get("type")
    if kind not in ("BPE", "Unigram"):
        raise ModelError("model.path", repr(source.name), f"its tokenizer is {kind}; only BPE and Unigram are cut")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if values["model"].get(key):
            raise ModelError("model.path", repr(source.name), f"its tokenizer has a {key} and cannot be cut")
    return values


def _texts(tokenizer: Values) -> dict[int, str]:
    """Return every token's text, by id."""
    vocabulary = tokenizer["model"]["vocab"]
    if tokenizer["model"]["type"] == "BPE":
        texts = {number: text for text, number in vocabulary.items()}
    else:
        texts = {number: text for number, (text, _) in enumerate(vocabulary)}
    return texts | {token["id"]: token["content"] for token in tokenizer["added_tokens"]}


def _merges(model: Values) -> list[tuple[str, str]]:
    """Return the merges in order; older files hold each as one text."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _on_the_way(text: str, rank: Mapping[tuple[str, str], int]) -> set[str]:
    """Return the pieces from which BPE makes a token, characters included.

    Within a longer word they are the same: no merge reaches over the ends of a piece that is left at the end.
    """
    pieces = list(text)
    seen = set(pieces)
    while len(pieces) > 1:
        ranks = [rank.get(pair) for pair in pairwise(pieces)]
        known = [number for number in ranks if number is not None]
        if not known:
            break
        at = ranks.index(min(known))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        seen.add(pieces[at])
    return seen


def _renumbered(processor: Values | None, new: Mapping[int, int]) -> Values | None:
    """Return a post-processor, which adds special tokens, with their new ids."""
    if processor is None:
        return None
    match processor["type"]:
        case "Sequence":
            return {**processor, "processors": [_renumbered(one, new) for one in processor["processors"]]}
        case "TemplateProcessing":
            tokens = {
                name: {**token, "ids": [new[old] for old in token["ids"]]}
                for name, token in processor["special_tokens"].items()
            }
            return {**processor, "special_tokens": tokens}
        case "RobertaProcessing" | "BertProcessing":
            ends = {key: [processor[key][0], new[processor[key][1]]] for key in ("sep", "cls")}
            return {**processor, **ends}
    return processor
