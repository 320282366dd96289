"""Makes a variant's masks of one layer where it removes channels, and repairs what reads them.

The arithmetic is in `mlprune.pruning.channels`. Other variants' masks are made in `masking`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlprune.errors import ModelError
from mlprune.pruning.channels import CHANNEL_SCORES, refit
from mlprune.pruning.masks import LayerMasks, PackedMask, PackedWeights, keep_all_but
from mlprune.pruning.ranks import best_rank
from mlprune.pruning.sparsegpt import SingularHessianError
from mlprune.shards.masking import (
    ChannelPlan,
    Energy,
    Gathered,
    MaskRecipe,
    MaskSummary,
    check_finite,
    forecast,
    layer_weights,
    matrix_seed,
    summarize,
)
from mlprune.spec.variants import Pattern


def masks_of_channels(
    index: int, layer: torch.nn.Module, recipe: MaskRecipe, plan: ChannelPlan, gathered: Gathered, dense: Gathered
) -> tuple[LayerMasks, MaskSummary]:
    """Return the masks of the borrowed dense layer `index`, and their summary, which counts the network alone.

    Whole rows and columns of the feed-forward network's matrices are dropped. `gathered` holds the moments that
    the score and the repair read, `dense` those of the recipe's forecasts. Raises ModelError when a score is not
    finite, or a Gram matrix is singular.
    """
    behind, weights_OI = plan.feed_forward.behind, layer_weights(layer)
    keep_C = _kept_channels(index, weights_OI[behind], recipe, plan, gathered)
    keeps = {name: _rows(keep_C, weights_OI[name]) for name in plan.feed_forward.before}
    keeps[behind] = keep_C.expand_as(weights_OI[behind])
    masks: dict[str, PackedMask | PackedWeights] = {
        name: PackedMask.pack(keep_OI) for name, keep_OI in keeps.items()
    }
    if recipe.variant.repair != "none":
        changed_OC = _repaired(weights_OI[behind], recipe, behind, gathered, keep_C, f"layer {index}, {behind}")
        masks[behind] = PackedWeights.pack(keeps[behind], changed_OC)
    energy: Energy = {language: [] for language, _ in recipe.forecasts}
    for name, keep_OI in keeps.items():
        forecast(name, weights_OI[name], keep_OI, recipe, dense, energy)
    return masks, summarize(masks, sum(weights_OI[name].numel() for name in keeps), (), energy)


def _repaired(
    down_OC: Tensor, recipe: MaskRecipe, name: str, gathered: Gathered, keep_C: Tensor, where: str
) -> Tensor:
    (side,) = recipe.sides
    gram_CC = side.moments(gathered, name).gram_II
    assert gram_CC is not None
    try:
        changed_OC = refit(down_OC, gram_CC, keep_C).to(down_OC.dtype)
    except SingularHessianError:
        remedy = "its Gram matrix is not positive definite; raise calibration.samples, or load it in float32"
        raise ModelError("search.repair", f"{recipe.variant.repair} at {where}", remedy) from None
    check_finite(changed_OC, "the repaired weights", where)
    return changed_OC


def _kept_channels(
    index: int, down_OC: Tensor, recipe: MaskRecipe, plan: ChannelPlan, gathered: Gathered
) -> Tensor:
    """Return which channels stay, bool [C]. Among equal scores, the lower index is removed first."""
    behind, variant = plan.feed_forward.behind, recipe.variant
    score, seed = CHANNEL_SCORES[variant.score.name], matrix_seed(variant.seed, index, behind)
    readings = recipe.read(gathered, behind)
    scores = [(score(down_OC, reading.sides, seed).float()[None], reading.weight) for reading in readings]
    for score_1C, _ in scores:
        check_finite(score_1C, "the scores", f"layer {index}, {behind}")
    score_1C = scores[0][0] if len(scores) == 1 else best_rank(scores, Pattern())
    return keep_all_but(score_1C, down_OC.shape[1] - plan.kept)[0]


def _rows(keep_C: Tensor, weight_OI: Tensor) -> Tensor:
    """Return the mask that keeps the rows of kept channels; the matrix may hold several rows of a channel."""
    keep_O = keep_C.repeat(len(weight_OI) // len(keep_C))
    return keep_O[:, None].expand_as(weight_OI)
