"""The features that calibration texts use, and the share of a mask that two of them have in common.

Here are the arithmetic and the CSV tables; hidden states and masks are measured in `shards`. The features are
those of Figures 1 to 3 of Kim et al. (2024, arXiv 2409.16911): the L2 norm of a channel of the hidden states over
a prompt's tokens, averaged over the prompts. Departures from the paper's code: padding tokens are ignored; the
requested share of channels is used (there it is always 0.4); the last layer is taken before the model's final
norm. As there, layer 0 is the embedding's output, and layer n the output of the n-th decoder layer.

C: conditions, which are calibrations. L: layers, and the embedding before them. H: hidden width, its channels.
K: channels in a top or bottom.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from mlprune.pruning.masks import dropped_per_row

End = Literal["top", "bottom"]
ENDS: tuple[End, ...] = ("bottom", "top")
TOP_CHANNELS = 20
# For each layer: kind of matrix -> the number of weights that each two conditions both drop, int64 [C, C].
SharedCounts = Sequence[Mapping[str, Tensor]]
# Magnitudes of one layer to compare: language -> condition with x for the language, e.g. mono:x -> [H].
Compared = Mapping[str, Mapping[str, Tensor]]


def channels_in(width: int, ratio: float) -> int:
    """Return floor(width * ratio), with the ratio read as the decimal number that the user wrote."""
    return dropped_per_row(width, ratio)


def is_at(magnitude_H: Tensor, ratio: float, end: End) -> Tensor:
    """Return which channels are among the `ratio` largest or smallest: bool, of the same shape [..., H].

    All channels are in one order (of equal ones, the lower index first), so that no channel is at both ends.
    """
    width = magnitude_H.shape[-1]
    count = channels_in(width, ratio)
    order_H = torch.argsort(magnitude_H, dim=-1, descending=True, stable=True)
    chosen_K = order_H[..., :count] if end == "top" else order_H[..., width - count :]
    return torch.zeros_like(magnitude_H, dtype=torch.bool).scatter_(-1, chosen_K, True)


def overlaps(magnitude_CLH: Tensor, ratio: float, end: End) -> Tensor:
    """Return the share of each condition's top channels that is at `end` in each other: float64 [C, C, L]."""
    top_LCH = is_at(magnitude_CLH, ratio, "top").transpose(0, 1).double()
    end_LCH = is_at(magnitude_CLH, ratio, end).transpose(0, 1).double()
    both_LCC = top_LCH @ end_LCH.transpose(1, 2)
    return (both_LCC / channels_in(magnitude_CLH.shape[-1], ratio)).permute(1, 2, 0)


def mean_overlaps(magnitude_CLH: Tensor, ratio: float, end: End) -> Tensor:
    """Return the mean of `overlaps` over the decoder layers, so without the embedding: float64 [C, C]."""
    return overlaps(magnitude_CLH[:, 1:], ratio, end).mean(2)


def top_channels(magnitudes: Iterable[Tensor]) -> list[int]:
    """Return the TOP_CHANNELS largest channels by the largest of several magnitudes [H], largest first."""
    order_H = torch.argsort(torch.stack(list(magnitudes)).amax(0), descending=True, stable=True)
    return [int(channel) for channel in order_H[:TOP_CHANNELS]]


def union_of(both_CC: Tensor) -> Tensor:
    """Return how many weights at least one of each two conditions drops, int64 [C, C]."""
    dropped_C = both_CC.diagonal()
    return dropped_C[:, None] + dropped_C - both_CC


def shares(both_CC: Tensor) -> Tensor:
    """Return the Jaccard index of each two masks: weights that both drop / either drops, float64 [C, C].

    It is 1 where nothing is dropped.
    """
    union_CC = union_of(both_CC)
    return torch.where(union_CC == 0, 1.0, both_CC.double() / union_CC)


def by_chance(sparsity: float) -> float:
    """Return the expected Jaccard index of two independent masks."""
    return sparsity / (2 - sparsity)


def kinds_of(shared: SharedCounts) -> list[str]:
    """Return the kinds of matrix, in the order of the layers."""
    return list(dict.fromkeys(kind for layer in shared for kind in layer))


def total(shared: SharedCounts) -> Tensor:
    """Return the sum over all layers and kinds of matrix, int64 [C, C]."""
    return torch.stack([both_CC for layer in shared for both_CC in layer.values()]).sum(0)


# CSV tables


def features_csv(conditions: Sequence[str], magnitude_CLH: Tensor) -> bytes:
    """Return the magnitude of every channel."""
    rows = (
        (condition, layer, channel, magnitude)
        for condition, of_layers in zip(conditions, magnitude_CLH.tolist(), strict=True)
        for layer, channels in enumerate(of_layers)
        for channel, magnitude in enumerate(channels)
    )
    return _csv(("condition", "layer", "channel", "magnitude"), rows)


def overlap_csv(conditions: Sequence[str], magnitude_CLH: Tensor, ratio: float) -> bytes:
    """Return the share of the condition's top channels that are at the other's `other_end`, per layer."""
    rows = (
        (condition, other, end, layer, share)
        for end in ENDS
        for condition, others in zip(conditions, overlaps(magnitude_CLH, ratio, end).tolist(), strict=True)
        for other, layers in zip(conditions, others, strict=True)
        for layer, share in enumerate(layers)
    )
    return _csv(("condition", "other", "other_end", "layer", "overlap"), rows)


def masks_csv(conditions: Sequence[str], shared: SharedCounts) -> bytes:
    """Return `both`, `either`: weights that both conditions, or at least one, drop; and `share`, their ratio.

    Layers are counted from 1, since 0 is the embedding.
    """
    tables = (
        (layer, kind, both_CC.tolist(), union_of(both_CC).tolist(), shares(both_CC).tolist())
        for layer, kinds in enumerate(shared, start=1)
        for kind, both_CC in kinds.items()
    )
    rows = (
        (conditions[a], conditions[b], layer, kind, both[a][b], either[a][b], share[a][b])
        for layer, kind, both, either, share in tables
        for a, b in combinations(range(len(conditions)), 2)
    )
    return _csv(("condition", "other", "layer", "matrix", "both", "either", "share"), rows)


def top_csv(compared: Compared, layer: int) -> bytes:
    """Return the largest channels of `layer`, of each language in all its conditions."""
    rows = (
        (language, layer, rank, channel, *(float(magnitude_H[channel]) for magnitude_H in conditions.values()))
        for language, conditions in compared.items()
        for rank, channel in enumerate(top_channels(conditions.values()), start=1)
    )
    return _csv(("language", "layer", "rank", "channel", *next(iter(compared.values()))), rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Write CSV. Floats are written in full precision."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
