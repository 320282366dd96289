"""Makes a variant's masks of one layer where it removes whole units, and repairs what reads them.

The arithmetic is in `mlprune.pruning.structured`. Other variants' masks are made in `masking`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlprune.errors import ModelError
from mlprune.pruning.masks import LayerMasks, PackedMask, PackedWeights, keep_all_but
from mlprune.pruning.ranks import best_rank
from mlprune.pruning.sparsegpt import SingularHessianError
from mlprune.pruning.structured import UNIT_SCORES, refit
from mlprune.shards.masking import (
    Energy,
    Gathered,
    MaskRecipe,
    MaskSummary,
    UnitPlan,
    check_finite,
    forecast,
    layer_weights,
    matrix_seed,
    summarize,
)
from mlprune.spec.variants import Pattern


def masks_of_units(
    index: int, layer: torch.nn.Module, recipe: MaskRecipe, plan: UnitPlan, gathered: Gathered, dense: Gathered
) -> tuple[LayerMasks, MaskSummary]:
    """Return the masks of the borrowed dense layer `index`, and their summary, which counts these matrices alone.

    Whole rows and columns are dropped. `gathered` holds the moments that the score and the repair read, `dense`
    those of the recipe's forecasts. Raises ModelError when a score is not finite, or a Gram matrix is singular.
    """
    units, weights_OI = plan.units, layer_weights(layer)
    reader_OC, where = weights_OI[units.behind], f"layer {index}, {units.behind}"
    keep_U = _kept(index, reader_OC, recipe, plan, gathered)
    keep_C = units.kept_columns(keep_U)
    keeps = {name: units.rows(name, keep_U)[:, None].expand_as(weights_OI[name]) for name in units.before}
    keeps[units.behind] = keep_C.expand_as(reader_OC)
    masks: dict[str, PackedMask | PackedWeights] = {
        name: PackedMask.pack(keep_OI) for name, keep_OI in keeps.items()
    }
    if recipe.variant.repair != "none":
        changed_OC = _repaired(reader_OC, recipe, units.behind, gathered, keep_C, where)
        masks[units.behind] = PackedWeights.pack(keeps[units.behind], changed_OC)
    energy: Energy = {language: [] for language, _ in recipe.forecasts}
    for name, keep_OI in keeps.items():
        forecast(name, weights_OI[name], keep_OI, recipe, dense, energy)
    return masks, summarize(masks, sum(weights_OI[name].numel() for name in keeps), (), energy)


def _kept(index: int, reader_OC: Tensor, recipe: MaskRecipe, plan: UnitPlan, gathered: Gathered) -> Tensor:
    """Return which units stay, bool [U]. Among equal scores, the lower index is removed first."""
    behind, variant = plan.units.behind, recipe.variant
    score, seed = UNIT_SCORES[variant.score.name], matrix_seed(variant.seed, index, behind)
    scores = [
        (score(reader_OC, reading.sides, plan.count, seed).float()[None], reading.weight)
        for reading in recipe.read(gathered, behind)
    ]
    for score_1U, _ in scores:
        check_finite(score_1U, "the scores", f"layer {index}, {behind}")
    score_1U = scores[0][0] if len(scores) == 1 else best_rank(scores, Pattern())
    return keep_all_but(score_1U, plan.count - plan.kept)[0]


def _repaired(
    reader_OC: Tensor, recipe: MaskRecipe, name: str, gathered: Gathered, keep_C: Tensor, where: str
) -> Tensor:
    (side,) = recipe.sides
    gram_CC = side.moments(gathered, name).gram_II
    assert gram_CC is not None
    try:
        changed_OC = refit(reader_OC, gram_CC, keep_C).to(reader_OC.dtype)
    except SingularHessianError:
        remedy = "its Gram matrix is not positive definite; raise calibration.samples, or load it in float32"
        raise ModelError("search.repair", f"{recipe.variant.repair} at {where}", remedy) from None
    check_finite(changed_OC, "the repaired weights", where)
    return changed_OC
