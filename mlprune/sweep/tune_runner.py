"""Trials under Ray Tune: a grid as it is, or what Optuna chooses. The only door to Ray Tune.

A trial runs in a process of its own, on the driver's node, and does nothing there but ask a pipeline and wait: the
arithmetic is in the shards' workers. So this module, which such a process imports, keeps away from MLflow.

Trials go in rounds. As long as nothing dies there is one. When a shard's worker dies, the trials that used it are
lost, no other begins, and the round ends with those that other replicas still work on; the workers are mended,
and what is missing goes into the next round. A trial that was lost twice goes alone, so that the one that kills
workers is told from those that died with it; lost three times, it has failed.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mlprune.console import warn
from mlprune.errors import WorkerLostError
from mlprune.runtime.actors import RayPipeline, pipeline_slot
from mlprune.runtime.placement import trial_slots
from mlprune.runtime.replicas import MAX_WORKER_LOSSES, ReplicaGroup
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.trial import run_trial

if TYPE_CHECKING:
    from mlprune.tracking.tracker import SweepTracker

LOST_ALONE = 2  # so often lost, a trial goes alone


class Deaths:
    """Which trials lost a worker under them, and why; says what is to be done with them."""

    def __init__(self) -> None:
        self._causes: dict[Variant, list[str]] = {}

    def add(self, variant: Variant, cause: str) -> None:
        self._causes.setdefault(variant, []).append(cause)

    @property
    def given_up(self) -> dict[Variant, str]:
        """Those that have failed by it, and the last cause."""
        return {
            variant: f"a worker died {len(causes)} times under it: {causes[-1]}"
            for variant, causes in self._causes.items()
            if len(causes) >= MAX_WORKER_LOSSES
        }

    def next_round(self, todo: Sequence[Variant]) -> tuple[list[Variant], bool]:
        """Of what is still to do, what goes next; and whether it goes alone."""
        suspects = {variant for variant, causes in self._causes.items() if len(causes) >= LOST_ALONE}
        together = [variant for variant in todo if variant not in suspects]
        return (together, False) if together else (list(todo[:1]), True)


@dataclass
class Trials:
    """How the trials stand, as the driver knows it; `under_way` is by the id that Ray Tune gave them."""

    total: int
    results: dict[str, Result] = field(default_factory=dict)  # by key
    failed: dict[Variant, str] = field(default_factory=dict)  # causes
    seconds: list[float] = field(default_factory=list)  # that finished trials took
    under_way: dict[str, UnderWay] = field(default_factory=dict)

    @property
    def over(self) -> int:
        return len(self.results) + len(self.failed)


@dataclass(frozen=True)
class UnderWay:
    """A trial that runs: since when, and since when in its phase (seconds of time.monotonic)."""

    label: str
    began: float
    phase: str
    since: float


def run_trials(
    prepared: Prepared, replicas: ReplicaGroup, tracker: SweepTracker, todo: Sequence[Variant], trials: Trials
) -> None:
    """Run `todo`, or what Optuna chooses; `trials` is kept up to date all the while."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end a sweep as if it were finished
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints its panels whatever the verbosity
    deaths = Deaths()
    optuna = prepared.spec.search.searcher == "optuna"
    left = list(todo)
    while left:
        # Optuna chooses anew each time, led through the results that are there, until nothing was lost
        batch, alone = (left, False) if optuna else deaths.next_round(left)
        given = {"pipelines": replicas.pipelines, "given_up": deaths.given_up}
        watch = _round(prepared, tracker, trials, batch, alone, given)
        for variant, cause in watch.lost.items():
            warn(f"{variant.label}: {cause}")
            deaths.add(variant, cause)
        for variant, cause in deaths.given_up.items():
            if variant in watch.lost:
                tracker.fail_trial(prepared.result_key(variant), variant, cause)
                trials.failed[variant] = cause
        if watch.lost or watch.not_started:
            replicas.repair()
        if optuna:
            left = left if watch.lost or watch.not_started else []
        else:
            over = {result.variant for result in trials.results.values()} | trials.failed.keys()
            left = [variant for variant in left if variant not in over]


def _round(
    prepared: Prepared,
    tracker: SweepTracker,
    trials: Trials,
    batch: Sequence[Variant],
    alone: bool,
    given: Mapping[str, Any],
) -> Watcher:
    """One run of Ray Tune over `batch`."""
    from ray import tune
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    # Tune would hand a trial the driver's keys as settings of its process, and Ray writes those to its logs
    ENV_VARS_TO_PROPAGATE.difference_update([name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")])
    search = prepared.spec.search
    objective = f"bits_per_byte.{search.objective}"
    optuna = search.searcher == "optuna"
    pipelines: Sequence[RayPipeline] = given["pipelines"]
    at_once = prepared.plan.trials * len(pipelines)
    watch = Watcher(prepared, tracker, trials, pipelines)
    with tempfile.TemporaryDirectory(prefix="mlprune-tune-") as scratch:
        function = tune.with_parameters(tune_trial, prepared=prepared, objective=objective, **given)
        tuner = tune.Tuner(
            tune.with_resources(function, {"CPU": 0, **trial_slots(at_once)}),
            param_space=None if optuna else {"variant": tune.grid_search([v.to_dict() for v in batch])},
            tune_config=tune.TuneConfig(
                metric=objective if optuna else None,
                mode="min" if optuna else None,
                reuse_actors=True,
                search_alg=_optuna(prepared, objective) if optuna else None,
                num_samples=search.samples if optuna and search.samples else 1,
                # one at a time, what Optuna suggests follows from its seed and from results alone, so that
                # a sweep started again is led through the results that are there, and goes on
                max_concurrent_trials=1 if optuna or alone else None,
            ),
            run_config=tune.RunConfig(storage_path=scratch, name="sweep", callbacks=[_callback(watch)], verbose=0),
        )
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        tuner.fit()
    return watch


def _optuna(prepared: Prepared, objective: str) -> Any:
    import optuna
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, seed = prepared.spec.search, prepared.spec.calibration.seed
    names = ("calibration", "score", "sparsity", "pattern", "propagation", "allocation")
    values = search.model_dump(mode="json")
    space = {name: tune.choice(values[name] or [None]) for name in names}
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5)
    return OptunaSearch({"variant": space}, metric=objective, mode="min", sampler=sampler)


def tune_trial(
    config: dict[str, Any],
    prepared: Prepared,
    pipelines: Sequence[RayPipeline],
    given_up: Mapping[Variant, str],
    objective: str,
) -> None:
    """What Ray Tune runs: one variant, unless its result is there."""
    from ray import tune

    variant = parse_variant(**config["variant"])
    store = prepared.result_store()
    worst = {objective: float("inf")}
    if variant in given_up:
        tune.report({"cause": given_up[variant], "traceback": given_up[variant], **worst})
        return
    try:
        result = store.load(prepared.result_key(variant))
        if result is None:
            with pipeline_slot(pipelines, tune.get_context().get_trial_id()) as pipeline:
                gather_moments(prepared, pipeline, [variant])  # of a mended worker; else they are there
                result, items = run_trial(prepared, pipeline, variant, _under_way(prepared))
            store.save(result, items)
        tune.report({objective: result.metrics[objective]})
    except WorkerLostError as lost:
        tune.report({"drained" if lost.not_started else "lost": str(lost), **worst})
    except Exception as error:  # whatever it is, it ends this trial and not the others; the sweep reports it
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        tune.report({"cause": cause, "traceback": traceback.format_exc(), **worst})


def _under_way(prepared: Prepared) -> Callable[[Mapping[str, float]], None]:
    """Reports that masks are made; to Optuna nothing, which wants its objective in every report."""
    from ray import tune

    if prepared.spec.search.searcher == "optuna":
        return lambda metrics: None
    return lambda metrics: tune.report({"masked": True})


class Watcher:
    """What the driver does when a trial begins, tells something or ends."""

    def __init__(
        self, prepared: Prepared, tracker: SweepTracker, trials: Trials, pipelines: Sequence[RayPipeline]
    ) -> None:
        self._prepared, self._tracker, self._trials = prepared, tracker, trials
        self._pipelines = pipelines
        self.lost: dict[Variant, str] = {}  # that a worker died under, and why
        self.not_started: set[Variant] = set()  # that did not begin, because a worker was dead

    def began(self, trial: Any) -> None:
        key, variant = self._key_and_variant(trial)
        now = time.monotonic()
        self._trials.under_way[trial.trial_id] = UnderWay(variant.label, now, "masking", now)
        self._tracker.start_trial(key, variant)

    def told(self, trial: Any, told: Mapping[str, Any]) -> None:
        key, variant = self._key_and_variant(trial)
        if "lost" in told:
            self.lost[variant] = told["lost"]
        elif "drained" in told:
            self.not_started.add(variant)
        elif "cause" in told:
            self._trials.failed[variant] = told["cause"]
            self._tracker.fail_trial(key, variant, told["traceback"])
        elif known := self._trials.under_way.get(trial.trial_id):  # its metrics are logged whole, at its end
            now = time.monotonic()
            self._trials.under_way[trial.trial_id] = UnderWay(known.label, known.began, "evaluating", now)

    def ended(self, trial: Any) -> None:
        key, _ = self._key_and_variant(trial)
        known = self._trials.under_way.pop(trial.trial_id, None)
        store = self._prepared.result_store()
        finished = store.load(key)
        if finished is not None:
            if known and key not in self._trials.results:
                self._trials.seconds.append(time.monotonic() - known.began)
            self._trials.results[key] = finished
            self._tracker.finish_trial(finished, partial(store.items, key))

    def died(self, trial: Any) -> None:
        """The trial's own process is gone; what it left in the shards is let go of."""
        _, variant = self._key_and_variant(trial)
        self._trials.under_way.pop(trial.trial_id, None)
        for pipeline in self._pipelines:
            pipeline.release_slot(trial.trial_id, variant.key)
        self.lost[variant] = "the trial's own process died"

    def _key_and_variant(self, trial: Any) -> tuple[str, Variant]:
        variant = parse_variant(**trial.config["variant"])
        return self._prepared.result_key(variant), variant


def _callback(watch: Watcher) -> Any:
    """The watcher as a callback of Ray Tune's, in the driver."""
    from ray import tune

    class Callback(tune.Callback):  # type: ignore[misc]
        def __reduce__(self) -> Any:  # Tune pickles its set-up to disk, for a restore that we do not do
            return (tune.Callback, ())

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            watch.began(trial)

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            watch.told(trial, result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            watch.ended(trial)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            watch.died(trial)

    return Callback()
