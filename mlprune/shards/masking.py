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
from mlprune.models.matrices import matrices
from mlprune.models.structures import Units
from mlprune.pruning.allocation import matrix_counts
from mlprune.pruning.combinations import combine
from mlprune.pruning.energy import dropped_energy
from mlprune.pruning.masks import LayerMasks, PackedMask, PackedWeights, keep_all_but, keep_mask, uniform_count
from mlprune.pruning.moments import Moments
from mlprune.pruning.ranks import best_rank
from mlprune.pruning.scores import SCORES, Score, Solver, find_score
from mlprune.pruning.sparsegpt import SingularHessianError
from mlprune.spec.calibrations import MIX, Combination
from mlprune.spec.variants import Variant

UNSEEN = cast(Score, SCORES["magnitude"])  # replaces a solver for an expert that no token reached
Energy = dict[str, list[float]]  # language -> the share of energy dropped of each matrix
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
class UnitPlan:
    """The units that a variant removes, how many each layer has, and how many of them stay."""

    units: Units
    count: int
    kept: int


@dataclass(frozen=True)
class MaskRecipe:
    """All that determines masks besides moments: the variant, and the sides of its calibration.

    `forecasts` does not change the masks: each language with the key of the calibration set of its monolingual
    text, on whose dense moments the masks' damage is forecast.
    """

    variant: Variant
    sides: tuple[Side, ...] = ()
    dropped: tuple[int, ...] = ()  # how many weights each layer of the model drops; empty: `uniform`
    removal: UnitPlan | None = None  # if the variant removes whole units
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
        """Whether the rule or the repair needs products of channels, not only their squares."""
        return isinstance(self.rule, Solver) or self.variant.repair != "none"

    def drops(self, layer: int, weights_OI: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Return how many weights each matrix of a layer drops; empty: `uniform`."""
        if not self.dropped:
            return {}
        shapes = [(len(weight_OI), weight_OI.shape[1]) for weight_OI in weights_OI.values()]
        sizes = [rows * width for rows, width in shapes]
        uniform = [uniform_count(*shape, self.variant.sparsity, self.rule.within) for shape in shapes]
        return dict(zip(weights_OI, matrix_counts(uniform, sizes, self.dropped[layer]), strict=True))

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


def masks_of_layer(
    index: int, layer: torch.nn.Module, recipe: MaskRecipe, gathered: Gathered, dense: Gathered
) -> tuple[LayerMasks, MaskSummary]:
    """Return the masks (or changed weights) of the borrowed dense layer `index`, and their summary.

    `gathered` holds the moments that the rule reads, `dense` those of the recipe's forecasts. A matrix that drops
    nothing has no mask, so a layer may have none at all.

    Raises ModelError when a score is not finite, or a Hessian is singular.
    """
    masks, unseen = {}, []
    energy: Energy = {language: [] for language, _ in recipe.forecasts}
    weights_OI = layer_weights(layer)
    drops = recipe.drops(index, weights_OI)
    for name, weight_OI in weights_OI.items():
        if drops.get(name) == 0:
            keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)
        else:
            readings = recipe.read(gathered, name)
            if not readings[0].is_complete:
                unseen.append(f"{index}.{name}")
            keep_OI, masks[name] = _mask(index, name, weight_OI, recipe, readings, drops.get(name))
        forecast(name, weight_OI, keep_OI, recipe, dense, energy)
    weights = sum(weight_OI.numel() for weight_OI in weights_OI.values())
    return masks, summarize(masks, weights, unseen, energy)


def layer_weights(layer: torch.nn.Module) -> dict[str, Tensor]:
    """Return the layer's matrices as views [O, I] of its parameters, by name."""
    return {
        name: matrix.view_OI(layer.get_parameter(matrix.parameter).data)
        for name, matrix in matrices(layer).items()
    }


def _mask(
    index: int,
    name: str,
    weight_OI: Tensor,
    recipe: MaskRecipe,
    readings: Sequence[Reading],
    drop: int | None,
) -> tuple[Tensor, PackedMask | PackedWeights]:
    """Return which weights are kept, as a boolean matrix and packed; `drop` None: as many as `uniform` drops."""
    rule, where = recipe.rule, f"layer {index}, {name}"
    for reading in readings:
        for side in reading.sides:
            check_finite(side.sumsq_I, "the sums of its inputs", where)
    if isinstance(rule, Solver) and readings[0].is_complete:
        keep_OI, changed_OI = _solved(rule, weight_OI, readings[0].sides[0], recipe, drop, where)
        return keep_OI, PackedWeights.pack(keep_OI, changed_OI)
    score = rule if isinstance(rule, Score) else UNSEEN
    seed, pattern = matrix_seed(recipe.variant.seed, index, name), recipe.variant.pattern

    def scored(reading: Reading) -> Tensor:
        score_OI = score.function(weight_OI, reading.sides, seed)
        check_finite(score_OI, "the scores", where)
        return score_OI

    if len(readings) == 1:
        score_OI = scored(readings[0])
    else:
        score_OI = best_rank(((scored(one), one.weight) for one in readings), pattern, score.within)
    if drop is None:
        keep_OI = keep_mask(score_OI, recipe.variant.sparsity, pattern, score.within)
    else:
        keep_OI = keep_all_but(score_OI, drop, score.within)
    return keep_OI, PackedMask.pack(keep_OI)


def _solved(
    solver: Solver, weight_OI: Tensor, moments: Moments, recipe: MaskRecipe, drop: int | None, where: str
) -> tuple[Tensor, Tensor]:
    """Return which weights a solver keeps, and their new values in the model's dtype."""
    sparsity = recipe.variant.sparsity if drop is None else Fraction(drop, weight_OI.numel())
    try:
        keep_OI, changed_OI = solver.function(weight_OI, moments, sparsity, recipe.variant.pattern)
    except SingularHessianError:
        remedy = "its Hessian is not positive definite; raise calibration.samples, or load it in float32"
        raise ModelError("search.score", f"{recipe.variant.score.name} at {where}", remedy) from None
    changed_OI = changed_OI.to(weight_OI.dtype)
    check_finite(changed_OI, "the changed weights", where)
    return keep_OI, changed_OI


def forecast(
    name: str, weight_OI: Tensor, keep_OI: Tensor, recipe: MaskRecipe, dense: Gathered, energy: Energy
) -> None:
    """Append to `energy` the share of energy dropped on each language's text, if that text reaches the matrix.

    It is NaN where the text's sums are not finite: then nothing is forecast, but masks may not need these sums.
    """
    if not recipe.forecasts:
        return
    sumsq_LI = torch.stack([dense[key][name].sumsq_I for _, key in recipe.forecasts])
    shares = dropped_energy(weight_OI, keep_OI, sumsq_LI).tolist()
    finite = sumsq_LI.isfinite().all(1).tolist()
    for (language, _), share, known in zip(recipe.forecasts, shares, finite, strict=True):
        if not (known and math.isnan(share)):
            energy[language].append(share)


def check_finite(values: Tensor, what: str, where: str) -> None:
    """Raise ModelError, which names `what` and `where`, if a value is infinite or NaN."""
    if not torch.stack(torch.aminmax(values)).isfinite().all():  # NaN is the largest, and the smallest
        remedy = f"{what} are not finite; load the model in float32, or check its weights"
        raise ModelError("model.dtype", where, remedy)


def summarize(
    masks: LayerMasks, weights: int, unseen: Sequence[str], energy: Mapping[str, Sequence[float]]
) -> MaskSummary:
    """Return the summary of a layer's masks; `weights` are all weights of the matrices that they concern."""
    return MaskSummary(
        dropped=sum(mask.dropped for mask in masks.values()),
        weights=weights,
        digest=hashlib.sha256("".join(mask.digest() for mask in masks.values()).encode()).hexdigest(),
        unseen=tuple(unseen),
        energy={language: tuple(shares) for language, shares in energy.items()},
    )


def matrix_seed(seed: int, layer: int, name: str) -> int:
    """Return the seed of a matrix's random scores."""
    return int.from_bytes(hashlib.sha256(f"{seed} {layer} {name}".encode()).digest()[:8], "big") >> 1
