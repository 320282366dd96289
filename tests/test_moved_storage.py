"""A storage that was moved or copied: its artifacts are read and written where it lies now."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from mlprune.commands.prune import VariantOptions, select_run
from mlprune.spec.loading import parse_spec
from mlprune.spec.schema import SweepSpec
from mlprune.storage.results import Result
from mlprune.sweep.grid import parse_variant
from mlprune.tracking.lookup import load_trial_items
from mlprune.tracking.tracker import SweepTracker

WANDA = parse_variant("mono:en", "wanda", 0.5, "unstructured", "dense")
RIA = parse_variant("mono:en", "ria", 0.5, "unstructured", "dense")


def spec_in(storage: Path) -> SweepSpec:
    search = {"calibration": ["mono:en"], "score": ["wanda"], "sparsity": [0.5]}
    return parse_spec({"name": "moving", "search": search, "storage": str(storage)})


def log(storage: Path, key: str, variant: object) -> str:
    """Log a finished trial of the sweep in that storage; return its run."""
    spec = spec_in(storage)
    tracker = SweepTracker(spec.tracking_uri, "moving", spec.artifacts_folder, spec.key, spec.name)
    tracker.log_sweep({}, {"spec.yaml": spec.yaml()})
    tracker.finish_trial(Result(key, variant, {"loss.mean": 0.1}), partial(str, f"items of {key}"))  # type: ignore[arg-type]
    assert tracker.flush(30, lambda *_: None)
    tracker.close()
    return tracker.run_id(key)


def files_in(folder: Path) -> dict[Path, bytes]:
    """The contents of all files but the database, which every reader opens."""
    return {
        file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and "mlflow.db" not in file.name
    }


@pytest.mark.parametrize("copied", [False, True], ids=["moved", "copied"])
def test_artifacts_are_read_and_written_where_the_storage_lies(copied: bool, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "a new place"
    first = log(old, "a" * 24, WANDA)
    before = files_in(old)
    if copied:
        shutil.copytree(old, new)
    else:
        shutil.move(old, new)
        assert not old.exists()
    _artifact_repos_cache.clear()  # of runs that this process wrote: another one opens the moved storage
    assert load_trial_items(spec_in(new).tracking_uri, first, "RUN")[1] == f"items of {'a' * 24}"
    second = log(new, "b" * 24, RIA)
    assert load_trial_items(spec_in(new).tracking_uri, second, "RUN")[1] == f"items of {'b' * 24}"
    assert old.exists() == copied
    assert files_in(old) == (before if copied else {})
    client = MlflowClient(spec_in(new).tracking_uri)
    for run in (first, second):
        assert client.get_run(run).info.artifact_uri.startswith(f"{new.as_uri()}/mlartifacts/{run}")


def test_prune_uses_the_storage_that_the_run_was_found_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    run = log(tmp_path / "old" / "mlprune-store", "a" * 24, WANDA)
    shutil.move(tmp_path / "old", tmp_path / "new")
    _artifact_repos_cache.clear()
    monkeypatch.chdir(tmp_path / "new")
    spec, variant = select_run(run, VariantOptions(), {}, [])
    assert variant == WANDA
    assert spec.storage == str(tmp_path / "new" / "mlprune-store")
    spec, _ = select_run(run, VariantOptions(), {}, [f"tracking.uri={spec.tracking_uri}"])
    assert spec.storage == str(tmp_path / "old" / "mlprune-store")  # as the spec says


def test_artifacts_that_are_not_beside_the_database_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "databases").mkdir()
    uri = f"sqlite:///{tmp_path / 'databases' / 'mlflow.db'}"
    spec = spec_in(tmp_path / "store")
    tracker = SweepTracker(uri, "moving", spec.artifacts_folder, spec.key, spec.name)
    tracker.close()
    shutil.move(tmp_path / "databases", tmp_path / "elsewhere")
    moved = uri.replace("databases", "elsewhere")
    tracker = SweepTracker(moved, "moving", spec.artifacts_folder, spec.key, spec.name)
    tracker.log_sweep({}, {"spec.yaml": spec.yaml()})
    assert tracker.flush(30, lambda *_: None)
    tracker.close()
    assert list(spec.artifacts_folder.rglob("spec.yaml"))
    assert not (tmp_path / "elsewhere" / "mlartifacts").exists()
