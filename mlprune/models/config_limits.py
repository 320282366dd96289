"""Bounds on the numbers in a model's config.json, which may come from anybody.

A million layers, or a billion labels, would keep transformers busy for hours before it fails. Which families are
supported is in `hollow`; whether the weights fit is computed in `planning`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PretrainedConfig

from mlprune.errors import ModelError

# Configuration classes make lists of this length: checked before one is made. Families name layers differently.
LENGTHS = {
    "num_hidden_layers": 1000,
    "n_layer": 1000,
    "n_layers": 1000,
    "num_layers": 1000,
    "num_labels": 100_000,
}
# name in transformers -> the largest value; the smallest is 1. A family without such a key is not checked for it.
SIZES = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 100_000_000,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
    "num_experts_per_tok": 10_000,
}
DEPTH = 20  # sections within sections


def check_lengths(raw: object, name: str) -> None:
    """Check the content of config.json before transformers reads it. Raises ModelError."""
    for section in _sections(raw, name, DEPTH):
        for key, most in LENGTHS.items():
            value = section.get(key)
            if isinstance(value, int | float) and not abs(value) <= most:
                raise _error(name, key, value, f"{most:,} at most")


def _sections(value: object, name: str, depth: int) -> Iterator[Mapping[str, object]]:
    if not isinstance(value, dict | list):
        return
    if not depth:
        raise ModelError("model.path", name, f"its config.json has more than {DEPTH} levels of brackets")
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        yield from _sections(inner, name, depth - 1)


def check_sizes(config: PretrainedConfig, name: str) -> None:
    """Check the sizes that the model would be built with. Raises ModelError."""
    text = config.get_text_config()
    sizes: dict[str, int] = {}
    for key, most in SIZES.items():
        value = getattr(text, key, None)
        if isinstance(value, int):
            sizes[key] = value
        if isinstance(value, int) and not 1 <= value <= most:
            raise _error(name, key, value, f"1 to {most:,}")
    heads, groups = sizes.get("num_attention_heads", 1), sizes.get("num_key_value_heads", 1)
    if heads % groups:
        raise _error(name, "num_key_value_heads", groups, f"it must divide the {heads} attention heads")
    vocabulary, pad = sizes.get("vocab_size"), getattr(text, "pad_token_id", None)
    if isinstance(pad, int) and vocabulary is not None and pad >= vocabulary:
        raise _error(name, "pad_token_id", pad, f"it must be less than vocab_size, {vocabulary}")


def _error(name: str, key: str, value: object, remedy: str) -> ModelError:
    return ModelError("model.path", name, f"its config.json has {key} {value!s:.80}: {remedy}")
