"""A tracking server or database: whether it is there, what its errors mean, and what is read from it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from urllib.parse import quote

from filelock import FileLock

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # of each run that ends
# what is tried again is ours to say: MLflow would send a request anew though the server did what it asked, and
# so make a second run; and it would do so for minutes
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds until a silent server counts as away

from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from requests import HTTPError
from sqlalchemy.exc import InterfaceError, SQLAlchemyError

from mlprune.errors import SpecError
from mlprune.spec.urls import redact, without_credentials
from mlprune.spec.variants import Variant
from mlprune.storage.files import check_folder

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes
logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # and of errors that we tell of

T = TypeVar("T")
SQLITE = "sqlite:///"
TRIAL_TAG, PARENT_TAG = "mlprune.trial", "mlflow.parentRunId"
ITEMS = "items.json"  # the artifact that holds what a trial answered


def client_of(uri: str) -> MlflowClient:
    """A client of the tracking server or database at `uri`, its tables made. Raises SpecError if it is none."""
    with answering(uri):
        return unbroken(lambda: _opened(uri))


def _opened(uri: str) -> MlflowClient:
    if uri.startswith(SQLITE):
        _make_database(_file(uri))
    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def _file(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE).partition("?")[0])


def _make_database(file: Path) -> None:
    """An sqlite file with MLflow's tables, unless it is there: by one process only, and whole or not at all.

    Two that make its tables at once break it for good, and so does one that is killed meanwhile.
    """
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
                made = Path(folder, file.name)
                MlflowClient(f"{SQLITE}{made}").search_experiments(max_results=1)
                made.rename(file)


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Within, an error of MLflow's is a SpecError."""
    try:
        yield
    except (MlflowException, OSError, SQLAlchemyError, ImportError) as error:  # the last: no driver for it
        raise SpecError(
            "tracking.uri", repr(redact(uri)), f"MLflow does not answer there: {reason(error)}"
        ) from None


def unbroken(work: Callable[[], T]) -> T:
    """What `work` returns; Ctrl-C waits until it is done: broken off, it leaves sqlite locked or half made."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def reason(error: BaseException) -> str:
    """One line: what lies at the bottom of an error."""
    while (below := error.__cause__ or error.__context__ or _wrapped(error)) is not None:
        if isinstance(below, KeyError):  # the name that MLflow did not know; what it makes of it says more
            break
        error = below
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return redact(text.strip().splitlines()[0].split(". Response body")[0])[:200]


def _wrapped(error: BaseException) -> BaseException | None:
    """What urllib3 puts beside its own text."""
    return next((given for given in error.args if isinstance(given, BaseException)), None)


def away(error: Exception) -> bool:
    """Whether what failed may succeed later: a network, a server or a database that is away, full or locked.

    Not so what a server refuses (4xx, but for 408 and 429: too slow, too many), nor a file that is gone.
    """
    if isinstance(error, MlflowException) and not isinstance(error.__cause__, InterfaceError):
        status = error.get_http_status_code()
    elif isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        passing = (MlflowException, OSError, SQLAlchemyError)
        return isinstance(error, passing) and not isinstance(error, FileNotFoundError)
    return status in (408, 429) or not 400 <= status < 500


def check_tracking(uri: str) -> None:
    """Raise SpecError or StorageError where `client_of` would fail; makes nothing."""
    file = _file(uri)
    if uri.startswith(SQLITE) and not file.exists():
        check_folder(file.parent, "tracking.uri", redact(uri))
    else:
        client_of(uri)


def experiment_of(client: MlflowClient, name: str, uri: str, artifacts: Path) -> str:
    """The experiment's id; it is made if there is none. Raises SpecError when it was deleted."""
    found = client.get_experiment_by_name(name) or _new_experiment(client, name, uri, artifacts)
    if found.lifecycle_stage == "deleted":
        remedy = (
            f"was deleted in MLflow; bring it back with `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`, or name another with --set tracking.experiment=..."
        )
        raise SpecError("tracking.experiment", repr(name), remedy)
    return str(found.experiment_id)


def _new_experiment(client: MlflowClient, name: str, uri: str, artifacts: Path) -> Experiment:
    # a database has no place for files: they go beside it; a server has its own
    location = None if uri.startswith("http") else artifacts.as_uri()
    try:
        client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another sweep was quicker
            raise
    return client.get_experiment_by_name(name)


def parallel_coordinates_link(base: str, experiment_id: str, run_ids: Sequence[str]) -> str | None:
    """The page that compares runs, of the MLflow server at `base`; None if that is a database."""
    if not base.startswith("http"):
        return None
    address = without_credentials(base).rstrip("/")
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment_id]))
    return f"{address}/#/compare-runs?runs={runs}&experiments={experiments}"


def trial_params(variant: Variant | None) -> dict[str, str]:
    """A trial's params under plain names, the same names for every trial."""
    if variant is None:
        none = dict.fromkeys(("calibration", "pattern", "propagation", "allocation"), "none")
        return {**none, "score": "dense", "sparsity": "0"}
    return {
        "calibration": variant.calibration_text or "none",
        "score": variant.score.name,
        "sparsity": repr(variant.sparsity),
        "pattern": str(variant.pattern),
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
        remedy = f"no such run in {redact(uri)}; give its database with --set tracking.uri=..."
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
