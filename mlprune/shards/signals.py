"""The signal of a layer by which an allocation distributes sparsity, from the layer's weights and moments.

The arithmetic is in `mlprune.pruning`; what the layers drop because of it is decided in `sweep.allocations`.
"""

from __future__ import annotations

import torch

from mlprune.pruning.agreement import layer_agreement
from mlprune.pruning.outliers import outlier_share
from mlprune.pruning.spectra import layer_exponent
from mlprune.shards.masking import Gathered, MaskRecipe, layer_weights


def layer_signal(layer: torch.nn.Module, recipe: MaskRecipe, gathered: Gathered, dense: Gathered) -> float:
    """Return the signal of the borrowed dense layer for the recipe's allocation.

    It is the share of outliers for `owl` (the largest share of any text, if ranks of several texts are combined),
    the mean exponent of the spectra for `alpha`, and else the agreement of the languages of the recipe's
    forecasts, whose moments are `dense`.
    """
    weights_OI = layer_weights(layer)
    match recipe.variant.allocation:
        case "owl":
            texts = [text for text, _ in recipe.sides[0].texts]
            return max(
                outlier_share([(weights_OI[name], text.moments(gathered, name)) for name in weights_OI])
                for text in texts
            )
        case "alpha":
            return layer_exponent(weights_OI.values())
    keys = [key for _, key in recipe.forecasts]
    return layer_agreement(torch.stack([dense[key][name].sumsq_I for key in keys]) for name in weights_OI)
