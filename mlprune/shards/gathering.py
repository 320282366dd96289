"""A shard's moments: which tokens enter them, their sum over ranks, and loading them from the store.

How they are observed in a layer is in `mlprune.models.matrices`.

B: rows of a micro-batch. T: its tokens. I: input channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlprune.data.batches import Batch
from mlprune.models.residency import Ranks, Residency
from mlprune.pruning.moments import Moments
from mlprune.storage.moments import CorruptMomentsError, MomentStore


def real_tokens(batch: Batch, device: torch.device) -> Tensor | None:
    """Return which positions of the micro-batch are tokens, [B * T] bool; None when there is no padding."""
    if batch.tokens == batch.input_ids.numel():
        return None
    return batch.attention_mask.reshape(-1).bool().to(device)


def over_ranks(residency: Residency, ranks: Ranks, moments: Mapping[str, Moments]) -> Mapping[str, Moments]:
    """Sum a layer's moments over the ranks. The order of summing differs from that of a single rank."""
    if ranks.size == 1:
        return moments
    sums = [seen.sumsq_I for seen in moments.values()]
    parts = [sums[0].new_tensor([seen.tokens for seen in moments.values()]), *sums]
    total = residency.sum_over_ranks(torch.cat(parts))
    counts, *sums = torch.split(total, [len(part) for part in parts])
    grams = [None if seen.gram_II is None else residency.sum_over_ranks(seen.gram_II) for seen in moments.values()]
    return {
        name: Moments(int(count), sumsq_I, gram_II)
        for name, count, sumsq_I, gram_II in zip(moments, counts.tolist(), sums, grams, strict=True)
    }


@dataclass(frozen=True)
class StoredMoments:
    """What was in the store: whether all layers of the shard, and which files were corrupt."""

    complete: bool
    corrupt: tuple[str, ...] = ()


def from_store(
    store: MomentStore, key: str, layers: Sequence[int], device: torch.device
) -> tuple[dict[int, Mapping[str, Moments]], StoredMoments]:
    """Load a calibration set's moments of the layers that the store has, on the device."""
    by_layer: dict[int, Mapping[str, Moments]] = {}
    corrupt = []
    for index in layers:
        try:
            moments = store.load(key, index)
        except CorruptMomentsError as error:
            corrupt.append(str(error))
            continue
        if moments is not None:
            by_layer[index] = {name: seen.to(device) for name, seen in moments.items()}
    return by_layer, StoredMoments(len(by_layer) == len(layers), tuple(corrupt))
