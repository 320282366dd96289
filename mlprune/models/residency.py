"""Where a shard's weights live. Whoever touches a layer's weights borrows the layer.

Here: `resident`, the weights stay on the device. A variant's weights are a masked copy of one layer at a
time; the dense weights are never overwritten.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mlprune.models.matrices import matrices
from mlprune.pruning.masks import PackedMask


class Resident:
    """Layers whose weights are on the device all the time."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self._layers = layers

    @contextmanager
    def borrow(self, index: int, masks: Mapping[str, PackedMask] | None = None) -> Iterator[nn.Module]:
        """The layer with its weights in place, masked if `masks` are given; dense again afterwards."""
        layer = self._layers[index]
        if masks is None:
            yield layer
            return
        dense = {name: layer.get_parameter(name).data for name in pruned_parameters(layer)}
        try:
            for name, data in masked(layer, masks).items():
                layer.get_parameter(name).data = data
            yield layer
        finally:
            for name, data in dense.items():
                layer.get_parameter(name).data = data


def pruned_parameters(layer: nn.Module) -> tuple[str, ...]:
    """The parameters of the layer that hold matrices."""
    return tuple(dict.fromkeys(matrix.parameter for matrix in matrices(layer).values()))


def masked(layer: nn.Module, masks: Mapping[str, PackedMask]) -> dict[str, Tensor]:
    """Masked copies of the layer's pruned parameters: every dropped weight is +0."""
    copies = {
        name: layer.get_parameter(name).data.clone(memory_format=torch.preserve_format)
        for name in pruned_parameters(layer)
    }
    for name, matrix in matrices(layer).items():
        matrix.view_OI(copies[matrix.parameter]).masked_fill_(~masks[name].unpack(), 0)
    return copies
