"""Masks: selects the weights to keep from their scores, and packs a mask to one bit per weight.

Where pruning also changes the weights that it keeps, they are packed with the mask. How scores are computed is in
`scores`.

O: output channels (rows). I: input channels. A mask is True where the weight is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mlprune.spec.variants import Pattern

Within = Literal["row", "matrix"]  # what an unstructured mask compares scores within


def dropped_per_row(width: int, sparsity: float | Fraction) -> int:
    """Return floor(width * sparsity), computed exactly from the sparsity's decimal notation, or its fraction.

    In binary, 100 * 0.29 is 28.999999999999996, but a user who writes 0.29 means 29 of 100.
    """
    return math.floor(width * Fraction(str(sparsity)))


def keep_mask(score_OI: Tensor, sparsity: float, pattern: Pattern, within: Within = "row") -> Tensor:
    """Return the mask that drops the smallest scores of each row, of the whole matrix, or of each group of n:m.

    `within` is what an unstructured mask compares scores within; an n:m pattern compares within its groups. Among
    equal scores the one with the lowest index is dropped first. `score_OI` must not contain NaN.
    """
    if pattern.group:
        return _keep_in_groups(score_OI, pattern)
    rows, width = score_OI.shape
    return keep_all_but(score_OI, uniform_count(rows, width, sparsity, within), within)


def uniform_count(rows: int, width: int, sparsity: float, within: Within) -> int:
    """Return how many weights of a matrix an unstructured mask drops, if every layer has the same sparsity."""
    if within == "matrix":
        return dropped_per_row(rows * width, sparsity)
    return rows * dropped_per_row(width, sparsity)


def keep_all_but(score_OI: Tensor, drop: int, within: Within = "matrix") -> Tensor:
    """Return the mask that drops exactly `drop` weights: the smallest scores of the matrix, or of each row.

    Within rows, each row drops the same number, or where `drop` is no multiple of the rows, the first rows one
    more. Among equal scores the first in row-major order is dropped first.
    """
    if within == "matrix":
        return _keep_in_rows(score_OI.reshape(1, -1), drop).reshape(score_OI.shape)
    each, further = divmod(drop, len(score_OI))
    if not further:
        return _keep_in_rows(score_OI, each)
    return torch.cat([_keep_in_rows(score_OI[:further], each + 1), _keep_in_rows(score_OI[further:], each)])


def _keep_in_rows(score_OI: Tensor, drop: int) -> Tensor:
    if drop == 0:
        return torch.ones_like(score_OI, dtype=torch.bool)
    threshold_O1 = _kth_smallest(score_OI, drop)[:, None]
    keep_OI = score_OI > threshold_O1
    # Where several weights of a row equal its threshold, `>` drops too many. Keep the last ones of them.
    surplus_O = keep_OI.shape[1] - drop - keep_OI.sum(1)
    for row in surplus_O.nonzero()[:, 0].tolist():
        ties = (score_OI[row] == threshold_O1[row]).nonzero()[:, 0]
        keep_OI[row, ties[-int(surplus_O[row]) :]] = True
    return keep_OI


def _kth_smallest(score_OI: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value of each row, with k from 1. Rows are partitioned, not sorted."""
    if score_OI.device.type == "cpu":  # numpy's vectorised quickselect is 15 times faster than torch.topk
        return torch.from_numpy(np.partition(score_OI.numpy(), k - 1, axis=1)[:, k - 1].copy())
    return score_OI.kthvalue(k, dim=1).values


def _keep_in_groups(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Keep the `pattern.kept` highest scores of each group; ranks come from comparing all pairs."""
    group_XM = score_OI.reshape(-1, pattern.group)
    rank_XM = torch.zeros(group_XM.shape, dtype=torch.uint8, device=score_OI.device)
    for low in range(pattern.group):
        for high in range(low + 1, pattern.group):
            above = group_XM[:, high] >= group_XM[:, low]  # a tie ranks the higher index higher
            rank_XM[:, high] += above
            rank_XM[:, low] += ~above
    return (rank_XM >= pattern.group - pattern.kept).reshape(score_OI.shape)


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


@dataclass(frozen=True)
class PackedMask:
    """A mask of one bit per weight: bit i of byte b is weight 8b + i of the flattened matrix."""

    bits: Tensor  # [ceil(O * I / 8)] uint8
    shape: tuple[int, int]
    kept: int

    @classmethod
    def pack(cls, keep_OI: Tensor) -> PackedMask:
        """Pack a boolean mask."""
        rows, width = keep_OI.shape
        flat = keep_OI.reshape(-1).to(torch.uint8)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
        # one multiplication collects eight bytes of 0 or 1, read as one integer, in its top byte
        gathered = (flat.view(torch.int64) * 0x0102040810204080) >> 56
        return cls(gathered.to(torch.uint8), (rows, width), int(keep_OI.sum()))

    def unpack(self) -> Tensor:
        """Return the mask, [O, I] bool."""
        rows, width = self.shape
        bits = self.bits[:, None].bitwise_and(_BITS.to(self.bits.device)) != 0
        return bits.reshape(-1)[: rows * width].reshape(rows, width)

    @property
    def dropped(self) -> int:
        """Return the number of weights that the mask drops."""
        return self.shape[0] * self.shape[1] - self.kept

    @property
    def columns(self) -> Tensor:
        """Return the columns of which a weight is kept, bool [I]."""
        return self.unpack().any(0)

    @property
    def bytes(self) -> int:
        """Return the memory that it takes."""
        return self.bits.nbytes

    def to(self, device: torch.device) -> PackedMask:
        """Return the mask on a device."""
        return PackedMask(self.bits.to(device), self.shape, self.kept)

    def digest(self) -> str:
        """Return the SHA-256 of the mask's bits, in hex."""
        return hashlib.sha256(self.bits.cpu().numpy().tobytes()).hexdigest()

    def apply_(self, weight_OI: Tensor) -> None:
        """Set every dropped weight to +0, in place; `weight_OI` may be a view."""
        weight_OI.masked_fill_(~self.unpack(), 0)


@dataclass(frozen=True)
class PackedWeights:
    """A mask and the new values of the weights that it keeps. It has the interface of PackedMask."""

    mask: PackedMask
    values: Tensor  # [kept], in row-major order, in the model's dtype

    @classmethod
    def pack(cls, keep_OI: Tensor, weight_OI: Tensor) -> PackedWeights:
        """Pack a boolean mask and the weights, which must be in the model's dtype already."""
        return cls(PackedMask.pack(keep_OI), weight_OI[keep_OI])

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape

    @property
    def kept(self) -> int:
        return self.mask.kept

    @property
    def dropped(self) -> int:
        return self.mask.dropped

    @property
    def columns(self) -> Tensor:
        return self.mask.columns

    @property
    def bytes(self) -> int:
        return self.mask.bytes + self.values.nbytes

    def to(self, device: torch.device) -> PackedWeights:
        return PackedWeights(self.mask.to(device), self.values.to(device))

    def digest(self) -> str:
        """Return the SHA-256 of the mask's bits and of the values' bits, in hex."""
        digest = hashlib.sha256(self.mask.digest().encode())
        digest.update(self.values.cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def apply_(self, weight_OI: Tensor) -> None:
        """Write the new values, and +0 for every dropped weight, in place; `weight_OI` may be a view."""
        weight_OI.zero_().masked_scatter_(self.mask.unpack(), self.values)


LayerMasks = Mapping[str, PackedMask | PackedWeights]  # the masks of one decoder layer, by matrix name
