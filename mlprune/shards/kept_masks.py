"""Masks that a shard keeps in host memory between the stages of a sweep, within a number of bytes.

A variant whose masks are no longer kept gets them made again: nothing depends on what is here but time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from mlprune.pruning.masks import LayerMasks
from mlprune.shards.masking import MaskSummary

Kept = tuple[dict[int, LayerMasks], list[MaskSummary]]  # by layer; one a layer


class KeptMasks:
    """The masks of the variants that were used last, as many as fit into `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_variant: OrderedDict[str, Kept] = OrderedDict()

    def put(self, variant: str, masks: Mapping[int, LayerMasks], summaries: Sequence[MaskSummary]) -> None:
        """Keep a variant's masks; drop those that were kept first until all fit."""
        on_host = _on(masks, torch.device("cpu"))
        self._by_variant[variant] = on_host, list(summaries)
        while self._bytes() > self._limit:
            self._by_variant.popitem(last=False)

    def take(self, variant: str, device: torch.device) -> Kept | None:
        """Return a variant's masks on the device, and keep them no longer; None if they are not kept."""
        kept = self._by_variant.pop(variant, None)
        return kept and (_on(kept[0], device), kept[1])

    def clear(self) -> None:
        """Keep nothing."""
        self._by_variant.clear()

    def _bytes(self) -> int:
        layers = (masks for kept, _ in self._by_variant.values() for masks in kept.values())
        return sum(mask.bytes for masks in layers for mask in masks.values())


def _on(masks: Mapping[int, LayerMasks], device: torch.device) -> dict[int, LayerMasks]:
    return {index: {name: mask.to(device) for name, mask in layer.items()} for index, layer in masks.items()}
