"""Measurements of a layer for `mlprune analyze`: the size of its features, and the overlap of variants' masks.

B: rows of a micro-batch. T: its tokens. H: hidden width, a channel of which is a feature. V: variants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlprune.models.matrices import matrices
from mlprune.pruning.masks import PackedMask
from mlprune.shards.masking import Gathered, MaskRecipe, masks_of_layer

_ONES = torch.tensor([byte.bit_count() for byte in range(256)])


def prompt_norms(state_BTH: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Return each channel's L2 norm over the tokens of a row, summed over the rows: float64 [H].

    Padding is ignored.
    """
    pad_BT = attention_mask_BT.to(state_BTH.device) == 0
    real_BTH = state_BTH.masked_fill(pad_BT[..., None], 0)  # not a product: padding may hold NaN
    norm_BH: Tensor = torch.linalg.vector_norm(real_BTH, dim=1, dtype=torch.float64)
    return norm_BH.sum(0)


@dataclass(frozen=True)
class SharedDrops:
    """How many weights of a layer each two of V variants both drop. The diagonal: how many each drops."""

    counts: Mapping[str, Tensor]  # kind of matrix -> int64 [V, V]
    unseen: tuple[str, ...]  # expert matrices that no token of some calibration set reached


def shared_drops(
    index: int, layer: torch.nn.Module, recipes: Sequence[MaskRecipe], gathered: Gathered
) -> SharedDrops:
    """Make the masks of the borrowed dense layer `index` by each recipe and compare them. No mask is kept.

    The rules of the recipes must drop weights without changing others.
    """
    results = [masks_of_layer(index, layer, recipe, gathered, {}) for recipe in recipes]
    counts: dict[str, Tensor] = {}
    for name in matrices(layer):
        packed = []
        for masks, _ in results:
            mask = masks[name]
            assert isinstance(mask, PackedMask)
            packed.append(mask)
        kind = kind_of(name)
        counts[kind] = counts.get(kind, 0) + both_drop(packed)
    return SharedDrops(counts, tuple(dict.fromkeys(name for _, summary in results for name in summary.unseen)))


def kind_of(matrix: str) -> str:
    """Return the matrix's name within the layer, without the number of an expert."""
    return re.sub(r"\.\d+$", "", matrix)


def both_drop(masks: Sequence[PackedMask]) -> Tensor:
    """Return how many weights each two masks of one matrix both drop: int64 [V, V], from the packed bits."""
    rows, width = masks[0].shape
    both_VV = torch.empty(len(masks), len(masks), dtype=torch.int64)
    for one, first in enumerate(masks):
        for other, second in enumerate(masks[: one + 1]):
            # dropped by both means kept by neither; kept bits are counted, because zeros fill up the last byte
            both_VV[one, other] = both_VV[other, one] = rows * width - _bits_set(first.bits | second.bits)
    return both_VV


def _bits_set(bits: Tensor) -> int:
    return int((torch.bincount(bits, minlength=256).cpu() * _ONES).sum())
