"""Compares a checkpoint's tensors with those of its model, by names, shapes and dtypes. No weight is read.

Hugging Face's own loader compares them, on tensors without content, so that renamed, stacked and tied tensors are
treated as when the weights are loaded. It would pass over tensors that the model does not use, such as the scales
of quantised weights, and the numbers would be wrong without a word; here they are an error.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict
from transformers.utils.loading_report import LoadStateDictInfo

from mlprune.errors import ModelError
from mlprune.models.hollow import meta_model
from mlprune.models.quantization import PLAIN, check_method, converted_tensors
from mlprune.models.quiet import quiet_transformers
from mlprune.models.source import ModelSource
from mlprune.models.weight_files import readable

MOST_TENSORS = 200_000  # twice the number of a large mixture of experts; comparing them takes a minute


def check_tensors(source: ModelSource) -> None:
    """Raise ModelError unless the checkpoint has the model's tensors, in their shapes, and no others.

    Tensors that the model's class in transformers ignores are allowed, such as the attention masks (`attn.bias`)
    that GPT-2 was once saved with, and the rotary frequencies (`inv_freq`) of old Llama models.
    """
    config = source.config()
    check_method(config, source.name)
    stored = _stored_tensors(source)
    with readable(source.name, "quantization_config"):
        stored = converted_tensors(stored, config, source.name)
    model = meta_model(config)
    plain = {key: tensor for key, tensor in stored.items() if tensor.dtype in PLAIN}
    others = stored.keys() - plain.keys()
    with readable(source.name, "weights"), quiet_transformers():
        info = _compare(model, plain, others)
    if quantised := sorted(others & info.unexpected_keys):
        kind = str(stored[quantised[0]].dtype).removeprefix("torch.")
        remedy = f"{_first_of(quantised)} in the checkpoint are {kind}, so the weights are quantised: name the "
        raise ModelError("model.path", source.name, remedy + "model before quantisation")
    if remedy := _difference(info):
        raise ModelError("model.path", source.name, remedy)


def _difference(info: LoadStateDictInfo) -> str:
    """Return what the loader's report says of a checkpoint that does not fit its config; nothing if it fits."""
    if info.unexpected_keys:
        remedy = "which the model of its config.json does not use: correct the config, or name another checkpoint"
        return f"the checkpoint has {_first_of(info.unexpected_keys)}, {remedy}"
    if info.mismatched_keys:
        key, shape, expected = min(info.mismatched_keys)
        return f"{key} is {list(shape)} in the checkpoint, and {list(expected)} by its config.json"
    if info.conversion_errors:
        return f"the checkpoint's tensors for {_first_of(info.conversion_errors)} do not fit together"
    return f"the checkpoint lacks {_first_of(info.missing_keys)}" if info.missing_keys else ""


def _stored_tensors(source: ModelSource) -> dict[str, Tensor]:
    """Return the tensors of all files, without content."""
    stored: dict[str, Tensor] = {}
    for file in source.weight_files():
        with readable(source.name, file.name):
            tensors = load_state_dict(str(file), map_location="meta")
            stored |= {str(key): tensor for key, tensor in tensors.items()}
        if len(stored) > MOST_TENSORS:
            raise ModelError("model.path", source.name, f"the checkpoint has more than {MOST_TENSORS:,} tensors")
    return stored


def _compare(model: PreTrainedModel, plain: dict[str, Tensor], others: Iterable[str]) -> LoadStateDictInfo:
    """Return the loader's report; `others` are reported as unexpected unless the model's class ignores them."""
    mapping = get_model_conversion_mapping(model)
    options = LoadStateDictConfig(device_map={"": torch.device("meta")}, weight_mapping=mapping)
    info, _ = convert_and_load_state_dict_in_model(model=model, state_dict=plain, load_config=options)
    info.unexpected_keys.update(others)
    model._adjust_missing_and_unexpected_keys(info)
    tied = model.all_tied_weights_keys
    info.missing_keys -= {target for target, kept in tied.items() if kept not in info.missing_keys}
    return info


def _first_of(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first
