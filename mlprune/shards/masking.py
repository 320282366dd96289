"""A layer's moments and weights in, a variant's masks of it out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from mlprune.errors import ModelError
from mlprune.models.matrices import matrices
from mlprune.pruning.masks import PackedMask, keep_mask
from mlprune.pruning.moments import Moments, mixed
from mlprune.pruning.scores import score_named
from mlprune.variants import Pattern, Variant


@dataclass(frozen=True)
class Recipe:
    """All that turns moments into masks: the variant, the seed, and which calibration sets in which shares."""

    variant: Variant
    seed: int
    parts: tuple[tuple[str, Fraction], ...] = ()  # calibration set key, weight


@dataclass(frozen=True)
class LayerMasks:
    """What a layer's masks came to: weights dropped of weights, a digest of the bits, matrices left blind."""

    dropped: int
    weights: int
    digest: str
    unseen: tuple[str, ...] = ()  # matrices of experts that no calibration token reached


def masks_of_layer(
    index: int,
    layer: torch.nn.Module,
    recipe: Recipe,
    parts: Sequence[tuple[Mapping[str, Moments], Fraction]],
) -> tuple[Mapping[str, PackedMask], LayerMasks]:
    """The masks of the borrowed dense layer `index`, and what they came to.

    `parts` are the moments of each calibration set by matrix, with the set's weight; empty for a score that
    reads none. Raises ModelError when a score is not finite.
    """
    variant = recipe.variant
    score, pattern = score_named(variant.score), Pattern.parse(variant.pattern)
    masks, unseen = {}, []
    for name, matrix in matrices(layer).items():
        weight_OI = matrix.view_OI(layer.get_parameter(matrix.parameter).data)
        moments = mixed([(part[name], share) for part, share in parts]) if parts else None
        if moments is not None and not moments.tokens:
            unseen.append(f"{index}.{name}")
        score_OI = score.function(weight_OI, moments, _seed(recipe.seed, index, name))
        if not torch.isfinite(score_OI.amax()):  # NaN is the largest to amax
            where = f"layer {index}, {name}"
            remedy = "the scores are not finite; load the model in float32, or check its weights"
            raise ModelError("model.dtype", where, remedy)
        masks[name] = PackedMask.pack(keep_mask(score_OI, variant.sparsity, pattern))
    return masks, _summary(masks, unseen)


def _summary(masks: Mapping[str, PackedMask], unseen: Sequence[str]) -> LayerMasks:
    return LayerMasks(
        dropped=sum(mask.dropped for mask in masks.values()),
        weights=sum(mask.shape[0] * mask.shape[1] for mask in masks.values()),
        digest=hashlib.sha256("".join(mask.digest() for mask in masks.values()).encode()).hexdigest(),
        unseen=tuple(unseen),
    )


def _seed(seed: int, layer: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {layer} {name}".encode()).digest()[:8], "big") >> 1
