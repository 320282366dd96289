"""The feed-forward network of a decoder layer: which matrices its channels are in, and how it is made narrower.

O: output channels. I: input channels. C: channels of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mlprune.errors import SpecError
from mlprune.models.matrices import matrices


@dataclass(frozen=True)
class FeedForward:
    """The names of its matrices within the layer, and the key of `config.json` that holds its width.

    `before` the activation: a channel is a row of each of them (of phi3's, in which gate and up are joined, a row
    of each half). `behind` the activation: a channel is a column.
    """

    before: tuple[str, ...]
    behind: str
    width_key: str


_GATED = FeedForward(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size")
_FC = FeedForward(("fc1",), "fc2", "ffn_dim")
# Families whose width is in the configuration. Bloom's is always four times the hidden width; mixtures have
# experts instead. tests/test_channels.py prunes and exports a model of each.
FEED_FORWARD: Mapping[str, FeedForward] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral"), _GATED),
    **dict.fromkeys(("olmo2", "qwen2", "qwen3", "smollm3"), _GATED),
    "gpt2": FeedForward(("mlp.c_fc",), "mlp.c_proj", "n_inner"),
    "gpt_neox": FeedForward(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "intermediate_size"),
    "opt": _FC,
    "phi3": FeedForward(("mlp.gate_up_proj",), "mlp.down_proj", "intermediate_size"),
    "xglm": _FC,
}


def find_feed_forward(config: PretrainedConfig, key: str, value: str) -> FeedForward:
    """Return the feed-forward network of a family. Raises SpecError, naming `key` and `value`, if it has none."""
    family = config.model_type
    if family not in FEED_FORWARD:
        remedy = f"the width of {family} cannot be configured; channels are removed from {', '.join(FEED_FORWARD)}"
        raise SpecError(key, value, remedy)
    return FEED_FORWARD[family]


def cut_channels(
    layer: nn.Module, weights: Mapping[str, Tensor], feed_forward: FeedForward, keep_C: Tensor
) -> dict[str, Tensor]:
    """Return the layer's weights (by name within the layer) without the rows and columns of removed channels."""
    cut = dict(weights)
    by_name = matrices(layer)
    for name in feed_forward.before:
        matrix, bias = by_name[name], f"{name}.bias"
        weight_OI = matrix.view_OI(cut[matrix.parameter])
        keep_O = keep_C.repeat(len(weight_OI) // len(keep_C)).to(weight_OI.device)
        cut[matrix.parameter] = _as_stored(weight_OI[keep_O], matrix.transposed)
        if bias in cut:
            cut[bias] = cut[bias][keep_O]
    matrix = by_name[feed_forward.behind]
    weight_OI = matrix.view_OI(cut[matrix.parameter])
    cut[matrix.parameter] = _as_stored(weight_OI[:, keep_C.to(weight_OI.device)], matrix.transposed)
    return cut


def _as_stored(weight_OI: Tensor, transposed: bool) -> Tensor:
    return (weight_OI.T if transposed else weight_OI).clone(memory_format=torch.contiguous_format)
