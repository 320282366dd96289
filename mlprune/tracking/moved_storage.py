"""Follows a storage that was moved or copied: its MLflow database contains absolute paths of artifacts.

MLflow has no call to change them, so its tables `experiments` and `runs` are updated directly.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

BESIDE_TAG = "mlprune.artifacts"  # of an experiment whose artifacts are in a folder beside the database


def update_artifact_paths(database: Path) -> None:
    """Make the artifacts of experiments with BESIDE_TAG those beside the database, wherever it lies now.

    Raises sqlite3.Error for a file that is no database.
    """
    folder = database.parent.absolute().as_uri()
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiment_tags'").fetchone():
            return  # MLflow creates its tables, or refuses the file
        tagged = connection.execute(
            "SELECT experiment_id, artifact_location FROM experiments JOIN experiment_tags USING (experiment_id)"
            " WHERE key = ?",
            (BESIDE_TAG,),
        ).fetchall()
        for experiment, old in tagged:
            new = f"{folder}/{old.rpartition('/')[2]}"
            if new != old:
                _replace_location(connection, experiment, old, new)


def _replace_location(connection: sqlite3.Connection, experiment: int, old: str, new: str) -> None:
    connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new, experiment))
    connection.execute(
        "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?)"
        " WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
        (new, len(old) + 1, experiment, len(old) + 1, f"{old}/"),
    )
