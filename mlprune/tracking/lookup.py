"""What is read back from MLflow: a trial's run, its answers, the spec of its sweep; and links to MLflow's pages.

What the runs contain is decided in `tracker`, which writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, Field, ValidationError

from mlprune.errors import SpecError
from mlprune.spec.urls import redact, without_credentials
from mlprune.tracking.mlflow_client import mlflow_errors, open_client
from mlprune.tracking.tracker import ITEMS, PARENT_TAG, SPEC, TRIAL_TAG, trial_params

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


# where MLflow keeps artifacts; its other addresses refer to further runs, or to hosts that a run's author chooses
ARTIFACT_SCHEMES = ("", "file", "mlflow-artifacts", "http", "https", "s3", "gs", "wasbs", "abfss", "dbfs", "hdfs")


@dataclass(frozen=True)
class TrialRun:
    """The MLflow run of a trial."""

    run_id: str
    parent_id: str
    name: str
    params: Mapping[str, str]


def load_trial_items(uri: str, run_id: str, key: str) -> tuple[TrialRun, str]:
    """Return a trial and its answers (JSON text).

    Raises SpecError, naming `key`, if the run is not a trial's or the trial has not finished.
    """
    client = open_client(uri)
    with mlflow_errors(uri):
        trial = _trial_run(client, uri, run_id, key)
        items = _artifact(client, run_id, ITEMS, key)
    if items is None:
        remedy = f"has no {ITEMS}: it did not finish, or an older version of mlprune wrote it"
        raise SpecError(key, repr(run_id), remedy)
    return trial, items


class TrialParams(BaseModel, frozen=True):
    """The params of a trial's run, as `tracker.trial_params` writes them. They are untrusted."""

    score: str
    calibration: str  # or none
    sparsity: Annotated[float, Field(ge=0, lt=1)]
    pattern: str
    propagation: str
    allocation: str
    seed: int | None = None  # runs of older versions have none
    repair: str = "none"


def load_trial_spec(uri: str, run_id: str) -> tuple[str, TrialParams]:
    """Return the sweep's spec (YAML) and the params of a trial's run.

    Raises SpecError if the run is not a trial's, or was damaged.
    """
    client = open_client(uri)
    with mlflow_errors(uri):
        trial = _trial_run(client, uri, run_id, "--run")
    if trial.params.get("score") == trial_params(None)["score"]:
        raise SpecError("--run", repr(run_id), "is the run of the dense model; use the run of a trial")
    try:
        params = TrialParams.model_validate(trial.params)
    except ValidationError as error:
        first = error.errors()[0]
        name, problem = first["loc"][0], first["msg"][:1].lower() + first["msg"][1:]
        raise SpecError("--run", repr(run_id), f"is damaged: its param {name}: {problem}") from None
    with mlflow_errors(uri):
        spec = _artifact(client, trial.parent_id, SPEC, "--run")
    if spec is None:
        raise SpecError("--run", repr(run_id), f"its parent run {trial.parent_id} has no artifact {SPEC}")
    return spec, params


def _artifact(client: MlflowClient, run_id: str, name: str, key: str) -> str | None:
    """Return the text of a run's artifact; None if there is none. Raises SpecError if it is out of reach."""
    from mlflow.exceptions import MlflowException

    location = client.get_run(run_id).info.artifact_uri
    if urlsplit(location).scheme not in ARTIFACT_SCHEMES:
        remedy = f"its artifacts are at {redact(location)}, which is not read"
        raise SpecError(key, repr(run_id), remedy)
    try:
        with TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecError(key, repr(run_id), f"is damaged: its artifact {name} is not UTF-8") from None
    except (MlflowException, OSError):
        return None


def _trial_run(client: MlflowClient, uri: str, run_id: str, key: str) -> TrialRun:
    """Return the run of a trial. Raises SpecError, naming `key`, if there is none with this id."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException:
        remedy = f"no such run in {redact(uri)}; name its database or server with --set tracking.uri=..."
        raise SpecError(key, repr(run_id), remedy) from None
    parent = run.data.tags.get(PARENT_TAG)
    if TRIAL_TAG not in run.data.tags or parent is None:
        raise SpecError(key, repr(run_id), "is not the run of a trial of mlprune; use the id of a nested run")
    return TrialRun(run_id, parent, run.info.run_name, run.data.params)


def parallel_coordinates_link(base: str, experiment_id: str, run_ids: Sequence[str]) -> str | None:
    """Return the address of the page that compares runs, on the server at `base`; None if `base` is a database."""
    if not base.startswith("http"):
        return None
    address = without_credentials(base).rstrip("/")
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment_id]))
    return f"{address}/#/compare-runs?runs={runs}&experiments={experiments}"
