"""What can be cut out of every decoder layer so that only sizes in `config.json` change, and the cutting.

channels   a channel of the feed-forward network: a row of the matrices before its activation, a column of the one
           behind it
heads      a key-value head with its queries: their rows in the projections, their columns in the output projection

Either is called a unit. Without its columns nothing reads it, so its rows can go too.

U: units. O: output channels. I: input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mlprune.errors import SpecError
from mlprune.models.matrices import matrices
from mlprune.spec.variants import Structure


@dataclass(frozen=True)
class Units:
    """The units of one structure in a layer: in which matrices (names within the layer), and in which sizes.

    `before`: for each matrix that computes the units, the rows of one unit in each of its sections; phi3's joint
    projections have several sections. `behind`: the matrix that reads them, with `columns` of each unit. `sizes`:
    for each key of `config.json` what one unit contributes; `fixed`: keys that are written out because they would
    otherwise follow from others.
    """

    before: Mapping[str, tuple[int, ...]]
    behind: str
    sizes: Mapping[str, int]
    columns: int = 1
    fixed: Mapping[str, int] = field(default_factory=dict)

    def rows(self, name: str, keep_U: Tensor) -> Tensor:
        """Return the rows of a matrix of `before` that stay, bool [O]."""
        return torch.cat([keep_U.repeat_interleave(rows) for rows in self.before[name]])

    def kept_columns(self, keep_U: Tensor) -> Tensor:
        """Return the columns of `behind` that stay, bool [I]."""
        return keep_U.repeat_interleave(self.columns)

    def config_sizes(self, kept: int) -> dict[str, int]:
        """Return the changed keys of `config.json` when `kept` units stay."""
        return {**self.fixed, **{key: kept * size for key, size in self.sizes.items()}}


_GATED = Units({"mlp.gate_proj": (1,), "mlp.up_proj": (1,)}, "mlp.down_proj", {"intermediate_size": 1})
_FC = Units({"fc1": (1,)}, "fc2", {"ffn_dim": 1})
_NEOX = Units({"mlp.dense_h_to_4h": (1,)}, "mlp.dense_4h_to_h", {"intermediate_size": 1})
# Families whose width is in the configuration. Bloom's is always four times the hidden width; mixtures have
# experts instead. tests/test_structured.py prunes and exports a model of each.
FEED_FORWARD: Mapping[str, Units] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral"), _GATED),
    **dict.fromkeys(("olmo2", "qwen2", "qwen3", "smollm3"), _GATED),
    "gpt2": Units({"mlp.c_fc": (1,)}, "mlp.c_proj", {"n_inner": 1}),
    "gpt_neox": _NEOX,
    "opt": _FC,
    "phi3": Units({"mlp.gate_up_proj": (1, 1)}, "mlp.down_proj", {"intermediate_size": 1}),
    "xglm": _FC,
}
# Families whose heads have a width of their own, independent of their number. In olmo2, queries are normalised
# over all heads, so the others would change.
HEADS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")


def find_units(config: PretrainedConfig, structure: Structure) -> Units:
    """Return the units of a structure in the layers of a model. Raises SpecError for a family that has none."""
    family, text = config.model_type, config.get_text_config()
    families = tuple(FEED_FORWARD) if structure == "channels" else HEADS
    if family not in families:
        remedy = f"those of {family} have no size in config.json; write another, or use {', '.join(families)}"
        raise SpecError("search.pattern", repr(structure), remedy)
    if structure == "channels":
        return FEED_FORWARD[family]
    queries, groups = int(text.num_attention_heads), int(text.num_key_value_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // queries)
    columns = queries // groups * width
    names = {f"self_attn.{name}_proj": (rows,) for name, rows in (("q", columns), ("k", width), ("v", width))}
    return Units(
        before={"self_attn.qkv_proj": (columns, width, width)} if family == "phi3" else names,
        behind="self_attn.o_proj",
        sizes={"num_attention_heads": queries // groups, "num_key_value_heads": 1},
        columns=columns,
        fixed={"head_dim": width},
    )


def smaller_config(config: PretrainedConfig, units: Units, kept: int) -> PretrainedConfig:
    """Return the configuration of the model with `kept` units in every layer.

    Raises ValueError for sizes that the family's class in transformers refuses.
    """
    sizes = units.config_sizes(kept)
    smaller: PretrainedConfig = type(config).from_dict({**config.to_dict(), **sizes})
    return smaller


def cut_out(layer: nn.Module, weights: Mapping[str, Tensor], units: Units, keep_U: Tensor) -> dict[str, Tensor]:
    """Return the layer's weights (by name within the layer) without the rows and columns of removed units."""
    cut, by_name = dict(weights), matrices(layer)
    for name in units.before:
        matrix, bias = by_name[name], f"{name}.bias"
        weight_OI = matrix.view_OI(cut[matrix.parameter])
        keep_O = units.rows(name, keep_U.to(weight_OI.device))
        cut[matrix.parameter] = _as_stored(weight_OI[keep_O], matrix.transposed)
        if bias in cut:
            cut[bias] = cut[bias][keep_O]
    matrix = by_name[units.behind]
    weight_OI = matrix.view_OI(cut[matrix.parameter])
    keep_I = units.kept_columns(keep_U.to(weight_OI.device))
    cut[matrix.parameter] = _as_stored(weight_OI[:, keep_I], matrix.transposed)
    return cut


def _as_stored(weight_OI: Tensor, transposed: bool) -> Tensor:
    return (weight_OI.T if transposed else weight_OI).clone(memory_format=torch.contiguous_format)
