"""Ranks the trials of a sweep, and tests which differences from the best may be chance.

Trials that differ in their seed alone are one entry. Comparisons are made within a sparsity, on the held-out lines
for selection. The statistics are in `evaluation/estimates.py`; how a ranking is displayed is in `report`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from mlprune.evaluation.estimates import Estimate, estimate
from mlprune.evaluation.items import Items, from_json
from mlprune.evaluation.loss import LOSS, loss_metrics, lower_is_better, objective_samples, shared_items
from mlprune.evaluation.resampling import clusters
from mlprune.evaluation.significance import LEVEL, holm
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.claims import ClaimTest
from mlprune.sweep.screening import forecast_metric
from mlprune.sweep.trial import trial_metrics

OTHER_METRICS = (
    *("loss", "forecast", "bits_per_byte", "perplexity", "rankc", "agreement"),  # of text, and of answers
    *("sparsity", "seconds"),
)


class Standing(Enum):
    """How far the evaluation of a trial went."""

    EVALUATED = "evaluated"
    DROPPED = "dropped in the race"
    SCREENED = "not evaluated"


@dataclass(frozen=True, eq=False)
class Trial:
    """What is known of one variant with one seed."""

    result: Result
    items: Sequence[Items]
    standing: Standing = Standing.EVALUATED


@dataclass(frozen=True, eq=False)
class RankedVariant:
    """A variant in the ranking. All its numbers are means over its seeds."""

    result: Result  # with the key and the masks of the first seed, and the loss among the metrics
    seeds: tuple[Result, ...]  # in order of the seeds
    standing: Standing
    lines: int  # held-out lines a language that it was evaluated on, for selection
    loss: Estimate | None = None  # the objective if it is a loss, else loss.mean; None if it was not evaluated
    to_best: Estimate | None = None  # difference of the objective to the best of its sparsity; None for the best
    tied: bool = False  # not significantly different from the best of its sparsity
    confirmed: Estimate | None = None  # the loss on confirmation lines

    @property
    def key(self) -> str:
        return self.result.key

    @property
    def variant(self) -> Variant:
        """The variant without its seed."""
        assert self.result.variant is not None
        return self.result.variant.without_seed

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.result.metrics

    @property
    def is_best(self) -> bool:
        """Whether it is the best of its sparsity."""
        return self.standing is Standing.EVALUATED and self.to_best is None


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau between the ranking by mean loss and by another metric: 1 if both rank equally."""

    metric: str
    tau: float
    p: float


@dataclass(frozen=True)
class SweepOutcome:
    """A finished sweep: the dense model, the variants from best to worst, and where to look at them."""

    spec: SweepSpec
    dense: Result
    ranking: tuple[RankedVariant, ...]
    agreements: tuple[Agreement, ...]
    unknown_languages: Mapping[str, tuple[float, float]]  # bits per byte of the dense model, and of a compressor
    runs: Mapping[str, str]  # result key -> MLflow run id
    experiment: str  # MLflow experiment id
    parent_run: str  # MLflow run id of the sweep
    pictures: tuple[Path, ...]  # the line plot first
    failed: Mapping[str, str]  # label of the trial -> cause
    nodes: tuple[str, ...]  # address of each shard's node; empty if no trial had to be run
    claims: tuple[ClaimTest, ...] = ()  # of one claim after another, at each sparsity

    @property
    def objective(self) -> str:
        """The name of the metric by which trials are ranked."""
        return self.spec.search.metric

    @property
    def evaluated(self) -> list[RankedVariant]:
        """The variants that were evaluated on all lines for selection, from best to worst."""
        return [entry for entry in self.ranking if entry.standing is Standing.EVALUATED]

    def best_by_sparsity(self) -> list[RankedVariant]:
        """Return the best variant of each sparsity, sparsest last. Losses compare only within one."""
        return sorted((entry for entry in self.ranking if entry.is_best), key=lambda entry: entry.variant.sparsity)


def rank_trials(trials: Sequence[Trial], dense: Trial, metric: str) -> tuple[RankedVariant, ...]:
    """Return the variants from best to worst by `metric`; those that were not fully evaluated come last.

    Within a sparsity, every variant is tested against the best one, with Holm's correction over these tests.
    """
    groups: dict[Variant, list[Trial]] = {}
    for trial in trials:
        assert trial.result.variant is not None
        groups.setdefault(trial.result.variant.without_seed, []).append(trial)
    entries = {variant: _entry(group, dense, metric) for variant, group in groups.items()}
    for sparsity in dict.fromkeys(variant.sparsity for variant in entries):
        within = {variant: groups[variant] for variant in entries if variant.sparsity == sparsity}
        _compare_with_best(entries, within, dense, metric)
    return tuple(sorted(entries.values(), key=lambda entry: _rank(entry, metric)))


def _entry(trials: Sequence[Trial], dense: Trial, metric: str) -> RankedVariant:
    trials = sorted(trials, key=lambda trial: trial.result.variant.seed if trial.result.variant else 0)
    results = tuple(_with_loss(trial, dense) for trial in trials)
    loss_metric = metric if metric.startswith(LOSS) else f"{LOSS}mean"
    evaluated = trials[0].standing is not Standing.SCREENED
    return RankedVariant(
        result=_mean(results),
        seeds=results,
        standing=trials[0].standing,
        lines=_lines(trials[0].items),
        loss=loss_estimate(trials, dense, loss_metric) if evaluated else None,
    )


def _with_loss(trial: Trial, dense: Trial) -> Result:
    """Return the result with the losses among its metrics, of the lines that it was evaluated on."""
    if trial.standing is Standing.SCREENED:
        return trial.result
    reference = dense.result.metrics
    if trial.standing is Standing.DROPPED:
        reference = trial_metrics(shared_items(_likelihoods(dense.items), _likelihoods(trial.items))[0])
    return replace(trial.result, metrics={**trial.result.metrics, **loss_metrics(trial.result.metrics, reference)})


def _mean(results: Sequence[Result]) -> Result:
    """Return the mean of the metrics over seeds, as a result of the first seed."""
    names = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
    metrics = {name: sum(result.metrics[name] for result in results) / len(results) for name in names}
    return replace(results[0], metrics=metrics)


def _lines(items: Sequence[Items]) -> int:
    return max((len(part.ids) for part in _likelihoods(items)), default=0)


def _likelihoods(items: Sequence[Items]) -> list[Items]:
    return [part for part in items if part.kind == "likelihood"]


def loss_estimate(trials: Sequence[Trial], dense: Trial, metric: str) -> Estimate:
    """Return a loss of one variant's seeds with its interval: the change against the dense model."""
    samples = [objective_samples(trial.items, dense.items, metric) for trial in trials]
    return estimate(samples, clusters(trials[0].items, [metric]))


def difference(a: Sequence[Trial], b: Sequence[Trial], dense: Trial, metric: str) -> Estimate:
    """Return how much larger the metric is for the seeds of variant `a` than of `b`, on the items of both.

    Seeds are paired. A variant without a seed is compared with every seed of the other.
    """
    a, b = _paired(a, b)
    runs = shared_items(dense.items, *(trial.items for trial in (*a, *b)))
    samples = [objective_samples(run, runs[0], metric) for run in runs[1:]]
    return estimate(samples[: len(a)], clusters(runs[0], [metric]), samples[len(a) :])


def _paired(a: Sequence[Trial], b: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    """Return the trials with the seeds that both have; a single trial stays single, and is paired with all."""
    by_seed = [{t.result.variant.seed: t for t in trials if t.result.variant} for trials in (a, b)]
    if common := sorted(by_seed[0].keys() & by_seed[1].keys()):
        if len(a) > 1 and len(b) > 1:
            return [by_seed[0][seed] for seed in common], [by_seed[1][seed] for seed in common]
    elif len(a) > 1 and len(b) > 1:  # each lacks the seeds of the other, because trials failed
        return [a[0]], [b[0]]
    if len(a) == 1 < len(b):
        return [a[0]] * len(b), list(b)
    return list(a), list(b)


def _compare_with_best(
    entries: dict[Variant, RankedVariant], within: Mapping[Variant, Sequence[Trial]], dense: Trial, metric: str
) -> None:
    """Add the differences to the best variant of one sparsity to its entries."""
    evaluated = [variant for variant in within if entries[variant].standing is Standing.EVALUATED]
    if not evaluated:
        return
    best = min(evaluated, key=lambda variant: _rank(entries[variant], metric))
    others = {v: within[v] for v in within if v != best and entries[v].standing is not Standing.SCREENED}
    for variant, (one, p) in tests_against(within[best], others, dense, metric).items():
        tied = entries[variant].standing is Standing.EVALUATED and p >= LEVEL
        entries[variant] = replace(entries[variant], to_best=one, tied=tied)


def tests_against(
    best: Sequence[Trial], others: Mapping[Variant, Sequence[Trial]], dense: Trial, metric: str
) -> dict[Variant, tuple[Estimate, float]]:
    """Return each variant's difference to `best`, and its p-value after Holm's correction over the variants."""
    estimates = {variant: difference(trials, best, dense, metric) for variant, trials in others.items()}
    adjusted = holm([one.p for one in estimates.values()])
    return {variant: (one, p) for (variant, one), p in zip(estimates.items(), adjusted, strict=True)}


def _rank(entry: RankedVariant, metric: str) -> tuple[int, bool, float]:
    """Return a sort key: most lines first, then the best; NaN is last (the model may be destroyed)."""
    if entry.standing is Standing.SCREENED:
        value = entry.metrics[forecast_metric(metric)]
    else:
        value = entry.metrics[metric] * (1 if lower_is_better(metric) else -1)
    return -entry.lines, math.isnan(value), value


def task_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the metrics of tasks other than perplexity, without agreement between languages."""
    return [name for name in metrics if name.split(".")[0] not in OTHER_METRICS]


def read_items(text: str, metric: str) -> list[Items]:
    """Read the items that a comparison by `metric` needs: for a loss, the likelihoods alone."""
    items = from_json(text)
    return _likelihoods(items) if metric.startswith(LOSS) else items
