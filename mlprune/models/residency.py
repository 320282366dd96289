"""Where a shard's weights are kept. Code that uses a layer's weights must borrow the layer.

`resident` weights are on the device all the time; that residency is here. `zero` weights are offloaded and
fetched when a layer is borrowed; that residency is in `zero`. The dense weights are never overwritten: a
variant's weights are masked copies, one layer at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlprune.models.matrices import matrices
from mlprune.models.memory import Heap
from mlprune.pruning.masks import LayerMasks


@dataclass(frozen=True)
class Ranks:
    """One of the processes that hold a shard together. `address` (`host:port`) is where they find each other.

    A single rank has no address.
    """

    rank: int = 0
    size: int = 1
    address: str = ""

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, which stores and returns what all ranks share."""
        return self.rank == 0


SINGLE_RANK = Ranks()


class Residency(ABC):
    """The layers of one shard."""

    @abstractmethod
    def borrow(self, index: int, prefetch: int | None = None) -> AbstractContextManager[nn.Module]:
        """Yield the layer with its dense weights in place, until the block ends.

        `prefetch` is the layer that will be borrowed next: it may be fetched while this one works.
        """

    @abstractmethod
    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the ranks that hold the shard. Every rank must call this."""

    @abstractmethod
    def close(self) -> None:
        """Release the weights and, if they are offloaded, their storage."""


class Resident(Residency):
    """Layers whose weights are on the device all the time."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self._layers = dict(layers)
        self._heap = Heap()

    @contextmanager
    def borrow(self, index: int, prefetch: int | None = None) -> Iterator[nn.Module]:
        try:
            yield self._layers[index]
        finally:
            self._heap.trim()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def close(self) -> None:
        self._layers.clear()


@contextmanager
def masked_by(layer: nn.Module, masks: LayerMasks | None) -> Iterator[None]:
    """Apply `masks` to the borrowed layer until the block ends; without any it stays dense."""
    if not masks:
        yield
        return
    dense = {name: layer.get_parameter(name).data for name in pruned_parameters(layer)}
    try:
        for name, data in masked(layer, masks).items():
            layer.get_parameter(name).data = data
        yield
    finally:
        for name, data in dense.items():
            layer.get_parameter(name).data = data


def pruned_parameters(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the layer's parameters that contain pruned matrices."""
    return tuple(dict.fromkeys(matrix.parameter for matrix in matrices(layer).values()))


def masked(layer: nn.Module, masks: LayerMasks) -> dict[str, Tensor]:
    """Return masked copies of the layer's pruned parameters, by name: every dropped weight is +0."""
    copies = {
        name: layer.get_parameter(name).data.clone(memory_format=torch.preserve_format)
        for name in pruned_parameters(layer)
    }
    by_name = matrices(layer)
    for name, mask in masks.items():
        mask.apply_(by_name[name].view_OI(copies[by_name[name].parameter]))
    return copies
