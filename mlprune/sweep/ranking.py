"""What a sweep came to: trials from best to worst, and how far the differences between them may be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlprune.evaluation.items import Items, from_json
from mlprune.evaluation.significance import mean_ratio_interval
from mlprune.spec.schema import SweepSpec
from mlprune.storage.results import Result, ResultStore

Interval = tuple[float, float, float]  # a value, and the low and high end of 95%


@dataclass(frozen=True)
class SweepOutcome:
    """A finished sweep: the dense model, the trials from best to worst, and where to look at them."""

    spec: SweepSpec
    dense: Result
    ranking: tuple[Result, ...]
    changes: Mapping[str, Interval]  # result key -> mean bits per byte against the dense model's: 0.2 is 20% more
    level: frozenset[str]  # keys of results that are not told apart from the best of their sparsity
    runs: Mapping[str, str]  # result key -> MLflow run
    experiment: str  # of MLflow, by its id
    parent_run: str
    pictures: tuple[Path, ...]  # the lines first
    failed: Mapping[str, str]  # a trial's label -> cause
    nodes: tuple[str, ...]  # addresses, of each shard; of nothing if nothing was left to run

    @property
    def objective(self) -> str:
        return f"bits_per_byte.{self.spec.search.objective}"

    def best_by_sparsity(self) -> list[Result]:
        """The best trial of each sparsity, sparsest last: bits per byte only compare within one."""
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


def _level(ranking: Sequence[Result], lines: Mapping[str, Sequence[Items]], objective: str) -> frozenset[str]:
    """Keys of results whose difference from the best of their sparsity may be chance: its interval holds 0."""
    if objective == "worst":  # what is compared here is the mean
        return frozenset()
    level = set()
    best = _best(ranking)
    for result in ranking:
        first = best[_sparsity(result)]
        if result is not first and mean_ratio_interval(lines[first.key], lines[result.key])[1] <= 0:
            level.add(result.key)
    return frozenset(level)


def _lines(store: ResultStore, result: Result) -> list[Items]:
    """What the trial told of held-out lines."""
    return [one for one in from_json(store.items(result.key)) if one.kind == "likelihood"]


@dataclass(frozen=True)
class Ranking:
    """Results of a sweep against each other."""

    trials: tuple[Result, ...]  # from best to worst
    changes: Mapping[str, Interval]  # as in SweepOutcome
    level: frozenset[str]


def ranking_of(dense: Result, results: Sequence[Result], objective: str, store: ResultStore) -> Ranking:
    """Rank the trials by bits per byte of `objective` (mean or worst), lowest first."""
    trials = tuple(sorted(results, key=lambda result: _rank(result.metrics[f"bits_per_byte.{objective}"])))
    lines = {result.key: _lines(store, result) for result in (dense, *trials)}
    changes = {result.key: mean_ratio_interval(lines[dense.key], lines[result.key]) for result in trials}
    return Ranking(trials, changes, _level(trials, lines, objective))


def _rank(value: float) -> tuple[bool, float]:
    """Lower is better, and no number is worst: a model pruned to pieces may have no likelihood at all."""
    return math.isnan(value), value
