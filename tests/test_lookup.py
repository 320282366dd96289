"""Runs that are read back from MLflow are untrusted: what is damaged or hostile is reported in one line."""

import json
import shutil
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlprune.commands.prune import VariantOptions, select_run
from mlprune.errors import SpecError
from mlprune.evaluation.items import from_json
from mlprune.spec.loading import parse_spec
from mlprune.storage.results import Result
from mlprune.sweep.grid import parse_variant
from mlprune.tracking.lookup import load_trial_items
from mlprune.tracking.tracker import SweepTracker

WANDA = parse_variant("mono:en", "wanda", 0.5, "unstructured", "dense")
SPEC = {"search": {"calibration": ["mono:en"], "score": ["wanda"], "sparsity": [0.5]}}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return logged_store(tmp_path_factory.mktemp("logged"))


def logged_store(folder: Path) -> tuple[Path, str]:
    """Create a storage with one finished trial; return it and the trial's run."""
    spec = parse_spec({**SPEC, "storage": str(folder)})
    tracker = SweepTracker(spec.tracking_uri, "e", spec.artifacts_folder, spec.key, spec.name)
    tracker.log_sweep({}, {"spec.yaml": spec.yaml()})
    tracker.finish_trial(Result("a" * 24, WANDA, {}), partial(str, "items"))
    assert tracker.flush(30, lambda *_: None)
    tracker.close()
    return spec.storage_folder, tracker.run_id("a" * 24)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("DELETE FROM params WHERE key = 'pattern'", "is damaged: its param pattern: field required"),
        (
            "UPDATE params SET value = 'x' WHERE key = 'sparsity'",
            "is damaged: its param sparsity: input should be",
        ),
        ("UPDATE params SET value = '1.5' WHERE key = 'sparsity'", "is damaged: its param sparsity: input should"),
        (
            "UPDATE params SET value = 'x' WHERE key = 'seed'",
            "is damaged: its param seed: input should be a valid",
        ),
        ("UPDATE params SET value = 'x' WHERE key = 'score'", "'x': no such score"),
        ("UPDATE runs SET artifact_uri = 'sftp://me@there/x'", "its artifacts are at sftp://me@there/x, which"),
        ("UPDATE runs SET artifact_uri = 'runs:/x/y'", "its artifacts are at runs:/x/y, which is not read"),
    ],
)
def test_a_damaged_run_is_reported(logged: tuple[Path, str], change: str, problem: str, tmp_path: Path) -> None:
    folder, run = shutil.copytree(logged[0], tmp_path / "store"), logged[1]
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        assert database.execute(change).rowcount
    with pytest.raises(SpecError) as caught:
        select_run(run, VariantOptions(), {}, [f"storage={folder}"])
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_artifacts_that_are_no_text_are_reported(logged: tuple[Path, str], tmp_path: Path) -> None:
    folder, run = shutil.copytree(logged[0], tmp_path / "store"), logged[1]
    (file,) = folder.rglob("items.json")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match=r"is damaged: its artifact items\.json is not UTF-8"):
        load_trial_items(f"sqlite:///{folder}/mlflow.db", run, "RUN")


def likelihoods(**changes: Any) -> dict[str, Any]:
    columns = {"nll": [1.5, 2.5], "tokens": [2, 3], "bytes": [10, 12]}
    return {
        "task": "perplexity",
        "language": "en",
        "kind": "likelihood",
        "ids": ["1", "2"],
        "columns": columns | changes,
    }


CHOICE = {
    "task": "xnli",
    "language": "en",
    "kind": "choice",
    "ids": ["1"],
    "columns": {"scores": [[0.1, 0.2]], "answer": [2]},
}


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([likelihoods(), likelihoods()], "perplexity en is there twice"),
        ([likelihoods(bytes=[0, 12])], "perplexity en: bytes must be in [1, "),
        ([likelihoods(tokens=[-1, 3])], "perplexity en: tokens must be in [1, "),
        ([likelihoods(tokens=[2, 2**41])], "perplexity en: tokens must be in [1, "),
        ([CHOICE], "xnli en: an answer is none of the options"),
    ],
)
def test_items_that_no_run_yields_are_refused(items: list[Any], problem: str) -> None:
    assert from_json(json.dumps({"format": "mlprune-items-1", "items": [likelihoods()]}))
    with pytest.raises(ValueError, match="not a run's items: ") as caught:
        from_json(json.dumps({"format": "mlprune-items-1", "items": items}))
    assert problem in str(caught.value)
