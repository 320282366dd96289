"""Runs a list of trials with Ray Tune. No other module imports ray.tune.

A trial runs in a process of its own, on the driver's node; it only calls a pipeline and waits, because the workers
of the shards do the compute. Such a process imports this module, which therefore does not import MLflow.

Trials run in rounds; as long as no worker dies there is one. When a worker dies, the trials that used it are lost,
no other trial starts, and the round ends when the trials on other replicas end. Then the workers are repaired, and
unfinished trials run in the next round, as `failure_policy` decides.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict

from mlprune.errors import WorkerLostError
from mlprune.evaluation.suite import Suite
from mlprune.runtime.actors import RayPipeline, pipeline_slot
from mlprune.runtime.placement import trial_slots
from mlprune.runtime.replicas import MAX_WORKER_LOSSES, ReplicaGroup
from mlprune.runtime.worker_logging import configure_worker_logging
from mlprune.spec.variants import Variant, VariantValues
from mlprune.storage.scratch import scratch_folder
from mlprune.sweep.failure_policy import FailureDecision, FailurePolicy
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.stage import Purpose, Stage
from mlprune.sweep.trial import run_trial
from mlprune.sweep.trial_outcome import (
    Failed,
    Finished,
    Masked,
    NotStarted,
    TrialOutcome,
    WorkerLost,
    from_tune,
    to_tune,
)
from mlprune.sweep.trial_progress import ActiveTrial, TrialProgress

if TYPE_CHECKING:
    from ray import tune
    from ray.tune.experiment import Trial

    from mlprune.tracking.tracker import SweepTracker


class TrialConfig(TypedDict):
    """What Ray Tune passes to a trial: one point of the search space."""

    variant: VariantValues


def run_trials(
    prepared: Prepared,
    replicas: ReplicaGroup,
    tracker: SweepTracker,
    stage: Stage,
    todo: Sequence[Variant],
    progress: TrialProgress,
) -> None:
    """Run the trials `todo` of a stage; keep `progress` up to date."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end a sweep as if it were finished
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints its panels whatever the verbosity
    policy = FailurePolicy(MAX_WORKER_LOSSES)
    remaining = list(todo)
    while remaining:
        batch, alone = policy.next_round(remaining)
        listener = TrialListener(prepared, tracker, stage, progress, replicas.pipelines)
        _run_round(prepared, replicas.pipelines, stage, listener, batch, alone)
        for variant, cause in listener.lost.items():
            if policy.record_loss(variant, cause) is FailureDecision.GIVE_UP:
                listener.record_failure(variant, policy.given_up[variant], policy.given_up[variant])
        if listener.is_interrupted:
            replicas.repair()
        ended = {result.variant for result in progress.results.values()} | progress.failed.keys()
        remaining = [variant for variant in remaining if variant not in ended]


def _run_round(
    prepared: Prepared,
    pipelines: Sequence[RayPipeline],
    stage: Stage,
    listener: TrialListener,
    batch: Sequence[Variant],
    alone: bool,
) -> None:
    """Run Ray Tune once over `batch`, one trial at a time if `alone`."""
    from ray import tune
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    # Tune would pass the driver's AWS keys to trials as settings of their processes, which Ray writes to its logs
    ENV_VARS_TO_PROPAGATE.difference_update([name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")])
    slots = trial_slots(prepared.plan.trials * len(pipelines))
    function = tune.with_parameters(tune_trial, prepared=prepared, pipelines=pipelines, suite=stage.suite)
    with scratch_folder("mlprune-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(function, {"CPU": 0, **slots}),
            param_space={"variant": tune.grid_search([variant.to_dict() for variant in batch])},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=1 if alone else None),
            run_config=tune.RunConfig(
                storage_path=str(scratch), name="sweep", callbacks=[_tune_callback(listener)], verbose=0
            ),
        )
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        tuner.fit()


def tune_trial(
    config: TrialConfig,
    prepared: Prepared,
    pipelines: Sequence[RayPipeline],
    suite: Suite,
) -> None:
    """Run one variant, unless its result exists, and report the outcome. Runs in a process of Ray Tune."""
    from ray import tune

    configure_worker_logging()
    outcome = _outcome(prepared, pipelines, suite, _variant(config), tune.get_context().get_trial_id())
    tune.report(to_tune(outcome))


def _outcome(
    prepared: Prepared, pipelines: Sequence[RayPipeline], suite: Suite, variant: Variant, trial_id: str
) -> TrialOutcome:
    store = prepared.result_store()
    try:
        result = store.load(prepared.result_key(variant, suite))
        if result is None:
            with pipeline_slot(pipelines, trial_id) as pipeline:
                gather_moments(prepared, pipeline, [variant])  # only a repaired worker may lack them
                result, items = run_trial(prepared, pipeline, variant, suite, _report_masked)
            store.save(result, items)
        return Finished()
    except WorkerLostError as lost:
        return NotStarted(lost.cause) if lost.not_started else WorkerLost(lost.cause)
    except Exception as error:  # any error ends this trial only; the sweep reports it
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return Failed(cause, traceback.format_exc())


def _report_masked(metrics: Mapping[str, float]) -> None:
    """Report that the masks are made."""
    from ray import tune

    tune.report(to_tune(Masked()))


def _variant(config: TrialConfig) -> Variant:
    return parse_variant(**config["variant"])


class TrialListener:
    """What the driver does when a trial starts, reports or ends; collects the trials that a round did not end."""

    def __init__(
        self,
        prepared: Prepared,
        tracker: SweepTracker,
        stage: Stage,
        progress: TrialProgress,
        pipelines: Sequence[RayPipeline],
    ) -> None:
        self._prepared, self._tracker, self._stage, self._progress = prepared, tracker, stage, progress
        self._pipelines = pipelines
        self.lost: dict[Variant, str] = {}  # trials that lost a worker, and the cause
        self.not_started: set[Variant] = set()

    @property
    def is_interrupted(self) -> bool:
        """Whether a worker died, so that the round ended early."""
        return bool(self.lost or self.not_started)

    def on_start(self, trial: Trial) -> None:
        variant = _variant(trial.config)
        now = time.monotonic()
        self._progress.active[trial.trial_id] = ActiveTrial(variant.label, now, "masking", now)
        self._tracker.start_trial(self._prepared.result_key(variant), variant)

    def on_report(self, trial: Trial, values: Mapping[str, object]) -> None:
        variant = _variant(trial.config)
        match from_tune(values):
            case WorkerLost(cause):
                self.lost[variant] = cause
            case NotStarted():
                self.not_started.add(variant)
            case Failed(cause, trace):
                self.record_failure(variant, cause, trace)
            case Masked():
                if active := self._progress.active.get(trial.trial_id):
                    self._progress.active[trial.trial_id] = ActiveTrial(
                        active.label, active.started, "evaluating", time.monotonic()
                    )
            case Finished():
                pass  # `on_end` reads the whole result from the store

    def record_failure(self, variant: Variant, cause: str, details: str) -> None:
        """Record that the trial has failed. A trial that is only to be confirmed has its own result already."""
        self._progress.failed[variant] = cause
        if self._stage.purpose is not Purpose.CONFIRM:
            self._tracker.fail_trial(self._prepared.result_key(variant), variant, details)

    def on_end(self, trial: Trial) -> None:
        key = self._prepared.result_key(_variant(trial.config), self._stage.suite)
        active = self._progress.active.pop(trial.trial_id, None)
        store = self._prepared.result_store()
        result = store.load(key)
        if result is not None:
            if active and key not in self._progress.results:
                self._progress.durations.append(time.monotonic() - active.started)
            self._progress.results[key] = result
            if self._stage.purpose is Purpose.SELECT:
                self._tracker.finish_trial(result, partial(store.items, key))

    def on_process_death(self, trial: Trial) -> None:
        """Record that the trial's own process died; discard what it left in the workers."""
        variant = _variant(trial.config)
        self._progress.active.pop(trial.trial_id, None)
        for pipeline in self._pipelines:
            pipeline.release_slot(trial.trial_id, variant.key)
        self.lost[variant] = "the trial's own process died"


def _tune_callback(listener: TrialListener) -> tune.Callback:
    """Return the listener as a callback of Ray Tune, which runs in the driver."""
    from ray import tune

    class Callback(tune.Callback):  # type: ignore[misc]
        def __reduce__(self) -> tuple[object, tuple[()]]:
            return (tune.Callback, ())  # Tune pickles its callbacks to disk for a restore, which we do not use

        def __deepcopy__(self, memo: object) -> Callback:
            return self

        def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: object) -> None:
            listener.on_start(trial)

        def on_trial_result(
            self,
            iteration: int,
            trials: list[Trial],
            trial: Trial,
            result: dict[str, object],
            **_: object,
        ) -> None:
            listener.on_report(trial, result)

        def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: object) -> None:
            listener.on_end(trial)

        def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: object) -> None:
            listener.on_process_death(trial)

    return Callback()
