"""Measures a model from its configuration alone: it is built on the meta device, without weights.

Sizes are in bytes unless a comment says otherwise. What workers need beyond the weights is in `memory`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from mlprune.errors import SpecError
from mlprune.models.hollow import check_family, decoder_layers, layer_count, meta_model
from mlprune.models.matrices import has_experts, matrices
from mlprune.models.weight_files import readable
from mlprune.models.zero import Layout
from mlprune.spec.variants import Pattern


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model in a dtype, and the shapes of the matrices that are pruned."""

    layers: tuple[int, ...]  # bytes of each decoder layer
    ends: tuple[int, int]  # bytes of the embedding (first shard) and of the head (last shard)
    tied: bool  # whether embedding and head are the same weights
    total: int  # bytes of the whole model; tied weights are counted once
    pruned: tuple[int, ...]  # number of weights in the matrices of each layer
    active: int  # weights used per token, head included; of a mixture, only the experts that a token is routed to
    packed: int  # elements of the largest layer when packed for ZeRO
    largest_matrix: int  # number of weights
    shapes: Mapping[str, tuple[int, int]]  # matrix, e.g. 0.mlp.down_proj -> output and input channels
    layer_widths: tuple[int, ...]  # sum of the input channels of each layer's matrices
    hidden: int  # hidden width
    intermediate: int  # input channels of the widest matrix
    heads: int
    cached: int  # numbers in a layer's key-value cache per token
    vocabulary: int
    positions: int | None  # maximum context length in tokens
    has_experts: bool
    dtype: torch.dtype

    @property
    def widths(self) -> dict[str, int]:
        """Return the input channels of each matrix."""
        return {name: width for name, (_, width) in self.shapes.items()}

    @property
    def pruned_total(self) -> int:
        """Return the number of weights in all matrices."""
        return sum(self.pruned)

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token's hidden state."""
        return self.hidden * self.dtype.itemsize


def measure_model(config: PretrainedConfig, dtype: torch.dtype, name: str) -> ModelSize:
    """Measure the model of `config` in `dtype`.

    Raises ModelError for a family that cannot be sharded, and for a config of which no model can be built.
    """
    check_family(config, name)
    with readable(name, "config.json"):
        model = meta_model(config).to(dtype)
        _, layers = decoder_layers(model, layer_count(config))
    text = config.get_text_config()
    shapes: dict[str, tuple[int, int]] = {}
    layer_widths: Counter[int] = Counter()
    pruned, routed = [], 0
    largest = 0
    for number, layer in enumerate(layers):
        counts = []
        for key, matrix in matrices(layer).items():
            rows, columns = matrix.view_OI(layer.get_parameter(matrix.parameter)).shape
            shapes[f"{number}.{key}"] = rows, columns
            layer_widths[number] += columns
            counts.append(rows * columns)
            routed += rows * columns * (matrix.expert is not None)
        pruned.append(sum(counts))
        largest = max(largest, *counts)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    used = getattr(text, "num_experts_per_tok", None) or 1
    return ModelSize(
        layers=tuple(_bytes_of(layer) for layer in layers),
        ends=(_bytes_of(embedding), head.weight.nbytes),
        tied=embedding.weight is head.weight,
        total=_bytes_of(model),
        pruned=tuple(pruned),
        active=sum(pruned) - routed + routed * used // experts + head.weight.numel(),
        packed=max(Layout.of(layer, dtype).elements for layer in layers),
        largest_matrix=largest,
        shapes=shapes,
        layer_widths=tuple(layer_widths[number] for number in range(len(layers))),
        hidden=int(text.hidden_size),
        intermediate=max(columns for _, columns in shapes.values()),
        heads=int(text.num_attention_heads),
        cached=_cached(text),
        vocabulary=len(embedding.weight),
        positions=getattr(text, "max_position_embeddings", None),
        has_experts=any(has_experts(layer) for layer in layers),
        dtype=dtype,
    )


def _cached(text: PretrainedConfig) -> int:
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * heads * width)


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def check_pattern(model: ModelSize, pattern: Pattern, key: str) -> None:
    """Raise SpecError if the input width of a matrix is not a multiple of the pattern's group."""
    for name, width in model.widths.items():
        if pattern.group and width % pattern.group:
            remedy = f"the {width} inputs of layer {name} are not divisible by {pattern.group}; use unstructured"
            raise SpecError(key, repr(str(pattern)), remedy)
