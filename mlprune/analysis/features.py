"""Which features calibration texts use, and how much of a mask two of them share: numbers and tables.

Features are those of Figures 1 to 3 of Kim et al. (2024, arXiv 2409.16911): the L2 norm of a channel of the
hidden states over a prompt's tokens, averaged over the prompts. Departures from the paper's code: pads count
nothing; the share of channels asked for is the one taken (there it is always 0.4). Layer 0 is what leaves the
first decoder layer; the last layer is taken before the model's final norm.

C: conditions, which are calibrations. L: layers. H: hidden width, its channels. K: channels in a top or bottom.
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
# of each layer: kind of matrix -> how many weights each two conditions both drop, int64 [C, C]
SharedCounts = Sequence[Mapping[str, Tensor]]


def channels_in(width: int, ratio: float) -> int:
    """floor(width * ratio), the ratio read as the decimal it was written as."""
    return dropped_per_row(width, ratio)


def is_at(magnitude_H: Tensor, ratio: float, end: End) -> Tensor:
    """Which channels are the `ratio` largest or smallest: bool, of the same shape [..., H].

    Channels stand in one order, of equal ones the lower index higher, so that no channel is at both ends.
    """
    width = magnitude_H.shape[-1]
    count = channels_in(width, ratio)
    order_H = torch.argsort(magnitude_H, dim=-1, descending=True, stable=True)
    chosen_K = order_H[..., :count] if end == "top" else order_H[..., width - count :]
    return torch.zeros_like(magnitude_H, dtype=torch.bool).scatter_(-1, chosen_K, True)


def overlaps(magnitude_CLH: Tensor, ratio: float, end: End) -> Tensor:
    """Of each condition's top channels, the share at `end` in each other: float64 [C, C of the other, L]."""
    top_LCH = is_at(magnitude_CLH, ratio, "top").transpose(0, 1).double()
    end_LCH = is_at(magnitude_CLH, ratio, end).transpose(0, 1).double()
    both_LCC = top_LCH @ end_LCH.transpose(1, 2)
    return (both_LCC / channels_in(magnitude_CLH.shape[-1], ratio)).permute(1, 2, 0)


def top_channels(one_H: Tensor, other_H: Tensor) -> list[int]:
    """The TOP_CHANNELS largest channels by the larger of two magnitudes, largest first."""
    order_H = torch.argsort(torch.maximum(one_H, other_H), descending=True, stable=True)
    return [int(channel) for channel in order_H[:TOP_CHANNELS]]


def union_of(both_CC: Tensor) -> Tensor:
    """How many weights either of each two conditions drops, int64 [C, C]."""
    dropped_C = both_CC.diagonal()
    return dropped_C[:, None] + dropped_C - both_CC


def shares(both_CC: Tensor) -> Tensor:
    """Of the weights that either of two conditions drops, the share that both drop (Jaccard): float64 [C, C].

    1 where nothing is dropped.
    """
    union_CC = union_of(both_CC)
    return torch.where(union_CC == 0, 1.0, both_CC.double() / union_CC)


def by_chance(sparsity: float) -> float:
    """The share of two masks that have nothing to do with each other."""
    return sparsity / (2 - sparsity)


def kinds_of(shared: SharedCounts) -> list[str]:
    """Kinds of matrix, in the order of the layers."""
    return list(dict.fromkeys(kind for layer in shared for kind in layer))


def total(shared: SharedCounts) -> Tensor:
    """Over all layers and kinds of matrix, int64 [C, C]."""
    return torch.stack([both_CC for layer in shared for both_CC in layer.values()]).sum(0)


# tables


def features_csv(conditions: Sequence[str], magnitude_CLH: Tensor) -> bytes:
    rows = (
        (condition, layer, channel, magnitude)
        for condition, of_layers in zip(conditions, magnitude_CLH.tolist(), strict=True)
        for layer, channels in enumerate(of_layers)
        for channel, magnitude in enumerate(channels)
    )
    return _csv(("condition", "layer", "channel", "magnitude"), rows)


def overlap_csv(conditions: Sequence[str], magnitude_CLH: Tensor, ratio: float) -> bytes:
    """`overlap`: the share of the condition's top channels that are at the other's `other_end`."""
    rows = (
        (condition, other, end, layer, share)
        for end in ENDS
        for condition, others in zip(conditions, overlaps(magnitude_CLH, ratio, end).tolist(), strict=True)
        for other, layers in zip(conditions, others, strict=True)
        for layer, share in enumerate(layers)
    )
    return _csv(("condition", "other", "other_end", "layer", "overlap"), rows)


def masks_csv(conditions: Sequence[str], shared: SharedCounts) -> bytes:
    """`both` and `either`: weights that both conditions drop, or at least one; `share` is their ratio."""
    tables = (
        (layer, kind, both_CC.tolist(), union_of(both_CC).tolist(), shares(both_CC).tolist())
        for layer, kinds in enumerate(shared)
        for kind, both_CC in kinds.items()
    )
    rows = (
        (conditions[a], conditions[b], layer, kind, both[a][b], either[a][b], share[a][b])
        for layer, kind, both, either, share in tables
        for a, b in combinations(range(len(conditions)), 2)
    )
    return _csv(("condition", "other", "layer", "matrix", "both", "either", "share"), rows)


def top_csv(pairs: Mapping[str, tuple[Tensor, Tensor]], layer: int) -> bytes:
    """`pairs`: language -> magnitudes [H] of its monolingual and its translation condition in `layer`."""
    rows = (
        (language, layer, rank, channel, float(mono_H[channel]), float(translation_H[channel]))
        for language, (mono_H, translation_H) in pairs.items()
        for rank, channel in enumerate(top_channels(mono_H, translation_H), start=1)
    )
    return _csv(("language", "layer", "rank", "channel", "mono", "translation"), rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Floats are written to the last digit."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
