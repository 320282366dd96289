"""The split of a budget by measured losses of single layers, for `sensitivity-mean` and `sensitivity-worst`.

The losses come from `sweep.allocations`; the method is ours.

S: sparsities at which a layer was measured. L: layers. K: languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]

REFERENCES = (0.5, 0.7)  # the sparsities at which single layers are measured
FLOOR = 0.1  # of a language's mean loss: no layer is taken to be less sensitive than that


@dataclass(frozen=True)
class LossCurves:
    """The forecast loss of language k when only layer l is pruned to sparsity r: scale_LK * r^exponent."""

    scale_LK: Array
    exponent: float


def fit_curves(loss_SLK: Array) -> LossCurves:
    """Fit power laws to the losses of single layers, measured at REFERENCES.

    One exponent is fitted for the model, to the sums over layers and languages, because single losses are small
    and noisy; it is at least 1.01, so that the curves are convex. A layer's scale is fitted by least squares.
    Noise can make it negative, and a layer without loss would be emptied: so it is at least a tenth of the
    language's mean.
    """
    totals = np.maximum(loss_SLK.sum((1, 2)), np.finfo(float).tiny)
    exponent = max(1.01, float(np.log(totals[1] / totals[0]) / np.log(REFERENCES[1] / REFERENCES[0])))
    power_S = np.array(REFERENCES) ** exponent
    scale_LK = np.tensordot(power_S, loss_SLK, 1) / (power_S @ power_S)
    return LossCurves(np.maximum(scale_LK, FLOOR * scale_LK.mean(0).clip(min=1e-9)), exponent)


def split_budget(curves: LossCurves, weights: Sequence[int], sparsity: float, worst: bool) -> tuple[float, ...]:
    """Return the sparsity of each layer that minimises the forecast loss; the mean over weights is `sparsity`.

    A language's forecast is the sum over the layers; the minimum is that of the mean over the languages, or of the
    worst language. Every layer keeps at least half of the share of weights that `uniform` keeps: beyond the
    references, losses grow faster than the power law (benchmarks/LOG.md).

    The worst language's is a convex program, solved by its dual: the best split is that of the mean for some
    weights of the languages, those for which its loss is largest (scipy's SLSQP, with as many variables as
    languages).
    """
    if not sparsity:
        return (0.0,) * len(weights)
    share_L = np.array(weights, dtype=float) / sum(weights)
    scale_LK = curves.scale_LK / curves.scale_LK.sum(0).max()  # pruned uniformly, the worst language has loss 1
    even_K = np.full(scale_LK.shape[1], 1 / scale_LK.shape[1])

    def split(weight_K: Array) -> Array:
        return _split_for(scale_LK @ weight_K, curves.exponent, share_L, sparsity)

    def losses(weight_K: Array) -> Array:
        relative: Array = scale_LK.T @ (split(weight_K) / sparsity) ** curves.exponent
        return relative

    if not worst:
        return tuple(split(even_K).tolist())
    dual = minimize(
        lambda weight_K: -float(weight_K @ losses(weight_K)),
        even_K,
        jac=lambda weight_K: -losses(weight_K),  # the split is optimal, so its own change does not count
        bounds=[(0.0, 1.0)] * len(even_K),
        constraints=[{"type": "eq", "fun": lambda weight_K: weight_K.sum() - 1, "jac": np.ones_like}],
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert dual.success, f"the split of the budget was not found: {dual.message}"
    return tuple(split(dual.x).tolist())


def _split_for(scale_L: Array, exponent: float, share_L: Array, sparsity: float) -> Array:
    """Return the split that minimises the sum of scale_L * r^exponent, with the mean `sparsity` by `share_L`.

    At the minimum, one more weight costs every layer the same loss, unless the layer is at the ceiling.
    """
    ceiling = (1 + sparsity) / 2

    def at(log_price: float) -> Array:
        log_ratio_L = (log_price + np.log(share_L / scale_L)) / (exponent - 1)
        return np.exp(np.minimum(log_ratio_L, np.log(ceiling)))

    # at `low` every layer is below the requested sparsity, at `high` every layer is at the ceiling
    bounds_L = [(exponent - 1) * np.log(ratio) - np.log(share_L / scale_L) for ratio in (sparsity, ceiling)]
    low, high = float(bounds_L[0].min()), float(bounds_L[1].max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if share_L @ at(middle) < sparsity else (low, middle)
    return at(high)
