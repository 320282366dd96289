"""Makes a variant's masks, or changed weights, of one layer from its moments and weights, and forecasts damage.

The arithmetic of rules, masks and forecasts is in `mlprune.pruning`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor

from mlprune.errors import ModelError
from mlprune.models.matrices import Matrix, matrices
from mlprune.pruning.allocation import outlier_share
from mlprune.pruning.combinations import combine
from mlprune.pruning.energy import dropped_energy
from mlprune.pruning.masks import LayerMasks, PackedMask, PackedWeights, keep_mask
from mlprune.pruning.moments import Moments
from mlprune.pruning.ranks import best_rank
from mlprune.pruning.scores import SCORES, Score, Solver, find_score
from mlprune.pruning.sparsegpt import SingularHessianError
from mlprune.spec.calibrations import MIX, Combination
from mlprune.spec.variants import Variant

UNSEEN = cast(Score, SCORES["magnitude"])  # replaces a solver for an expert that no token reached
Gathered = Mapping[str, Mapping[str, Moments]]  # of one layer: calibration set key -> matrix name -> moments


@dataclass(frozen=True)
class Side:
    """One side of a calibration: the key of each calibration set and its weight, and how they are combined."""

    sets: tuple[tuple[str, Fraction], ...]
    combination: Combination = MIX

    @property
    def texts(self) -> tuple[tuple[Side, Fraction], ...]:
        """The sides that a rule scores one by one, each with its weight: the sets, if their ranks are combined."""
        if self.combination.kind != "rank":
            return ((self, Fraction(1)),)
        return tuple((Side(((key, Fraction(1)),)), weight) for key, weight in self.sets)

    def moments(self, gathered: Gathered, name: str) -> Moments:
        """Return the combined moments of a matrix."""
        return combine([(gathered[key][name], weight) for key, weight in self.sets], self.combination)


@dataclass(frozen=True)
class Reading:
    """The moments of a rule's sides, and the weight of their text among those whose ranks are combined."""

    sides: Sequence[Moments]
    weight: Fraction = Fraction(1)

    @property
    def is_complete(self) -> bool:
        """Whether each side has tokens."""
        return all(side.tokens for side in self.sides)


@dataclass(frozen=True)
class MaskRecipe:
    """All that determines masks besides moments: the variant, and the sides of its calibration.

    `forecasts` does not change the masks: each language with the key of the calibration set of its monolingual
    text, on whose dense moments the masks' damage is forecast.
    """

    variant: Variant
    sides: tuple[Side, ...] = ()
    ratios: tuple[float, ...] = ()  # the sparsity of each layer of the model; empty: the same everywhere
    forecasts: tuple[tuple[str, str], ...] = ()  # (language, key)

    @property
    def keys(self) -> tuple[str, ...]:
        """The calibration sets that the recipe reads, each once."""
        return tuple(dict.fromkeys(key for side in self.sides for key, _ in side.sets))

    @property
    def rule(self) -> Score | Solver:
        return find_score(self.variant.score.name)

    @property
    def gram(self) -> bool:
        """Whether the rule needs products of channels, not only their squares."""
        return isinstance(self.rule, Solver)

    def sparsity(self, layer: int) -> float:
        return self.ratios[layer] if self.ratios else self.variant.sparsity

    def read(self, gathered: Gathered, name: str) -> list[Reading]:
        """Return what the rule reads of a matrix.

        There are several readings if ranks are combined: one for each text. A text without tokens is left out,
        unless all are.
        """
        sides = self.sides[: self.rule.sides]
        if len(sides) != 1:
            return [Reading([side.moments(gathered, name) for side in sides])]
        readings = [Reading([text.moments(gathered, name)], weight) for text, weight in sides[0].texts]
        return [reading for reading in readings if reading.is_complete] or readings[:1]


@dataclass(frozen=True)
class MaskSummary:
    """Totals of a layer's masks: weights dropped, all weights, a digest of the bits, and unobserved matrices.

    `energy` holds for each language the share of energy dropped of each matrix that its text reaches.
    """

    dropped: int
    weights: int
    digest: str
    unseen: tuple[str, ...] = ()  # expert matrices that no calibration token reached
    energy: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def outliers_of_layer(layer: torch.nn.Module, recipe: MaskRecipe, gathered: Gathered) -> float:
    """Return the share of outliers among weights times inputs of the borrowed dense layer; OWL allocates by it.

    If ranks of several texts are combined, it is the largest share of any text.
    """
    weights = {name: _weight(layer, matrix) for name, matrix in matrices(layer).items()}
    return max(
        outlier_share([(weight_OI, text.moments(gathered, name)) for name, weight_OI in weights.items()])
        for text, _ in recipe.sides[0].texts
    )


def masks_of_layer(
    index: int, layer: torch.nn.Module, recipe: MaskRecipe, gathered: Gathered, dense: Gathered
) -> tuple[LayerMasks, MaskSummary]:
    """Return the masks (or changed weights) of the borrowed dense layer `index`, and their summary.

    `gathered` holds the moments that the rule reads, `dense` those of the recipe's forecasts.

    Raises ModelError when a score is not finite, or a Hessian is singular.
    """
    masks, unseen = {}, []
    energy: dict[str, list[float]] = {language: [] for language, _ in recipe.forecasts}
    for name, matrix in matrices(layer).items():
        readings = recipe.read(gathered, name)
        if not readings[0].is_complete:
            unseen.append(f"{index}.{name}")
        weight_OI = _weight(layer, matrix)
        keep_OI, masks[name] = _mask(index, name, weight_OI, recipe, readings)
        for language, share in _forecast(index, name, weight_OI, keep_OI, recipe, dense).items():
            energy[language].append(share)
    return masks, _summary(masks, unseen, energy)


def _weight(layer: torch.nn.Module, matrix: Matrix) -> Tensor:
    return matrix.view_OI(layer.get_parameter(matrix.parameter).data)


def _mask(
    index: int, name: str, weight_OI: Tensor, recipe: MaskRecipe, readings: Sequence[Reading]
) -> tuple[Tensor, PackedMask | PackedWeights]:
    """Return which weights are kept, as a boolean matrix and packed."""
    rule, where = recipe.rule, f"layer {index}, {name}"
    for reading in readings:
        for side in reading.sides:
            _check_finite(side.sumsq_I, "the sums of its inputs", where)
    if isinstance(rule, Solver) and readings[0].is_complete:
        keep_OI, changed_OI = _solved(rule, weight_OI, readings[0].sides[0], recipe, index, where)
        return keep_OI, PackedWeights.pack(keep_OI, changed_OI)
    score = rule if isinstance(rule, Score) else UNSEEN
    seed, pattern = _seed(recipe.variant.seed, index, name), recipe.variant.pattern

    def scored(reading: Reading) -> Tensor:
        score_OI = score.function(weight_OI, reading.sides, seed)
        _check_finite(score_OI, "the scores", where)
        return score_OI

    if len(readings) == 1:
        score_OI = scored(readings[0])
    else:
        score_OI = best_rank(((scored(one), one.weight) for one in readings), pattern, score.within)
    keep_OI = keep_mask(score_OI, recipe.sparsity(index), pattern, score.within)
    return keep_OI, PackedMask.pack(keep_OI)


def _solved(
    solver: Solver, weight_OI: Tensor, moments: Moments, recipe: MaskRecipe, index: int, where: str
) -> tuple[Tensor, Tensor]:
    """Return which weights a solver keeps, and their new values in the model's dtype."""
    try:
        keep_OI, changed_OI = solver.function(weight_OI, moments, recipe.sparsity(index), recipe.variant.pattern)
    except SingularHessianError:
        remedy = "its Hessian is not positive definite; raise calibration.samples, or load it in float32"
        raise ModelError("search.score", f"{recipe.variant.score.name} at {where}", remedy) from None
    changed_OI = changed_OI.to(weight_OI.dtype)
    _check_finite(changed_OI, "the changed weights", where)
    return keep_OI, changed_OI


def _forecast(
    index: int, name: str, weight_OI: Tensor, keep_OI: Tensor, recipe: MaskRecipe, dense: Gathered
) -> Mapping[str, float]:
    """Return the share of energy dropped on each language's text, if that text reaches the matrix.

    It is NaN where the text's sums are not finite: then nothing is forecast, but masks may not need these sums.
    """
    if not recipe.forecasts:
        return {}
    sumsq_LI = torch.stack([dense[key][name].sumsq_I for _, key in recipe.forecasts])
    shares = dropped_energy(weight_OI, keep_OI, sumsq_LI).tolist()
    finite = sumsq_LI.isfinite().all(1).tolist()
    languages = [language for language, _ in recipe.forecasts]
    by_language = zip(languages, shares, finite, strict=True)
    return {code: share for code, share, known in by_language if not (known and math.isnan(share))}


def _check_finite(values: Tensor, what: str, where: str) -> None:
    if not torch.stack(torch.aminmax(values)).isfinite().all():  # NaN is the largest, and the smallest
        remedy = f"{what} are not finite; load the model in float32, or check its weights"
        raise ModelError("model.dtype", where, remedy)


def _summary(masks: LayerMasks, unseen: Sequence[str], energy: Mapping[str, Sequence[float]]) -> MaskSummary:
    return MaskSummary(
        dropped=sum(mask.dropped for mask in masks.values()),
        weights=sum(mask.shape[0] * mask.shape[1] for mask in masks.values()),
        digest=hashlib.sha256("".join(mask.digest() for mask in masks.values()).encode()).hexdigest(),
        unseen=tuple(unseen),
        energy={language: tuple(shares) for language, shares in energy.items()},
    )


def _seed(seed: int, layer: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {layer} {name}".encode()).digest()[:8], "big") >> 1
