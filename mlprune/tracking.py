"""The only door to MLflow: one parent run a sweep, one nested run a trial.

One process writes, the driver: an sqlite file wants one writer. A run is found by its tags, so a sweep that
was killed goes on with the runs that it had made, and no trial has two.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from mlprune.errors import SpecError
from mlprune.store import Result, check_place
from mlprune.variants import Variant

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes

P = ParamSpec("P")
T = TypeVar("T")
SQLITE = "sqlite:///"
SWEEP_TAG, TRIAL_TAG, CAUSE_TAG, PARENT_TAG = (
    "mlprune.sweep",
    "mlprune.trial",
    "mlprune.cause",
    "mlflow.parentRunId",
)


ITEMS = "items.json"  # the artifact that holds what a trial answered


def client_of(uri: str) -> MlflowClient:
    """A client of the tracking server or database at `uri`, its tables made. Raises SpecError if it is none."""
    try:
        if uri.startswith(SQLITE):
            Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(uri)
        with _one_attempt():
            client.search_experiments(max_results=1)
    except (MlflowException, OSError, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0].split(". ")[0][:160]
        raise SpecError("tracking.uri", repr(uri), f"MLflow does not answer there: {reason}") from None
    return client


@contextmanager
def _one_attempt() -> Iterator[None]:
    """MLflow tries a server that is not there for four minutes; who mistyped its address should know at once."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    given = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in given.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_tracking(uri: str) -> None:
    """Raise SpecError or StorageError where `client_of` would fail; makes nothing."""
    file = Path(uri.removeprefix(SQLITE))
    if uri.startswith(SQLITE) and not file.exists():
        check_place(file.parent, "tracking.uri", uri)
    else:
        client_of(uri)


def _uninterrupted(method: Callable[P, T]) -> Callable[P, T]:
    """Ctrl-C waits until the method is done: broken off, a write leaves sqlite locked for the next one."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if threading.current_thread() is not threading.main_thread():
            return method(*args, **kwargs)
        late: list[Any] = []
        before = signal.signal(signal.SIGINT, lambda *given: late.append(given))
        try:
            return method(*args, **kwargs)
        finally:
            signal.signal(signal.SIGINT, before)
            if late and callable(before):
                before(*late[0])

    return run


def _experiment(client: MlflowClient, name: str, uri: str, artifacts: Path) -> str:
    """The experiment's id; it is made if there is none."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # a database has no place for files: they go beside it; a server has its own
    location = None if uri.startswith("http") else artifacts.as_uri()
    return str(client.create_experiment(name, artifact_location=location))


@_uninterrupted
def log_analysis(
    uri: str, experiment: str, artifacts: Path, name: str, params: Mapping[str, object], files: Sequence[Path]
) -> str:
    """One finished run with `params`, and `files` as artifacts; its id."""
    client = client_of(uri)
    run_id: str = client.create_run(_experiment(client, experiment, uri, artifacts), run_name=name).info.run_id
    client.log_batch(run_id, params=[Param(k, str(v)) for k, v in params.items()])
    for file in files:
        client.log_artifact(run_id, str(file))
    client.set_terminated(run_id, "FINISHED")
    return run_id


class SweepTracker:
    """The parent run of one sweep, and its trials' runs."""

    def __init__(self, uri: str, experiment: str, artifacts: Path, sweep_key: str, name: str) -> None:
        self._client = client_of(uri)
        self.experiment_id = _experiment(self._client, experiment, uri, artifacts)
        parent = self._find(SWEEP_TAG, sweep_key) or self._client.create_run(
            self.experiment_id, tags={SWEEP_TAG: sweep_key}, run_name=name
        )
        self.parent_id: str = parent.info.run_id
        self._client.update_run(self.parent_id, "RUNNING")
        self._trials: dict[str, str] = {}

    def _find(self, tag: str, value: str, parent: str | None = None) -> Run | None:
        query = f"tags.`{tag}` = '{value}'" + (f" and tags.`{PARENT_TAG}` = '{parent}'" if parent else "")
        runs = self._client.search_runs([self.experiment_id], query, max_results=1)
        return runs[0] if runs else None

    @_uninterrupted
    def log_sweep(self, params: Mapping[str, object], texts: Mapping[str, str]) -> None:
        """The sweep's settings as params; texts (spec, environment) as artifacts, by file name."""
        self._client.log_batch(self.parent_id, params=[Param(k, str(v)) for k, v in params.items()])
        for file, text in texts.items():
            self._client.log_text(self.parent_id, text, file)

    @_uninterrupted
    def trial_run(self, key: str, variant: Variant | None) -> str:
        """The id of the trial's run, made if there is none."""
        if key not in self._trials:
            run = self._find(TRIAL_TAG, key, self.parent_id) or self._new_trial(key, variant)
            if run.info.status != "FINISHED":  # of an earlier run of the sweep, that failed or was killed
                self._client.update_run(run.info.run_id, "RUNNING")
            self._trials[key] = run.info.run_id
        return self._trials[key]

    def _new_trial(self, key: str, variant: Variant | None) -> Run:
        tags = {TRIAL_TAG: key, PARENT_TAG: self.parent_id}
        name = variant.label if variant else "dense"
        run = self._client.create_run(self.experiment_id, tags=tags, run_name=name)
        self._client.log_batch(run.info.run_id, params=[Param(k, v) for k, v in trial_params(variant).items()])
        return run

    @_uninterrupted
    def log_trial(self, key: str, variant: Variant | None, metrics: Mapping[str, float]) -> None:
        """Metrics of a trial that is under way."""
        run_id = self.trial_run(key, variant)
        self._log_metrics(run_id, metrics)

    @_uninterrupted
    def finish_trial(self, result: Result, items: str) -> None:
        """Log a finished trial and what it answered, unless its run says that it is finished."""
        run_id = self.trial_run(result.key, result.variant)
        run = self._client.get_run(run_id)
        if run.info.status == "FINISHED":
            return
        if CAUSE_TAG in run.data.tags:
            self._client.delete_tag(run_id, CAUSE_TAG)
        self.log_trial(result.key, result.variant, result.metrics)
        self._client.log_text(run_id, items, ITEMS)
        if result.digest:
            self._client.set_tag(run_id, "mlprune.masks", result.digest)
        self._client.set_terminated(run_id, "FINISHED")

    @_uninterrupted
    def fail_trial(self, key: str, variant: Variant | None, cause: str) -> None:
        run_id = self.trial_run(key, variant)
        self._client.set_tag(run_id, CAUSE_TAG, cause[:5000])
        self._client.set_terminated(run_id, "FAILED")

    @_uninterrupted
    def finish_sweep(self, status: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        self._log_metrics(self.parent_id, metrics)
        for file in files:
            self._client.log_artifact(self.parent_id, str(file))
        self._client.set_terminated(self.parent_id, status)

    def _log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(run_id, metrics=[Metric(k, float(v), now, 0) for k, v in metrics.items()])


def trial_params(variant: Variant | None) -> dict[str, str]:
    """A trial's params under plain names, the same names for every trial."""
    if variant is None:
        none = dict.fromkeys(("calibration", "pattern", "propagation", "allocation"), "none")
        return {**none, "score": "dense", "sparsity": "0"}
    return {
        "calibration": variant.calibration or "none",
        "score": variant.score,
        "sparsity": repr(variant.sparsity),
        "pattern": variant.pattern,
        "propagation": variant.propagation,
        "allocation": variant.allocation,
    }


@dataclass(frozen=True)
class Trial:
    """A trial's run, as it is found again."""

    run_id: str
    parent_id: str
    name: str
    params: Mapping[str, str]


def _find_trial(client: MlflowClient, uri: str, run_id: str, key: str) -> Trial:
    """Raises SpecError, naming `key`, when there is no such run, or it is not a trial's."""
    try:
        run = client.get_run(run_id)
    except MlflowException:
        remedy = f"no such run in {uri}; give its database with --set tracking.uri=..."
        raise SpecError(key, repr(run_id), remedy) from None
    parent = run.data.tags.get(PARENT_TAG)
    if TRIAL_TAG not in run.data.tags or parent is None:
        raise SpecError(key, repr(run_id), "not the run of a trial of mlprune; give a nested run's id")
    return Trial(run_id, parent, run.info.run_name, run.data.params)


def recall_items(uri: str, run_id: str, key: str) -> tuple[Trial, str]:
    """A trial, and what it answered (JSON of items). Raises SpecError, naming `key`, when it has not finished."""
    client = client_of(uri)
    trial = _find_trial(client, uri, run_id, key)
    try:
        return trial, Path(client.download_artifacts(run_id, ITEMS)).read_text(encoding="utf-8")
    except (MlflowException, OSError):
        raise SpecError(
            key, repr(run_id), f"has no {ITEMS}: it did not finish, or an older mlprune made it"
        ) from None


def recall_trial(uri: str, run_id: str) -> tuple[str, dict[str, str]]:
    """The spec (YAML) and the params of a trial's run. Raises SpecError when the run is not a trial's."""
    client = client_of(uri)
    trial = _find_trial(client, uri, run_id, "--run")
    if trial.params["score"] == trial_params(None)["score"]:
        raise SpecError("--run", repr(run_id), "is the dense model's run; choose a trial's")
    try:
        text = Path(client.download_artifacts(trial.parent_id, "spec.yaml")).read_text(encoding="utf-8")
    except (MlflowException, OSError):
        remedy = f"the artifact spec.yaml of its parent {trial.parent_id} is gone"
        raise SpecError("--run", repr(run_id), remedy) from None
    return text, dict(trial.params)
