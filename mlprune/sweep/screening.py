"""Chooses by forecasts which variants a sweep evaluates. How forecasts are computed is in `shards/masking.py`.

A forecast compares the calibration texts of one rule. Between rules, and between allocations of sparsity to
layers, it misleads (benchmarks/LOG.md): so variants are chosen within each rule, combination of texts, pattern,
allocation and propagation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mlprune.spec.variants import Variant

FORECAST = "forecast."


def forecast_metric(objective: str) -> str:
    """Return the forecast of the objective: of its loss, or of the mean loss for any other metric."""
    return objective.replace("loss.", FORECAST) if objective.startswith("loss.") else f"{FORECAST}mean"


def choose(forecasts: Mapping[Variant, float], count: int) -> list[Variant]:
    """Return the variants to evaluate, in the given order: at each sparsity the `count` most promising ones.

    `forecasts` maps each trial to the forecast of its loss; a variant's forecast is the mean over its seeds.
    Rules, combinations of texts, patterns, allocations and propagations take turns, each with its best variant
    that is left. Variants without calibration are baselines: they are evaluated in any case, and not counted.
    """
    by_variant: dict[Variant, list[float]] = {}
    for trial, value in forecasts.items():
        by_variant.setdefault(trial.without_seed, []).append(value)
    means = {variant: sum(values) / len(values) for variant, values in by_variant.items()}
    chosen = {variant for variant in means if not variant.sides}
    for sparsity in {variant.sparsity for variant in means}:
        candidates = [v for v in means if v.sparsity == sparsity and v not in chosen]
        ordered = sorted(candidates, key=lambda v: (math.isnan(means[v]), means[v]))
        chosen.update(_take_turns(ordered, count))
    return [trial for trial in forecasts if trial.without_seed in chosen]


def _take_turns(ordered: Sequence[Variant], count: int) -> list[Variant]:
    """Return `count` of the variants, ordered by promise, from each group in turn."""
    groups: dict[tuple[object, ...], list[Variant]] = {}
    for variant in ordered:
        combinations = tuple(side.combination for side in variant.sides)
        kind = (variant.score.name, combinations, variant.pattern, variant.allocation, variant.propagation)
        groups.setdefault(kind, []).append(variant)
    turns = [
        (turn, number, group[turn]) for number, group in enumerate(groups.values()) for turn in range(len(group))
    ]
    return [variant for _, _, variant in sorted(turns, key=lambda one: one[:2])[:count]]
