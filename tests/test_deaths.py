"""Invariant 4: workers, trials, drivers and the tracking server die in each phase of a sweep; nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM

from mlprune.spec.loading import load_spec
from mlprune.spec.variants import Variant
from mlprune.sweep.grid import variants_of
from mlprune.sweep.mixtures import mixture_searches
from mlprune.sweep.plan import SweepPlan
from mlprune.sweep.prepare import prepare
from mlprune.sweep.session import open_local
from mlprune.sweep.stage import MASKS_ONLY
from mlprune.sweep.verdict import Verdict, run_stages
from tests import faults
from tests.local_runner import LocalRunner, lasting
from tests.numbers import Numbers, numbers, plain_numbers
from tests.servers import Server
from tests.tiny import sample, tokenizer
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


def check_runs(outcome: Mapping[str, Any], statuses: set[str], unranked: int = 0) -> None:
    """Each trial has one run, and none is left running. `unranked`: mixtures that are only forecast."""
    client = MlflowClient(outcome["tracking_uri"])
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(experiments, max_results=1000)
    trials = [run.data.tags["mlprune.trial"] for run in found if "mlprune.trial" in run.data.tags]
    assert len(trials) == len(set(trials)) == 1 + len(outcome["ranking"]) + len(outcome["failed"]) + unranked
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


RACE = {
    "calibration": ["mono:en", "translation:en-fr"],
    "score": ["magnitude", "wanda", "inverse-wanda"],
    "sparsity": [0.5],
    "propagation": ["dense"],
    "mixture": [
        {"searcher": "optuna", "parts": ["mono:en", "translation:en-fr"], "trials": 5, "evaluate": 1},
        {"searcher": "minimax", "parts": ["mono:en", "mono:fr"], "rounds": 2},
    ],
    "screen": 2,
    "racing": True,
}


def trained(folder: Path) -> str:
    """Write the tiny model after a few steps of training: bad masks harm it, so that a race drops some."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source().folder)
    rows = [tokenizer()(line).input_ids[:24] for line in sample("en").lines["en"][-200:]]
    ids = torch.tensor([row for row in rows if len(row) == 24])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        batch = ids[torch.randint(len(ids), (8,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def undisturbed_race(file: Path) -> tuple[SweepPlan, Verdict, list[Any]]:
    """Run the race in this process; return its plan, its verdict, and of each variant what `--json` must say."""
    values = load_spec(str(file), ["pipeline.shards=1", f"storage={file.parent / 'plain'}"])
    variants = variants_of(values.search)
    searches = mixture_searches(values.search, 0)
    plan = SweepPlan(prepare(values, variants, searches=searches), variants, (), searches=searches)
    with open_local(plan.prepared) as pipeline:
        verdict = run_stages(plan, LocalRunner(plan, pipeline))
    return (
        plan,
        verdict,
        [
            {
                "variant": entry.variant.to_dict(),
                "masks": entry.result.digest,
                "metrics": lasting(entry.metrics),
                "standing": entry.standing.name.lower(),
                "lines": entry.lines,
                "tied": entry.tied,
                **{
                    name: one and vars(one)
                    for name, one in (
                        ("loss", entry.loss),
                        ("to_best", entry.to_best),
                        ("confirmed", entry.confirmed),
                    )
                },
            }
            for entry in verdict.ranking
        ],
    )


@pytest.mark.timeout(1800)  # six starts of Ray
def test_the_driver_dies_in_each_phase(tmp_path: Path) -> None:
    """While it calibrates, screens, searches mixtures, races and confirms; each time the same command resumes.

    When it dies in the rounds of minimax, Optuna's choices are made again from stored forecasts.
    """
    evaluation = {"perplexity": {"languages": ["en", "fr"], "lines": 16, "confirmation_lines": 4}}
    model = trained(tmp_path / "model")
    file = spec(tmp_path, model={"path": model}, search=RACE, evaluation=evaluation)
    plan, verdict, expected = undisturbed_race(file)
    assert {entry["standing"] for entry in expected} == {"evaluated", "dropped", "screened"}
    variants = [*plan.variants, *(Variant.from_dict(entry["variant"]) for entry in expected)]
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # the path of a socket has 107 bytes at most
        outcome = sweep_that_dies_in_each_phase(tmp_path, Path(short), file, plan, variants)
    ranking = [{**entry, "metrics": lasting(entry["metrics"])} for entry in outcome["ranking"]]
    assert [{name: entry[name] for name in expected[0]} for entry in ranking] == expected
    ranked = {result.variant for entry in verdict.ranking for result in entry.seeds}
    unranked = [trial for trial in verdict.unfinished if trial.result.variant not in ranked]
    assert unranked, "of Optuna's mixtures, most are only forecast"
    check_runs(outcome, {"FINISHED"}, len(unranked))
    client = MlflowClient(outcome["tracking_uri"])
    for entry in outcome["ranking"]:
        logged = client.get_run(entry["run"]).data
        standing = {"dropped": "dropped in the race", "screened": "not evaluated"}.get(entry["standing"])
        assert logged.tags.get("mlprune.standing") == standing
        assert lasting(logged.metrics).items() >= lasting(entry["metrics"]).items()
        assert logged.metrics.get("confirmation.loss.estimate") == (entry["confirmed"] or {"value": None})["value"]
        assert ("loss.worst" in logged.metrics) == (standing != "not evaluated")


def sweep_that_dies_in_each_phase(
    folder: Path, short: Path, file: Path, plan: SweepPlan, variants: Sequence[Variant]
) -> Any:
    """Kill the driver again and again, and return what it says in the end; check what is left on disk."""
    assert plan.prepared.evaluation is not None
    (folder / "tmp").mkdir()
    own: Any = {"RAY_TMPDIR": str(short), "TMPDIR": str(folder / "tmp")}
    process = start(folder, "sweep", str(file), **own)
    faults.order(folder / "faults", "save_moments", ["live", str(process.pid)])
    assert process.wait(500) == -signal.SIGKILL, (folder / "log.txt").read_text()
    store = folder / "store"
    before: dict[Path, int] = {}  # what was stored of the interrupted pass is incomplete: it is repeated
    suites = plan.prepared.evaluation
    for suite, trials in (
        (MASKS_ONLY, variants),
        (plan.prepared.suite, [plan.searches[-1].equal]),  # of minimax
        (suites.blocks[0], variants),
        (suites.confirmation, variants),
    ):
        process = start(folder, "sweep", str(file), **own)
        keys = [plan.prepared.result_key(variant, suite) for variant in trials]
        while not any((store / "results" / f"{key}.json").exists() for key in keys):
            assert process.poll() is None, (folder / "log.txt").read_text()
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert len(list(short.iterdir())) == 1, "the folder of an earlier driver is left"
        files = times(store)
        assert before.items() <= files.items(), "a finished trial ran again, or a stored pass"
        before = files
    outcome = done(folder, "sweep", str(file), **own)
    assert before.items() <= times(store).items()
    assert {file.name for file in times(store)} == {file.name for file in times(folder / "plain")}
    assert len([*(folder / "tmp").glob("mlprune-tune-*")]) <= 1
    assert list(store.glob(".mlflow.db.*")) == []
    return outcome


def times(store: Path) -> dict[Path, int]:
    """When each file of moments and each result was written."""
    files = (*store.glob("moments/**/*.safetensors"), *store.glob("results/*.json"))
    return {file: file.stat().st_mtime_ns for file in files}


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
