"""Layers to shards, by bytes, and what memory each shard needs: from the configuration alone.

Sizes are bytes. The whole model is built without weights, so that no checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig

from mlprune.console import size_text
from mlprune.data.calibration import MICRO_BATCH_TOKENS
from mlprune.errors import ModelError, SpecError
from mlprune.models.hollow import Span, check_family, decoder_layers, layer_count, meta_model
from mlprune.models.matrices import has_experts, matrices
from mlprune.shards.worker import LOGIT_TOKENS
from mlprune.variants import Pattern

# what an activation of a layer takes beside the weights: a handful of [tokens, width] tensors, in float32
ACTIVATIONS_OF_A_LAYER = 8


@dataclass(frozen=True)
class ModelShape:
    """What the planner knows of a model: sizes, and the input widths that an n:m pattern must divide."""

    layers: tuple[int, ...]  # bytes of each decoder layer
    ends: tuple[int, int]  # bytes of the embedding, on the first shard, and of the head, on the last
    tied: bool  # whether the two are the same weights
    pruned: int  # weights in matrices
    largest_layer: int  # weights in the matrices of the largest layer
    total: int  # bytes of the whole model, tied weights once
    widths: Mapping[str, int]  # matrix -> input channels
    hidden: int  # hidden width
    intermediate: int  # the widest input of a matrix
    vocabulary: int
    positions: int | None  # tokens that the model takes at most
    has_experts: bool
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.hidden * self.dtype.itemsize


def model_shape(config: PretrainedConfig, dtype: torch.dtype, name: str) -> ModelShape:
    """Measure the model of `config` in `dtype`. Raises ModelError for a family that cannot be sharded."""
    check_family(config, name)
    model = meta_model(config)
    _, layers = decoder_layers(model, layer_count(config))
    found = [(layer, matrices(layer)) for layer in layers]
    weights = [
        {key: matrix.view_OI(layer.get_parameter(matrix.parameter)) for key, matrix in held.items()}
        for layer, held in found
    ]
    widths = {f"{n}.{key}": view.shape[1] for n, held in enumerate(weights) for key, view in held.items()}
    in_layers = [sum(p.numel() for p in layer.parameters()) * dtype.itemsize for layer in layers]
    total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    counts = [sum(view.numel() for view in held.values()) for held in weights]
    head = model.get_output_embeddings().weight.numel() * dtype.itemsize
    text = config.get_text_config()
    return ModelShape(
        layers=tuple(in_layers),
        ends=(_bytes_of(model.get_input_embeddings(), dtype), head),
        tied=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        pruned=sum(counts),
        largest_layer=max(counts),
        total=total,
        widths=widths,
        hidden=int(text.hidden_size),
        intermediate=max(widths.values()),
        vocabulary=len(model.get_input_embeddings().weight),
        positions=getattr(text, "max_position_embeddings", None),
        has_experts=any(has_experts(layer) for layer in layers),
        dtype=dtype,
    )


def _bytes_of(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def check_pattern(shape: ModelShape, pattern: Pattern, key: str) -> None:
    """Raise SpecError when a matrix's input width is no multiple of the pattern's group."""
    for name, width in shape.widths.items():
        if pattern.group and width % pattern.group:
            remedy = f"the {width} inputs of layer {name} are not divisible by {pattern.group}; use unstructured"
            raise SpecError(key, repr(str(pattern)), remedy)


def cut(shape: ModelShape, shards: int) -> tuple[Span, ...]:
    """Contiguous spans whose largest is as small as can be, in bytes; every shard gets a layer."""
    count = len(shape.layers)
    if not 1 <= shards <= count:
        raise SpecError("pipeline.shards", shards, f"the model has {count} layers; write 1 to {count}")
    sizes = list(shape.layers)
    if shards > 1:  # one shard holds all, in whatever way
        sizes[0] += shape.ends[0]
        sizes[-1] += shape.ends[1]
    starts = _starts(sizes, shards)
    return tuple(Span(a, b, count) for a, b in zip(starts, [*starts[1:], count], strict=True))


def _starts(sizes: Sequence[int], shards: int) -> list[int]:
    """Where each part starts, by the smallest limit that `shards` parts can keep to (bisection)."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(sizes, middle, 1)) <= shards:
            high = middle
        else:
            low = middle + 1
    return _fill(sizes, low, shards)


def _fill(sizes: Sequence[int], limit: int, at_least: int) -> list[int]:
    """Starts of parts filled up to `limit` in order, in at least `at_least` parts."""
    starts, held = [0], 0
    for index, size in enumerate(sizes):
        must_open = len(sizes) - index == at_least - len(starts)  # one layer each for the shards still empty
        if index and (held + size > limit or must_open):
            starts.append(index)
            held = 0
        held += size
    return starts


@dataclass(frozen=True)
class ShardMemory:
    """The most bytes that one shard needs, by kind."""

    weights: int
    masked_layer: int
    hidden: int
    activations: int
    moments: int
    masks: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def shard_memory(shape: ModelShape, span: Span, tokens: int, sets: int, variants: int) -> ShardMemory:
    """The memory of `span`, with `tokens` in flight, `sets` calibration sets and `variants` alive at once."""
    ends = shape.ends[0] * span.is_first + shape.ends[1] * span.is_last
    if shape.tied and span.is_first and span.is_last:
        ends = shape.ends[0]
    share = (span.end - span.first) / span.count
    widths = sum(width for name, width in shape.widths.items() if int(name.split(".")[0]) in span.layers)
    return ShardMemory(
        weights=sum(shape.layers[index] for index in span.layers) + ends,
        masked_layer=shape.largest_layer * (shape.dtype.itemsize + 4 + 1),  # a copy, its scores, its mask
        hidden=2 * tokens * shape.token_bytes,
        activations=ACTIVATIONS_OF_A_LAYER * MICRO_BATCH_TOKENS * shape.intermediate * 4,
        moments=sets * widths * 8,
        masks=int(variants * shape.pruned * share / 8),
        logits=2 * LOGIT_TOKENS * shape.vocabulary * 4 * span.is_last,
    )


def auto_shards(layers: int) -> int:
    """One shard a GPU of this machine; one shard where there is none."""
    return min(max(1, torch.cuda.device_count()), layers)


def check_memory(needs: Sequence[ShardMemory], name: str) -> None:
    """Raise ModelError when the shards do not fit this machine: its GPUs if it has any, else its memory."""
    if torch.cuda.is_available():
        have = torch.cuda.mem_get_info()[1]
        need, where = max(need.total for need in needs), "a GPU"
    else:
        have = psutil.virtual_memory().available
        need, where = sum(need.total for need in needs), "this machine's free memory"
    if need > have:
        remedy = f"needs {size_text(need)} of {size_text(have)}, {where}; take more shards or bfloat16"
        raise ModelError("model.path", repr(name), remedy)
