"""The verdict of a sweep: runs its stages in order, ranks the trials, and confirms the best.

A stage is run by `stage_runner`; what is logged to MLflow and drawn of the verdict is in `sweep`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from mlprune.evaluation.estimates import rank_correlation
from mlprune.evaluation.items import from_json
from mlprune.evaluation.loss import LOSS, lower_is_better
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.claims import ClaimTest, claim_tests
from mlprune.sweep.mixture_search import search_mixtures
from mlprune.sweep.plan import SweepPlan
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.racing import race
from mlprune.sweep.ranking import (
    Agreement,
    RankedVariant,
    Standing,
    Trial,
    loss_estimate,
    rank_trials,
    read_items,
    task_metrics,
)
from mlprune.sweep.screening import choose, forecast_metric
from mlprune.sweep.searching import search_grid
from mlprune.sweep.stage import MASKS_ONLY, Purpose, Stage
from mlprune.sweep.stage_runner import StageRunner

FEWEST_CORRELATED = 4  # variants: with fewer, a rank correlation says nothing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the stages of a sweep yield. The ranking is empty if no trial was evaluated."""

    dense: Result
    ranking: tuple[RankedVariant, ...]
    agreements: tuple[Agreement, ...] = ()
    unfinished: tuple[Trial, ...] = ()  # dropped or not evaluated
    claims: tuple[ClaimTest, ...] = ()


def run_stages(plan: SweepPlan, runner: StageRunner) -> Verdict:
    """Screen, search, race or evaluate the trials, as the spec says; rank them, and confirm the best ones.

    Mixtures are searched after screening, which does not concern them, and before the race, which they join.
    """
    prepared, store = plan.prepared, plan.prepared.result_store()
    search = prepared.spec.search
    result = runner.dense(prepared.suite)
    dense = Trial(result, read_items(store.items(result.key), search.metric))
    variants, screened = _screen(plan, runner)
    mixtures = search_mixtures(plan, runner, result)
    trials = _evaluate(plan, runner, dense, variants, mixtures.trials)
    if not any(trial.standing is Standing.EVALUATED for trial in trials):
        return Verdict(result, ())
    screened = [trial for trial in screened if trial.result.variant not in mixtures.trials]
    ranking = rank_trials([*trials, *screened], dense, search.metric)
    unfinished = (
        *(trial for trial in (*trials, *screened) if trial.standing is not Standing.EVALUATED),
        *_only_forecast(prepared, mixtures.forecast, ranking, runner.failed),
    )
    confirmation = _confirm(plan, runner, ranking)
    if confirmation is None:
        return Verdict(result, ranking, task_agreements(ranking), unfinished)
    ranking = _with_confirmed(ranking, confirmation, search.metric)
    items = {variant: trial.items for variant, trial in confirmation.trials.items()}
    claims = claim_tests(plan.claims, items, confirmation.dense.items)
    return Verdict(result, ranking, task_agreements(ranking), unfinished, claims)


def _evaluate(
    plan: SweepPlan, runner: StageRunner, dense: Trial, variants: Sequence[Variant], mixtures: Sequence[Variant]
) -> list[Trial]:
    """Evaluate the variants, or those of the grid that Optuna chooses, and mixtures that were found."""
    prepared, search = plan.prepared, plan.prepared.spec.search
    if search.searcher == "optuna" and search.samples:
        results = search_grid(plan, runner, dense.result)
        return _trials(prepared, results | runner.run(_selection(prepared), mixtures))
    together = list(dict.fromkeys([*variants, *mixtures]))
    if not search.racing:
        return _trials(prepared, runner.run(_selection(prepared), together))
    trials = race(prepared, runner, dense, together)
    runner.log_finished(trial.result for trial in trials if trial.standing is Standing.EVALUATED)
    return trials


def _selection(prepared: Prepared) -> Stage:
    return Stage(Purpose.SELECT, "pruning and evaluating", prepared.suite)


def _screen(plan: SweepPlan, runner: StageRunner) -> tuple[Sequence[Variant], list[Trial]]:
    """Return the variants to evaluate, and the others with their forecasts."""
    search = plan.prepared.spec.search
    if search.screen is None:
        return plan.variants, []
    stage = Stage(Purpose.SCREEN, "screening", MASKS_ONLY)
    results = runner.run(stage, plan.variants)
    metric = forecast_metric(search.metric)
    chosen = choose({variant: result.metrics[metric] for variant, result in results.items()}, search.screen)
    logger.info("  %d of %d trials are evaluated", len(chosen), len(results))
    others = {variant: result for variant, result in results.items() if variant not in chosen}
    return chosen, _screened(plan.prepared, others)


def _screened(prepared: Prepared, results: Mapping[Variant, Result]) -> list[Trial]:
    """Return trials of which only forecasts are known."""
    return [
        Trial(replace(result, key=prepared.result_key(variant)), (), Standing.SCREENED)
        for variant, result in results.items()
    ]


def _only_forecast(
    prepared: Prepared,
    forecast: Mapping[Variant, Result],
    ranking: Sequence[RankedVariant],
    failed: Collection[Variant],
) -> list[Trial]:
    """Return the mixtures that were forecast and not evaluated. They are many, so they are not in the ranking."""
    ranked = {result.variant for entry in ranking for result in entry.seeds}
    rest = {v: result for v, result in forecast.items() if v not in ranked and v not in failed}
    return _screened(prepared, rest)


def _trials(prepared: Prepared, results: Mapping[Variant, Result]) -> list[Trial]:
    store, metric = prepared.result_store(), prepared.spec.search.metric
    return [Trial(result, read_items(store.items(result.key), metric)) for result in results.values()]


@dataclass(frozen=True, eq=False)
class Confirmation:
    """Trials on the confirmation lines. Failed ones are missing."""

    dense: Trial
    trials: Mapping[Variant, Trial]


def _confirm(plan: SweepPlan, runner: StageRunner, ranking: Sequence[RankedVariant]) -> Confirmation | None:
    """Evaluate trials on the confirmation lines; None if there are no such lines.

    These are the best of each sparsity, what is not significantly different from them, and what claims compare.
    """
    assert plan.prepared.evaluation is not None
    suite, store = plan.prepared.evaluation.confirmation, plan.prepared.result_store()
    if suite is None:
        return None
    best = [seed.variant for entry in ranking if entry.is_best or entry.tied for seed in entry.seeds]
    claimed = [variant for claim in plan.claims for variant in claim.variants]
    variants = list(dict.fromkeys(variant for variant in (*best, *claimed) if variant))
    dense = runner.dense(suite)
    name = "confirming the best" + (", testing claims" if claimed else "")
    results = runner.run(Stage(Purpose.CONFIRM, name, suite), variants)
    trials = {variant: Trial(result, from_json(store.items(result.key))) for variant, result in results.items()}
    return Confirmation(Trial(dense, from_json(store.items(dense.key))), trials)


def _with_confirmed(
    ranking: Sequence[RankedVariant], confirmation: Confirmation, metric: str
) -> tuple[RankedVariant, ...]:
    """Add the loss on the confirmation lines to the best ones."""
    metric = metric if metric.startswith(LOSS) else f"{LOSS}mean"
    confirmed = {}
    for entry in ranking:
        seeds = [result.variant for result in entry.seeds if result.variant]
        trials = [confirmation.trials[variant] for variant in seeds if variant in confirmation.trials]
        if trials and (entry.is_best or entry.tied):
            confirmed[entry.key] = loss_estimate(trials, confirmation.dense, metric)
    return tuple(replace(entry, confirmed=confirmed.get(entry.key)) for entry in ranking)


def task_agreements(ranking: Sequence[RankedVariant]) -> tuple[Agreement, ...]:
    """Correlate the mean loss of the evaluated variants with each task; nothing if they are few.

    A task by which all variants are equal is left out.
    """
    evaluated = [entry.metrics for entry in ranking if entry.standing is Standing.EVALUATED]
    if len(evaluated) < FEWEST_CORRELATED:
        return ()
    loss = [-metrics[f"{LOSS}mean"] for metrics in evaluated]
    agreements = []
    for name in task_metrics(evaluated[0]):
        sign = -1 if lower_is_better(name) else 1
        tau, p = rank_correlation(loss, [sign * metrics[name] for metrics in evaluated])
        if not math.isnan(tau):
            agreements.append(Agreement(name, tau, p))
    return tuple(agreements)


def unknown_languages(prepared: Prepared, dense: Result) -> dict[str, tuple[float, float]]:
    """Return the languages that the dense model hardly knows, with its bits per byte and a compressor's."""
    assert prepared.evaluation is not None
    return {
        code: (dense.metrics[f"bits_per_byte.{code}"], compressed)
        for code, compressed in prepared.evaluation.compressed_bits.items()
        if dense.metrics[f"bits_per_byte.{code}"] >= compressed
    }
