"""Invariant 4: workers, trials, drivers and the tracking server die in each phase of a sweep; nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from tests import faults
from tests.numbers import Numbers, numbers, plain_numbers
from tests.servers import Server
from tests.tiny_models import source


def spec(folder: Path, **changes: Any) -> Path:
    values = {
        "name": "mortal",
        "model": {"path": str(source().folder)},
        "pipeline": {"shards": 2},
        "calibration": {"samples": 6, "shots": 2, "max_tokens": 128},
        "search": {
            "calibration": ["mono:en", "translation:en-fr"],
            "score": ["magnitude", "wanda"],
            "sparsity": [0.3, 0.5],
            "propagation": ["dense", "sequential"],
        },
        "evaluation": {"perplexity": {"languages": ["en", "fr"], "lines": 12}},
        "storage": str(folder / "store"),
        **changes,
    }
    file = folder / "mortal.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    with (folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "mlprune", *words]
        return subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **faults.environment(folder / "faults"), **environment},
        )


def done(folder: Path, *words: str, code: int = 0, **environment: str) -> Any:
    """What a command says with --json; the log if it ends otherwise than with `code`."""
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    process = start(folder, *words, "--json", str(out), **environment)
    assert process.wait(500) == code, (folder / "log.txt").read_text()
    return json.loads(out.read_text()) if out.exists() else None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    return plain_numbers(spec(tmp_path_factory.mktemp("undisturbed")))


def check_runs(outcome: Mapping[str, Any], statuses: set[str]) -> None:
    """Each trial has one run, and none is left running."""
    client = MlflowClient(outcome["tracking_uri"])
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(experiments, max_results=1000)
    trials = [run.data.tags["mlprune.trial"] for run in found if "mlprune.trial" in run.data.tags]
    assert len(trials) == len(set(trials)) == 1 + len(outcome["ranking"]) + len(outcome["failed"])
    assert sum("mlprune.sweep" in run.data.tags for run in found) == 1
    assert {run.info.status for run in found} == statuses


def test_workers_and_the_tracking_server_die_in_each_phase(undisturbed: Numbers, tmp_path: Path) -> None:
    for method, calls in {
        "likelihood": ["live", "die", *["live"] * 6, "die"],  # the dense model's second chunk; a trial's
        "save_moments": ["die"],
        "mask": ["live", "die"],
        "prune_through": ["live", "live", "die"],
    }.items():
        faults.order(tmp_path / "faults", method, calls)
    (tmp_path / "mlflow").mkdir()
    server = Server(tmp_path / "mlflow")
    try:
        server.wait()
        with ThreadPoolExecutor() as pool:
            words = ["sweep", str(spec(tmp_path)), "--set", f"tracking.uri={server.uri}"]
            sweep = pool.submit(done, tmp_path, *words)
            _await(tmp_path / "faults" / "save_moments" / "000.done", sweep)
            server.kill()
            _await(tmp_path / "faults" / "prune_through" / "002.done", sweep)
            server.start()
            outcome = sweep.result()
        check_runs(outcome, {"FINISHED"})
    finally:
        server.kill()
    log = (tmp_path / "log.txt").read_text()
    assert faults.left(tmp_path / "faults") == [], log
    assert re.search(r"note: \d+ updates queued for MLflow: ", log)
    assert numbers(outcome) == undisturbed
    assert outcome["failed"] == {}


def _await(file: Path, sweep: Future[Any]) -> None:
    deadline = time.monotonic() + 200
    while not file.exists():
        assert not sweep.done(), sweep.result()
        assert time.monotonic() < deadline, file
        time.sleep(0.05)


def test_a_trial_that_kills_its_workers_fails_alone(undisturbed: Numbers, tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / faults.GUILTY).write_text("wanda 0.5 mono:en")
    outcome = done(tmp_path, "sweep", str(spec(tmp_path)), code=1)
    assert outcome["failed"].keys() == {"wanda 0.5 mono:en"}
    assert "a worker died 3 times under it" in outcome["failed"]["wanda 0.5 mono:en"]
    found = numbers(outcome)
    assert len(found) == len(undisturbed) - 1
    assert found == {variant: undisturbed[variant] for variant in found}
    check_runs(outcome, {"FINISHED", "FAILED"})


def test_the_driver_dies_in_each_phase(undisturbed: Numbers, tmp_path: Path) -> None:
    """Calibration, masking and evaluation, one after another; each time the same command resumes."""
    results = tmp_path / "store" / "results"
    before: dict[str, int] = {}
    for method, calls in {"save_moments": 1, "mask": 2, "likelihood": 9}.items():
        process = start(tmp_path, "sweep", str(spec(tmp_path)))
        faults.order(tmp_path / "faults", method, [*["live"] * (calls - 1), str(process.pid)])
        assert process.wait(500) == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
        found = {file.name: file.stat().st_mtime_ns for file in results.glob("*.json")}
        assert before.items() <= found.items(), "a finished trial ran again"
        before = found
    moments = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*.safetensors")}
    outcome = done(tmp_path, "sweep", str(spec(tmp_path)))
    assert {file: file.stat().st_mtime_ns for file in moments} == moments, "a stored pass was repeated"
    after = {file.name: file.stat().st_mtime_ns for file in results.glob("*.json")}
    assert before.items() <= after.items()
    assert numbers(outcome) == undisturbed
    check_runs(outcome, {"FINISHED"})


PRUNE = ["prune", "--calibration", "mono:en", "--score", "wanda", "--sparsity", "0.5"]


def test_export_survives_a_worker_and_a_dead_driver_leaves_no_files(tmp_path: Path) -> None:
    options = [*PRUNE, "--spec", str(spec(tmp_path))]
    faults.order(tmp_path / "faults", "layer_weights", ["live", "die"])
    done(tmp_path, *options, "--output", "mended")
    assert faults.left(tmp_path / "faults") == []

    process = start(tmp_path, *options, "--output", "killed")
    faults.order(tmp_path / "faults", "layer_weights", ["live", "live", str(process.pid)])
    assert process.wait(500) == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()

    done(tmp_path, *options, "--set", "pipeline.shards=1", "--output", "killed")
    one, other = (tmp_path / name / "model.safetensors" for name in ("mended", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_a_worker_killed_for_memory_is_reported_as_such(tmp_path: Path) -> None:
    """By Ray's own memory monitor, with a limit of two percent of the machine's memory."""
    greedy = {"RAY_memory_usage_threshold": "0.02", "RAY_memory_monitor_refresh_ms": "100"}
    assert done(tmp_path, "sweep", str(spec(tmp_path)), code=1, **greedy) is None
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last.startswith("mlprune: workers died 3 times while they loaded: a shard's worker was killed because")
    assert "its node ran low on memory" in last
