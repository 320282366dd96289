"""The only door to MLflow: one parent run a sweep, one nested run a trial.

One thread of one process writes, the driver's: an sqlite file wants one writer, and a sweep must not wait for a
server. What is logged is put into an outbox and delivered in order; a server that dies, hangs or answers 5xx gets
it when it is back, with the times at which it happened. A run is found by its tags, so a sweep that was killed
goes on with the runs that it had made, and no trial has two.

What is still in the outbox when the process is killed is lost, with it metrics of trials under way; finished
trials are logged again from their results when the sweep is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlprune.errors import SpecError
from mlprune.spec.urls import redact
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.tracking.delivery import AwayError, Outbox
from mlprune.tracking.mlflow_client import (
    ITEMS,
    PARENT_TAG,
    TRIAL_TAG,
    answering,
    away,
    experiment_of,
    reason,
    unbroken,
)
from mlprune.tracking.mlflow_client import Trial as Trial
from mlprune.tracking.mlflow_client import check_tracking as check_tracking
from mlprune.tracking.mlflow_client import client_of as client_of
from mlprune.tracking.mlflow_client import parallel_coordinates_link as parallel_coordinates_link
from mlprune.tracking.mlflow_client import recall_items as recall_items
from mlprune.tracking.mlflow_client import recall_trial as recall_trial
from mlprune.tracking.mlflow_client import trial_params as trial_params

# after tracking_server, which sets what MLflow reads when it is imported
from mlflow.entities import Metric, Param, Run  # isort: skip
from mlflow.exceptions import MlflowException  # isort: skip
from requests import HTTPError  # isort: skip

SWEEP_TAG, CAUSE_TAG = "mlprune.sweep", "mlprune.cause"
TAG_LENGTH = 8000  # of a tag's value; MLflow cuts what is longer


def log_analysis(
    uri: str, experiment: str, artifacts: Path, name: str, params: Mapping[str, object], files: Sequence[Path]
) -> str:
    """One finished run with `params`, and `files` as artifacts; its id."""
    client = client_of(uri)

    def log() -> str:
        experiment_id = experiment_of(client, experiment, uri, artifacts)
        run_id: str = client.create_run(experiment_id, run_name=name).info.run_id
        client.log_batch(run_id, params=_params(params))
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id, "FINISHED")
        return run_id

    with answering(uri):
        return unbroken(log)


class SweepTracker:
    """The parent run of one sweep, and its trials' runs.

    The tracking server or database must be there at the start: SpecError if not. From then on, methods that log
    return at once; what the server refused for good is raised as SpecError by a later one, or by `settle`.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path, sweep_key: str, name: str) -> None:
        self._uri, self._client = uri, client_of(uri)
        self._runs: dict[str, str] = {}  # of trials, by key; written by the outbox's thread
        with answering(uri):
            self.experiment_id, self.parent_id = unbroken(
                lambda: self._open(experiment, artifacts, sweep_key, name)
            )
        self._outbox = Outbox()

    def _open(self, experiment: str, artifacts: Path, sweep_key: str, name: str) -> tuple[str, str]:
        self.experiment_id = experiment_of(self._client, experiment, self._uri, artifacts)
        parent = self._find(f"tags.`{SWEEP_TAG}` = '{sweep_key}'") or self._client.create_run(
            self.experiment_id, tags={SWEEP_TAG: sweep_key}, run_name=name
        )
        self._client.update_run(parent.info.run_id, "RUNNING")
        return self.experiment_id, parent.info.run_id

    @property
    def behind(self) -> int:
        """What has been logged and has not arrived."""
        return self._outbox.behind

    @property
    def trouble(self) -> str | None:
        """One line: why nothing gets through at the moment."""
        return self._outbox.trouble

    def settle(self, patience: float, waiting: Callable[[int, str], None]) -> bool:
        """Wait until all has arrived; False when nothing got through for `patience` seconds.

        While the server is away, `waiting` is told about once a second how much waits, and why. Raises SpecError
        for what was refused for good.
        """
        return self._outbox.settle(patience, waiting)

    def close(self) -> None:
        """Deliver nothing more: `settle` comes before."""
        self._outbox.close()

    def run_of(self, key: str) -> str:
        """The id of a trial's run, once what was logged of it has been delivered."""
        return self._runs[key]

    def log_sweep(self, params: Mapping[str, object], texts: Mapping[str, str]) -> None:
        """The sweep's settings as params; texts (spec, environment) as artifacts, by file name."""
        given = _params(params)

        def deliver() -> None:
            self._client.log_batch(self.parent_id, params=given)
            for file, text in texts.items():
                self._client.log_text(self.parent_id, text, file)

        self._put(deliver)

    def log_sweep_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of the whole sweep while it runs."""
        points = _points(metrics, _now(), step)
        self._put(lambda: self._client.log_batch(self.parent_id, metrics=points))

    def describe(self, markdown: str) -> None:
        """The text on top of the parent run's page; lines beyond MLflow's limit are left out."""
        whole = markdown if len(markdown) <= TAG_LENGTH else markdown[:TAG_LENGTH].rpartition("\n")[0]
        self._put(lambda: self._client.set_tag(self.parent_id, "mlflow.note.content", whole))

    def start_trial(self, key: str, variant: Variant | None) -> None:
        """A trial is under way."""
        now = _now()

        def deliver() -> None:
            run_id = self._run(key, variant, now)
            if self._client.get_run(run_id).info.status in ("FAILED", "KILLED"):  # an earlier attempt
                self._client.update_run(run_id, "RUNNING")

        self._put(deliver)

    def log_trial(self, key: str, variant: Variant | None, metrics: Mapping[str, float], step: int = 0) -> None:
        """Metrics of a trial."""
        now = _now()
        points = _points(metrics, now, step)
        self._put(lambda: self._client.log_batch(self._run(key, variant, now), metrics=points))

    def finish_trial(self, result: Result, items: Callable[[], str]) -> None:
        """Log a finished trial and what it answered, unless its run says that it is finished.

        `items` is called when it is delivered, so that answers do not wait in memory.
        """
        now = _now()
        self._put(lambda: self._finish(result, items, now))

    def _finish(self, result: Result, items: Callable[[], str], now: int) -> None:
        run_id = self._run(result.key, result.variant, now)
        run = self._client.get_run(run_id)
        if run.info.status == "FINISHED":
            return
        if CAUSE_TAG in run.data.tags:
            self._client.delete_tag(run_id, CAUSE_TAG)
        self._client.log_batch(run_id, metrics=_points(result.metrics, now, 0))
        self._client.log_text(run_id, items(), ITEMS)
        if result.digest:
            self._client.set_tag(run_id, "mlprune.masks", result.digest)
        self._client.set_terminated(run_id, "FINISHED", now)

    def fail_trial(self, key: str, variant: Variant | None, cause: str) -> None:
        now = _now()

        def deliver() -> None:
            run_id = self._run(key, variant, now)
            self._client.set_tag(run_id, CAUSE_TAG, cause[:5000])
            self._client.set_terminated(run_id, "FAILED", now)

        self._put(deliver)

    def finish_sweep(self, status: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        """The parent run ends with `status`; runs of its trials that are still RUNNING end as KILLED.

        It raises nothing: a sweep that ends because something was refused ends in MLflow too. `settle` does.
        """
        now = _now()
        points = _points(metrics, now, 0)

        def deliver() -> None:
            self._client.log_batch(self.parent_id, metrics=points)
            for file in files:
                self._client.log_artifact(self.parent_id, str(file))
            self._end_trials(now)
            self._client.set_terminated(self.parent_id, status, now)

        self._outbox.put(lambda: self._deliver(deliver))

    def _end_trials(self, now: int) -> None:
        """End runs of trials that are RUNNING. One beside a trial's own was made twice: it is deleted.

        A server that hangs may make a run long after we gave up waiting, looked for it and asked again.
        """
        mine = f"tags.`{PARENT_TAG}` = '{self.parent_id}' and attributes.status = 'RUNNING'"
        for run in self._client.search_runs([self.experiment_id], mine):
            run_id = run.info.run_id
            if self._runs.get(run.data.tags.get(TRIAL_TAG, ""), run_id) == run_id:
                self._client.set_terminated(run_id, "KILLED", now)
            else:
                self._client.delete_run(run_id)

    def _find(self, query: str) -> Run | None:
        """The run that has the most of it, should there be two."""
        runs = self._client.search_runs([self.experiment_id], query)
        return max(runs, key=lambda run: (run.info.status == "FINISHED", len(run.data.metrics)), default=None)

    def _run(self, key: str, variant: Variant | None, now: int) -> str:
        """The id of the trial's run, made if there is none; what was done halfway is completed."""
        if key not in self._runs:
            tags = {TRIAL_TAG: key, PARENT_TAG: self.parent_id}
            run = self._find(" and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items()))
            if run is None:
                name = variant.short if variant else "dense"
                run = self._client.create_run(self.experiment_id, start_time=now, tags=tags, run_name=name)
            run_id = run.info.run_id
            if not run.data.params:
                self._client.log_batch(run_id, params=_params(trial_params(variant)))
            self._runs[key] = run_id
        return self._runs[key]

    def _put(self, work: Callable[[], object]) -> None:
        self._outbox.put(lambda: self._deliver(work))
        self._outbox.raise_refused()

    def _deliver(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            if away(error):
                raise AwayError(reason(error)) from error
            if isinstance(error, (MlflowException, HTTPError)):
                refused = f"MLflow refuses what is logged: {reason(error)}"
                raise SpecError("tracking.uri", repr(redact(self._uri)), refused) from None
            raise


def _now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def _points(metrics: Mapping[str, float], now: int, step: int) -> list[Metric]:
    return [Metric(name, float(value), now, step) for name, value in metrics.items()]


def _params(values: Mapping[str, object]) -> list[Param]:
    return [Param(name, str(value)) for name, value in values.items()]
