"""SweepTracker: what a sweep and its trials log to MLflow; and `log_analysis`, one run of an analysis.

How MLflow is reached is in `mlflow_client`; what is read back is in `lookup`.

Only one thread of the driver writes: an sqlite file allows one writer, and a sweep must not wait for a server.
What is logged is queued and delivered in order. A server that is down, hangs or answers 5xx gets it when it is
available again, with the original times. Runs are found by their tags: an interrupted sweep continues the runs
that it has created, and no trial gets two.

If the driver is killed, updates that are still queued are lost, among them metrics of trials that were running.
Finished trials are logged again from their stored results when the sweep is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlprune.errors import MlpruneError, SpecError
from mlprune.spec.urls import redact
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.tracking.delivery import DeliveryQueue, UnavailableError
from mlprune.tracking.mlflow_client import (
    get_or_create_experiment,
    is_transient,
    mlflow_errors,
    open_client,
    root_cause,
    run_uninterrupted,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, Run

SWEEP_TAG, TRIAL_TAG, PARENT_TAG = "mlprune.sweep", "mlprune.trial", "mlflow.parentRunId"
CAUSE_TAG, MASKS_TAG, STANDING_TAG = "mlprune.cause", "mlprune.masks", "mlprune.standing"
ITEMS, SPEC = "items.json", "spec.yaml"  # artifacts: a trial's answers, a sweep's spec
TAG_LENGTH = 8000  # MLflow cuts longer tag values
CAUSE_LENGTH = 5000


def trial_params(variant: Variant | None) -> dict[str, str]:
    """Return a trial's params; every trial, and the dense model (None), has the same names."""
    if variant is None:
        none = dict.fromkeys(("calibration", "pattern", "propagation", "allocation", "seed", "repair"), "none")
        return {**none, "score": "dense", "sparsity": "0"}
    return {
        "calibration": variant.calibration_text or "none",
        "score": variant.score.name,
        "sparsity": repr(variant.sparsity),
        "pattern": str(variant.pattern),
        "propagation": variant.propagation,
        "allocation": variant.allocation,
        "seed": str(variant.seed),
        "repair": variant.repair,
    }


def log_analysis(
    uri: str, experiment: str, artifacts: Path, name: str, params: Mapping[str, object], files: Sequence[Path]
) -> str:
    """Log one finished run with `params`, and `files` as its artifacts. Returns its id. Raises SpecError."""
    client = open_client(uri)

    def log() -> str:
        experiment_id = get_or_create_experiment(client, experiment, uri, artifacts)
        run_id: str = client.create_run(experiment_id, run_name=name).info.run_id
        client.log_batch(run_id, params=_params(params))
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id, "FINISHED")
        return run_id

    with mlflow_errors(uri):
        return run_uninterrupted(log)


class SweepTracker:
    """The parent run of one sweep, and the runs of its trials.

    The tracking server or database must be available when the tracker is created; otherwise SpecError is raised.
    After that, methods that log return at once. What the server refuses for good is raised as SpecError by a later
    one of them, or by `flush`.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path, sweep_key: str, name: str) -> None:
        self._uri, self._client = uri, open_client(uri)
        self._run_ids: dict[str, str] = {}  # of trials, by result key; written by the queue's thread
        with mlflow_errors(uri):
            self.experiment_id = run_uninterrupted(
                lambda: get_or_create_experiment(self._client, experiment, uri, artifacts)
            )
            self.parent_id = run_uninterrupted(lambda: self._start_parent(sweep_key, name))
        self._queue = DeliveryQueue()

    def _start_parent(self, sweep_key: str, name: str) -> str:
        run = self._find_run(f"tags.`{SWEEP_TAG}` = '{sweep_key}'") or self._client.create_run(
            self.experiment_id, tags={SWEEP_TAG: sweep_key}, run_name=name
        )
        self._client.update_run(run.info.run_id, "RUNNING")
        return str(run.info.run_id)

    @property
    def pending(self) -> int:
        """The number of updates that have not reached MLflow yet."""
        return self._queue.pending

    @property
    def last_error(self) -> str | None:
        """Why MLflow is unavailable at the moment, in one line; None if it is available."""
        return self._queue.last_error

    def flush(self, patience: float, on_wait: Callable[[int, str], None]) -> bool:
        """Wait until all updates have reached MLflow. Returns False if none did for `patience` seconds.

        While MLflow is unavailable, `on_wait(pending, last_error)` is called about once a second. Raises SpecError
        for what was refused for good.
        """
        return self._queue.flush(patience, on_wait)

    def close(self) -> None:
        """Stop logging. Updates that are still pending are dropped: call `flush` before."""
        self._queue.close()

    def run_id(self, key: str) -> str:
        """Return the id of a trial's run. An update of the trial must have been delivered."""
        return self._run_ids[key]

    def log_sweep(self, params: Mapping[str, object], texts: Mapping[str, str]) -> None:
        """Log the sweep's settings as params, and texts (spec, environment) as artifacts, by file name."""
        entries = _params(params)

        def update() -> None:
            self._client.log_batch(self.parent_id, params=entries)
            for file, text in texts.items():
                self._client.log_text(self.parent_id, text, file)

        self._submit(update)

    def log_sweep_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of the whole sweep while it runs."""
        points = _points(metrics, _now(), step)
        self._submit(lambda: self._client.log_batch(self.parent_id, metrics=points))

    def describe(self, markdown: str) -> None:
        """Set the text at the top of the parent run's page; lines beyond MLflow's limit are left out."""
        text = markdown if len(markdown) <= TAG_LENGTH else markdown[:TAG_LENGTH].rpartition("\n")[0]
        self._submit(lambda: self._client.set_tag(self.parent_id, "mlflow.note.content", text))

    def start_trial(self, key: str, variant: Variant | None) -> None:
        """Log that a trial is running."""
        now = _now()

        def update() -> None:
            run_id = self._trial_run_id(key, variant, now)
            if self._client.get_run(run_id).info.status in ("FAILED", "KILLED"):  # in an earlier attempt
                self._client.update_run(run_id, "RUNNING")

        self._submit(update)

    def log_trial(self, key: str, variant: Variant | None, metrics: Mapping[str, float]) -> None:
        """Log metrics of a trial."""
        now = _now()
        points = _points(metrics, now)
        self._submit(lambda: self._client.log_batch(self._trial_run_id(key, variant, now), metrics=points))

    def finish_trial(self, result: Result, items: Callable[[], str], standing: str = "") -> None:
        """Log a finished trial and its answers, unless its run is already finished, with the same standing.

        `items` is called at delivery, so that answers do not wait in memory. `standing`: why it was not evaluated
        in full.
        """
        now = _now()
        self._submit(lambda: self._finish(result, items, standing, now))

    def _finish(self, result: Result, items: Callable[[], str], standing: str, now: int) -> None:
        run_id = self._trial_run_id(result.key, result.variant, now)
        run = self._client.get_run(run_id)
        if run.info.status == "FINISHED" and run.data.tags.get(STANDING_TAG, "") == standing:
            return
        for tag in (CAUSE_TAG, STANDING_TAG):
            if tag in run.data.tags:
                self._client.delete_tag(run_id, tag)
        self._client.log_batch(run_id, metrics=_points(result.metrics, now))
        self._client.log_text(run_id, items(), ITEMS)
        tags = {MASKS_TAG: result.digest, STANDING_TAG: standing}
        for name, value in tags.items():
            if value:
                self._client.set_tag(run_id, name, value)
        self._client.set_terminated(run_id, "FINISHED", now)

    def fail_trial(self, key: str, variant: Variant | None, cause: str) -> None:
        """Log that a trial failed, and why."""
        now = _now()

        def update() -> None:
            run_id = self._trial_run_id(key, variant, now)
            self._client.set_tag(run_id, CAUSE_TAG, cause[:CAUSE_LENGTH])
            self._client.set_terminated(run_id, "FAILED", now)

        self._submit(update)

    def finish_sweep(self, status: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        """End the parent run with `status`; trials whose run is still RUNNING end as KILLED.

        Raises nothing: a sweep that ends because MLflow refused something must end in MLflow too. `flush` raises.
        """
        now = _now()
        points = _points(metrics, now)

        def update() -> None:
            self._client.log_batch(self.parent_id, metrics=points)
            for file in files:
                self._client.log_artifact(self.parent_id, str(file))
            self._end_trials(now)
            self._client.set_terminated(self.parent_id, status, now)

        self._queue.submit(lambda: self._deliver(update))

    def _end_trials(self, now: int) -> None:
        """End runs of trials that are still RUNNING; delete duplicates.

        A duplicate exists if the server hung: it may create a run long after we gave up waiting for it, did not
        find the run, and requested it again.
        """
        running = f"tags.`{PARENT_TAG}` = '{self.parent_id}' and attributes.status = 'RUNNING'"
        for run in self._client.search_runs([self.experiment_id], running):
            run_id = run.info.run_id
            if self._run_ids.get(run.data.tags.get(TRIAL_TAG, ""), run_id) == run_id:
                self._client.set_terminated(run_id, "KILLED", now)
            else:
                self._client.delete_run(run_id)

    def _find_run(self, query: str) -> Run | None:
        """Return the run that matches; if there are two, the more complete one."""
        runs = self._client.search_runs([self.experiment_id], query)
        return max(runs, key=lambda run: (run.info.status == "FINISHED", len(run.data.metrics)), default=None)

    def _trial_run_id(self, key: str, variant: Variant | None, now: int) -> str:
        """Return the id of the trial's run; create the run, or its params, if they are missing."""
        if key not in self._run_ids:
            tags = {TRIAL_TAG: key, PARENT_TAG: self.parent_id}
            run = self._find_run(" and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items()))
            if run is None:
                name = variant.short if variant else "dense"
                run = self._client.create_run(self.experiment_id, start_time=now, tags=tags, run_name=name)
            run_id = run.info.run_id
            if not run.data.params:
                self._client.log_batch(run_id, params=_params(trial_params(variant)))
            self._run_ids[key] = run_id
        return self._run_ids[key]

    def _submit(self, update: Callable[[], object]) -> None:
        self._queue.submit(lambda: self._deliver(update))
        self._queue.raise_rejected()

    def _deliver(self, update: Callable[[], object]) -> None:
        """Carry out an update. Raises UnavailableError if it is to be retried, SpecError if MLflow refuses it."""
        try:
            update()
        except Exception as error:
            if is_transient(error):
                raise UnavailableError(root_cause(error)) from error
            if isinstance(error, MlpruneError | OSError):  # ours: the items could not be read, say
                raise
            remedy = f"MLflow refuses what is logged: {root_cause(error)}"
            raise SpecError("tracking.uri", repr(redact(self._uri)), remedy) from error


def _now() -> int:
    """Return the time in milliseconds, as MLflow counts it."""
    return int(time.time() * 1000)


def _points(metrics: Mapping[str, float], now: int, step: int = 0) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(name, float(value), now, step) for name, value in metrics.items()]


def _params(values: Mapping[str, object]) -> list[Param]:
    from mlflow.entities import Param

    return [Param(name, str(value)) for name, value in values.items()]
