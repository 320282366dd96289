"""A client of an MLflow server or database: opening one with our settings, and what MLflow's errors mean.

What is logged is in `tracker`, what is read back in `lookup`. MLflow is imported inside functions only, because it
reads some settings when it is imported.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock
from requests import HTTPError
from sqlalchemy.exc import InterfaceError, SQLAlchemyError

from mlprune.errors import MlpruneError, SpecError
from mlprune.spec.urls import redact
from mlprune.storage.files import check_folder
from mlprune.tracking.moved_storage import BESIDE_TAG, update_artifact_paths

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

T = TypeVar("T")
SQLITE = "sqlite:///"


def configure_mlflow() -> None:
    """Set the environment variables that MLflow reads, and its loggers' levels. Call before any use of MLflow."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported, the others at use
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # of every run that ends
    # We decide what is retried. MLflow would repeat a request even if the server has carried it out, which creates
    # a second run; and it would retry for minutes.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds until a silent server is unavailable
    import mlflow  # noqa: F401 - it sets its loggers' levels itself when it is imported

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it reports every table that it creates
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # else it logs errors that we report


def open_client(uri: str) -> MlflowClient:
    """Return a client of the tracking server or database at `uri`; tables of a new database are created.

    Raises SpecError if nothing usable is there.
    """
    with mlflow_errors(uri):
        return run_uninterrupted(lambda: _open(uri))


def check_tracking(uri: str) -> None:
    """Raise SpecError or StorageError if `open_client` would fail. Creates nothing."""
    file = _sqlite_file(uri)
    if uri.startswith(SQLITE) and not file.exists():
        check_folder(file.parent, "tracking.uri", redact(uri))
    else:
        open_client(uri)


def _open(uri: str) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    if uri.startswith(SQLITE):
        _create_database(_sqlite_file(uri))
        update_artifact_paths(_sqlite_file(uri))
    client = MlflowClient(uri)
    client.search_experiments(max_results=1)  # fails now if nobody answers
    return client


def _sqlite_file(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE).partition("?")[0])


def _create_database(file: Path) -> None:
    """Create an sqlite file with MLflow's tables, unless it exists: in one process only, whole or not at all.

    Two processes that create the tables at the same time break the file for good, and so does one that is killed
    meanwhile.
    """
    from mlflow.tracking import MlflowClient

    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            for left in file.parent.glob(f".{file.name}.*"):  # by a process that was killed: we hold the lock
                shutil.rmtree(left)
            with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
                partial = Path(folder, file.name)
                MlflowClient(f"{SQLITE}{partial}").search_experiments(max_results=1)
                partial.rename(file)


def get_or_create_experiment(client: MlflowClient, name: str, uri: str, artifacts: Path) -> str:
    """Return the experiment's id. Raises SpecError if it was deleted.

    `artifacts` is the folder for artifacts of a database; a server stores them itself.
    """
    experiment = client.get_experiment_by_name(name) or _create_experiment(client, name, uri, artifacts)
    if experiment.lifecycle_stage == "deleted":
        remedy = (
            f"was deleted in MLflow; restore it with `mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}`, or use another one with --set tracking.experiment=..."
        )
        raise SpecError("tracking.experiment", repr(name), remedy)
    return str(experiment.experiment_id)


def _create_experiment(client: MlflowClient, name: str, uri: str, artifacts: Path) -> Experiment:
    from mlflow.exceptions import MlflowException

    location = None if uri.startswith("http") else artifacts.as_uri()
    beside = uri.startswith(SQLITE) and artifacts.parent == _sqlite_file(uri).parent
    tags = {BESIDE_TAG: "beside the database"} if beside else None
    try:
        client.create_experiment(name, artifact_location=location, tags=tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another sweep has just created it
            raise
    return client.get_experiment_by_name(name)


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Configure MLflow, and turn its errors within the block into SpecError."""
    configure_mlflow()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError, SQLAlchemyError, sqlite3.Error, ImportError) as error:  # or no driver
        remedy = f"MLflow does not answer there: {root_cause(error)}"
        raise SpecError("tracking.uri", repr(redact(uri)), remedy) from None
    except MlpruneError:
        raise
    except Exception as error:  # MLflow trusts the values in its database
        remedy = f"what MLflow reads there is damaged: {type(error).__name__}: {root_cause(error)}"
        raise SpecError("tracking.uri", repr(redact(uri)), remedy) from error


def run_uninterrupted(work: Callable[[], T]) -> T:
    """Return what `work` returns. Ctrl-C waits until it is done.

    Interrupted work would leave an sqlite file locked or half written.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later: the network, server or database is down, full or locked.

    Not transient: what a server refuses (4xx, except 408 and 429: too slow, too many), a missing file, and a
    damaged sqlite file.
    """
    from mlflow.exceptions import MlflowException

    if _is_damage(error):
        return False
    # MLflow reports a lost connection to its database (InterfaceError) as a bad request.
    if isinstance(error, MlflowException) and not isinstance(error.__cause__, InterfaceError):
        status = error.get_http_status_code()
    elif isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        transient = (MlflowException, OSError, SQLAlchemyError)
        return isinstance(error, transient) and not isinstance(error, FileNotFoundError)
    return status in (408, 429) or not 400 <= status < 500


def _is_damage(error: BaseException) -> bool:
    """Whether sqlite found its file malformed, or without a table or column of MLflow's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, sqlite3.Error):
        original = getattr(cause, "orig", None)  # of SQLAlchemy's errors
        cause = original if isinstance(original, sqlite3.Error) else cause.__cause__ or cause.__context__
    if isinstance(cause, sqlite3.OperationalError):
        return str(cause).startswith("no such ")  # others: locked, full, unreadable
    return isinstance(cause, sqlite3.DatabaseError)


def root_cause(error: BaseException) -> str:
    """Return the innermost cause of an error as one line without secrets."""
    while (cause := error.__cause__ or error.__context__ or _wrapped_error(error)) is not None:
        # A KeyError is only the name that MLflow did not know; the error that MLflow raises from it says more.
        if isinstance(cause, KeyError):
            break
        error = cause
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return redact(text.strip().splitlines()[0].split(". Response body")[0])[:200]


def _wrapped_error(error: BaseException) -> BaseException | None:
    """Return the error that urllib3 passes as an argument of its own."""
    return next((argument for argument in error.args if isinstance(argument, BaseException)), None)
