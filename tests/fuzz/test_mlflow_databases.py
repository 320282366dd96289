"""MLflow databases: whatever was changed in one, runs are read and logged, or refused in one line."""

import shutil
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlprune.commands.prune import VariantOptions, select_run
from mlprune.errors import UserError
from mlprune.storage.results import Result
from mlprune.tracking.lookup import load_trial_items
from mlprune.tracking.tracker import SweepTracker
from tests.fuzz.values import CASES, TEXTS, check_line
from tests.test_lookup import WANDA, logged_store

TABLES = (
    "experiments",
    "experiment_tags",
    "runs",
    "tags",
    "params",
    "metrics",
    "latest_metrics",
    "alembic_version",
)
VALUES = (*(text for text in TEXTS if "\ud800" not in text), None, -1, 0, 2**62, 1.5, b"\xff\xfe")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return logged_store(tmp_path_factory.mktemp("logged"))


def use(store: Path, run: str) -> None:
    """Read the run as `prune --run` and `compare` do, and go on with its sweep."""
    uri = f"sqlite:///{store}/mlflow.db"
    for read in (
        lambda: select_run(run, VariantOptions(), {}, [f"storage={store}"]),
        lambda: load_trial_items(uri, run, "RUN"),
        lambda: log_again(uri, store),
    ):
        try:
            read()
        except UserError as error:
            check_line(error)


def log_again(uri: str, store: Path) -> None:
    tracker = SweepTracker(uri, "e", store / "mlartifacts", "key", "name")
    try:
        tracker.finish_trial(Result("a" * 24, WANDA, {"loss.mean": 0.5}), partial(str, "items"))
        assert tracker.flush(30, lambda *_: None), f"{tracker.last_error}: taken for a pause of the database"
    finally:
        tracker.close()


def fresh(logged: tuple[Path, str]) -> Path:
    shutil.rmtree("store", ignore_errors=True)
    return Path(shutil.copytree(logged[0], "store")).absolute()


@CASES
@given(st.data())
def test_changed_bytes(logged: tuple[Path, str], data: st.DataObject) -> None:
    store = fresh(logged)
    content = bytearray((store / "mlflow.db").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        start = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.binary(min_size=1, max_size=8))
        content[start : start + len(change)] = change[: len(content) - start]
    (store / "mlflow.db").write_bytes(content)
    use(store, logged[1])


@CASES
@given(st.data(), st.sampled_from(TABLES), st.sampled_from(["update", "delete", "drop"]))
def test_changed_tables(logged: tuple[Path, str], data: st.DataObject, table: str, change: str) -> None:
    store = fresh(logged)
    with closing(sqlite3.connect(store / "mlflow.db")) as database, database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        if change == "drop":
            database.execute(f"DROP TABLE {table}")
        elif change == "delete":
            database.execute(f"DELETE FROM {table}")
        else:
            value: Any = data.draw(st.sampled_from(VALUES))
            column = data.draw(st.sampled_from(columns))
            try:
                database.execute(f"UPDATE {table} SET {column} = ?", (value,))
            except sqlite3.IntegrityError:  # two rows must differ in it
                return
    use(store, logged[1])
