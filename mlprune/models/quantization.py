"""Quantised checkpoints: FP8 in blocks is converted to plain weights as it is loaded, all other kinds are refused.

The scales of FP8 weights are checked here; names and shapes of all other tensors in `tensor_check`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import FineGrainedFP8Config, PretrainedConfig
from transformers.utils import is_accelerate_available

from mlprune.errors import ModelError

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONVERTED = "fp8"  # the quant_method of DeepSeek, Qwen and others: a scale for each block of a matrix
SCALE = "_scale_inv"  # follows the name of the weight
# of the inputs of a matrix, which are not quantised here
UNUSED = ("activation_scale", "input_scale")


def quantization(config: PretrainedConfig) -> Mapping[str, object] | None:
    """Return the quantisation that the configuration states; None for plain weights."""
    stated = getattr(config, "quantization_config", None)
    stated = stated or getattr(config.get_text_config(), "quantization_config", None)
    return stated if stated is None or isinstance(stated, dict) else {"quant_method": stated}


def check_method(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError unless the weights are plain, or of the kind that is converted."""
    stated = quantization(config)
    if stated is None:
        return
    method = stated.get("quant_method")
    if method != CONVERTED or stated.get("scale_fmt", "float") != "float" or stated.get("modules_to_convert"):
        kind = f"quantised ({method})" if method != CONVERTED else "quantised in an unknown kind of fp8"
        raise ModelError("model.path", name, f"its weights are {kind}: name the model before quantisation")
    if not is_accelerate_available():
        raise ModelError(
            "model.path", name, "its weights are fp8, which needs a package: pip install 'mlprune[fp8]'"
        )


def loading_options(config: PretrainedConfig) -> dict[str, object]:
    """Return the options of `from_pretrained` that convert the weights."""
    return {} if quantization(config) is None else {"quantization_config": FineGrainedFP8Config(dequantize=True)}


def remove_quantization(config: PretrainedConfig) -> None:
    """Remove the quantisation from a configuration whose weights have been converted."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def converted_tensors(stored: Mapping[str, Tensor], config: PretrainedConfig, name: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint as they are after conversion, without content.

    Raises ModelError for FP8 weights without the scales of their blocks: transformers would take them as they are,
    and it derives the blocks from the number of scales, which is wrong where the last block is smaller.
    """
    stated = quantization(config)
    if stated is None:
        return dict(stored)
    block = stated.get("weight_block_size", (128, 128))
    converted = {}
    for key, tensor in stored.items():
        if key.endswith((SCALE, *UNUSED)):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            _check_scales(key, tensor, stored.get(key + SCALE), block, name)
            tensor = torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
        converted[key] = tensor
    orphans = [key for key in stored if key.endswith(SCALE) and key.removesuffix(SCALE) not in stored]
    if orphans:
        raise ModelError("model.path", name, f"the checkpoint has {orphans[0]} without its weight")
    return converted


def _check_scales(key: str, weight: Tensor, scale: Tensor | None, block: object, name: str) -> None:
    expected: list[int] | None = []
    if isinstance(block, list | tuple):
        rows, columns = block
        fits = weight.ndim == 2 and not weight.shape[0] % rows and not weight.shape[1] % columns
        expected = [weight.shape[0] // rows, weight.shape[1] // columns] if fits else None
    shape = None if scale is None else list(scale.shape)
    if shape is None or (shape != expected and not (expected == [] and shape in ([1], [1, 1]))):
        remedy = f"{key} is fp8, {list(weight.shape)} in blocks of {block}, with scales {shape or 'missing'}"
        raise ModelError("model.path", name, f"{remedy}: name the model before quantisation")
