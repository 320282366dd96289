"""The outcome of a sweep: trials from best to worst, and which differences between them may be chance.

The statistics are in `evaluation/significance.py`; how a ranking is displayed is in `report`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlprune.evaluation.items import Items, from_json
from mlprune.evaluation.significance import Interval, mean_ratio_interval
from mlprune.spec.schema import SweepSpec
from mlprune.storage.results import Result, ResultStore


@dataclass(frozen=True)
class SweepOutcome:
    """A finished sweep: the dense model, the trials from best to worst, and where to look at them."""

    spec: SweepSpec
    dense: Result
    ranking: tuple[Result, ...]
    changes: Mapping[str, Interval]  # result key -> change of mean bits per byte from the dense model; 0.2 is +20%
    tied: frozenset[str]  # keys of results not significantly different from the best of their sparsity
    runs: Mapping[str, str]  # result key -> MLflow run id
    experiment: str  # MLflow experiment id
    parent_run: str  # MLflow run id of the sweep
    pictures: tuple[Path, ...]  # the line plot first
    failed: Mapping[str, str]  # label of the trial -> cause
    nodes: tuple[str, ...]  # address of each shard's node; empty if no trial had to be run

    @property
    def objective(self) -> str:
        """Return the name of the metric by which trials are ranked."""
        return f"bits_per_byte.{self.spec.search.objective}"

    def best_by_sparsity(self) -> list[Result]:
        """Return the best trial of each sparsity, sparsest last. Bits per byte compare only within one."""
        best = _best(self.ranking)
        return [best[sparsity] for sparsity in sorted(best)]


def _best(ranking: Sequence[Result]) -> dict[float, Result]:
    best: dict[float, Result] = {}
    for result in ranking:
        best.setdefault(_sparsity(result), result)
    return best


def _sparsity(result: Result) -> float:
    assert result.variant is not None
    return result.variant.sparsity


def _tied(ranking: Sequence[Result], lines: Mapping[str, Sequence[Items]], objective: str) -> frozenset[str]:
    """Return the keys of results whose difference from the best of their sparsity has an interval that holds 0."""
    if objective == "worst":  # the intervals are of the mean
        return frozenset()
    tied = set()
    best = _best(ranking)
    for result in ranking:
        first = best[_sparsity(result)]
        if result is not first and mean_ratio_interval(lines[first.key], lines[result.key])[1] <= 0:
            tied.add(result.key)
    return frozenset(tied)


def _likelihoods(store: ResultStore, result: Result) -> list[Items]:
    """Return the trial's likelihoods of held-out lines."""
    return [items for items in from_json(store.items(result.key)) if items.kind == "likelihood"]


@dataclass(frozen=True)
class Ranking:
    """The results of a sweep, compared with each other."""

    trials: tuple[Result, ...]  # from best to worst
    changes: Mapping[str, Interval]  # as in SweepOutcome
    tied: frozenset[str]  # as in SweepOutcome


def rank_trials(dense: Result, results: Sequence[Result], objective: str, store: ResultStore) -> Ranking:
    """Rank the trials by bits per byte of `objective` (mean or worst), lowest first."""
    trials = tuple(sorted(results, key=lambda result: _rank(result.metrics[f"bits_per_byte.{objective}"])))
    lines = {result.key: _likelihoods(store, result) for result in (dense, *trials)}
    changes = {result.key: mean_ratio_interval(lines[dense.key], lines[result.key]) for result in trials}
    return Ranking(trials, changes, _tied(trials, lines, objective))


def _rank(value: float) -> tuple[bool, float]:
    """Return a sort key: lower is better, NaN is last (a destroyed model may have no likelihood at all)."""
    return math.isnan(value), value
