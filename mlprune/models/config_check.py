"""Checks what a model's config.json asks for, since it may come from anybody.

A million layers would keep transformers busy for hours, and other values make it fail only when the model runs.
Which families are supported is in `hollow`; the checkpoint's shapes are checked in `tensor_check`.
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
DEPTH = 20  # levels of sections and lists
# XGLM computes a vector for each position when it is built; its real models have 2048
COMPUTED_POSITIONS = {"xglm": 100_000}
# With these keys, transformers reads other files, replaces layers, or gives its results another form.
# Key -> the value that changes nothing, beside null.
REFUSED = {"transformers_weights": None, "fusion_config": None, "attribute_map": None, "return_dict": True}
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


def check_raw(raw: Mapping[str, object], name: str) -> None:
    """Check the content of config.json before transformers reads it. Raises ModelError."""
    for section in _sections(raw, name, DEPTH):
        for key, most in LENGTHS.items():
            value = section.get(key)
            if isinstance(value, int | float) and not abs(value) <= most:
                raise _error(name, key, value, f"{most:,} at most")
    for key, value in raw.items():
        replaces = key.startswith("__") or callable(getattr(PretrainedConfig, key, None))
        if replaces or (key in REFUSED and value is not None and value is not REFUSED[key]):
            raise _error(name, key, value, "remove this key")


def _sections(value: object, name: str, depth: int) -> Iterator[Mapping[str, object]]:
    if not isinstance(value, dict | list):
        return
    if not depth:
        raise ModelError("model.path", name, f"its config.json has more than {DEPTH} levels of brackets")
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        yield from _sections(inner, name, depth - 1)


def check_values(config: PretrainedConfig, name: str, trusted: bool) -> None:
    """Check the values that the model would be built with. Raises ModelError.

    `trusted`: whether the model's own code, and attention from the hub, may run.
    """
    text = config.get_text_config()
    if not isinstance(text, PretrainedConfig):
        raise _error(name, "text_config", text, "it must be a section of a known model_type")
    stated = {key: value for key in SIZES if (value := getattr(text, key, None)) is not None}
    sizes = {key: value for key, value in stated.items() if isinstance(value, int)}
    for key, value in stated.items():
        if key == "intermediate_size" and isinstance(value, list):  # of each layer, in Gemma 3n, not supported
            continue
        if key not in sizes or not 1 <= value <= SIZES[key]:
            raise _error(name, key, value, f"1 to {SIZES[key]:,}")
    _check_relations(text, sizes, name)
    for part in (config, text):
        _check_attention(part._attn_implementation, name, trusted)


def _check_relations(text: PretrainedConfig, sizes: Mapping[str, int], name: str) -> None:
    """Check values that must fit each other."""
    heads, groups = sizes.get("num_attention_heads", 1), sizes.get("num_key_value_heads", 1)
    if heads % groups:
        raise _error(name, "num_key_value_heads", groups, f"it must divide the {heads} attention heads")
    experts = sizes.get("num_local_experts", sizes.get("num_experts"))
    used = sizes.get("num_experts_per_tok", 1)
    if experts is not None and used > experts:
        raise _error(name, "num_experts_per_tok", used, f"at most its {experts} experts")
    pad, vocabulary = getattr(text, "pad_token_id", None), sizes.get("vocab_size")
    if isinstance(pad, int) and vocabulary is not None and pad >= vocabulary:
        raise _error(name, "pad_token_id", pad, f"it must be less than vocab_size, {vocabulary}")
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if (slides or window is not None) and not (isinstance(window, int) and window > 0):
        raise _error(name, "sliding_window", window, "it must be a number of tokens")
    positions, computed = sizes.get("max_position_embeddings", 1), COMPUTED_POSITIONS.get(text.model_type)
    if computed is not None and positions > computed:
        raise _error(name, "max_position_embeddings", positions, f"{computed:,} at most")


def _check_attention(attention: object, name: str, trusted: bool) -> None:
    """Refuse an attention implementation of the hub unless it is trusted: it is code. Its name has a slash."""
    if "/" in str(attention):
        if not trusted:
            remedy = f"its attention is code from the hub ({attention}): set model.trust_remote_code=true if you "
            raise ModelError("model.path", name, remedy + "trust it")
    elif attention is not None and attention not in ATTENTION:
        raise _error(name, "_attn_implementation", attention, f"write one of {', '.join(ATTENTION)}")


def _error(name: str, key: str, value: object, remedy: str) -> ModelError:
    return ModelError("model.path", name, f"its config.json has {key} {value!s:.80}: {remedy}")
