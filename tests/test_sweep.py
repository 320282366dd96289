"""A sweep end to end, with real Ray Tune and a real MLflow database; also interrupted and resumed."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM

from mlprune.cli import main
from mlprune.errors import StorageError
from mlprune.evaluation.items import from_json
from mlprune.spec.loading import load_spec, parse_spec
from mlprune.sweep.plan import select_variants
from mlprune.sweep.sweep import run_sweep
from mlprune.sweep.trial import trial_metrics
from tests.numbers import numbers
from tests.tiny import tokenizer
from tests.tiny_models import source

# 2 calibrations x wanda x 2 sparsities x 2 propagations, and magnitude and random at 2 sparsities: once each
TRIALS = 12
LANGUAGES = ("en", "fr")


def spec(folder: Path, **search: Any) -> Path:
    values = {
        "name": "tiny",
        "model": {"path": str(source().folder)},
        "calibration": {"samples": 6, "shots": 2, "max_tokens": 128},
        "search": {
            "calibration": ["mono:en", "translation:en-fr"],
            "score": ["random", "magnitude", "wanda"],
            "sparsity": [0.3, 0.5],
            "propagation": ["dense", "sequential"],
            **search,
        },
        "evaluation": {"perplexity": {"languages": ["en", "fr"], "lines": 12}},
        "storage": str(folder / "store"),
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def start(*args: str, cwd: Path) -> subprocess.Popen[bytes]:
    with (cwd / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "mlprune", "sweep", *args]
        # what was itself started with `nohup ... &` ignores Ctrl-C, and so would what it starts
        return subprocess.Popen(
            command, cwd=cwd, stdout=log, stderr=log, start_new_session=True, preexec_fn=_interruptible
        )


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def sweep(folder: Path, *args: str, **search: Any) -> dict[str, Any]:
    out = folder / "out.json"
    process = start(str(spec(folder, **search)), "--json", str(out), *args, cwd=folder)
    assert process.wait(500) == 0, (folder / "log.txt").read_text()
    values: dict[str, Any] = json.loads(out.read_text())
    return values


def runs(outcome: dict[str, Any]) -> Sequence[Any]:
    client = MlflowClient(outcome["tracking_uri"])
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, "attributes.status != 'nothing'", max_results=1000))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sweep(tmp_path_factory.mktemp("undisturbed"))


def test_every_result_is_in_mlflow_under_plain_names(undisturbed: dict[str, Any]) -> None:
    found = {run.info.run_id: run for run in runs(undisturbed)}
    parent = found.pop(undisturbed["parent_run"])
    assert len(undisturbed["ranking"]) == TRIALS
    assert found.keys() == {result["run"] for result in (undisturbed["dense"], *undisturbed["ranking"])}
    for result in undisturbed["ranking"]:
        run = found[result["run"]]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == undisturbed["parent_run"]
        assert run.data.params["calibration"] == (result["variant"]["calibration"] or "none")
        assert float(run.data.params["sparsity"]) == result["variant"]["sparsity"]
        assert run.data.params.keys() == {
            *("calibration", "score", "sparsity", "pattern", "propagation", "allocation", "seed", "repair")
        }
        assert run.data.metrics["bits_per_byte"] == result["metrics"]["bits_per_byte.mean"]
        estimates = {"loss": "loss", "to_best": "to_best", "confirmation.loss": "confirmed"}
        for name, field in estimates.items():
            logged = {end: run.data.metrics.pop(f"{name}.{end}", None) for end in ("estimate", "low", "high")}
            expected = result[field] or {"value": None, "low": None, "high": None}
            assert list(logged.values()) == [expected["value"], expected["low"], expected["high"]]
        assert result["loss"]["low"] <= result["metrics"]["loss.mean"] <= result["loss"]["high"]
        dense = undisturbed["dense"]["metrics"]
        losses = [
            result["metrics"][f"bits_per_byte.{code}"] / dense[f"bits_per_byte.{code}"] - 1 for code in LANGUAGES
        ]
        assert result["metrics"]["loss.mean"] == pytest.approx(sum(losses) / len(losses))
        assert result["metrics"]["loss.worst"] == pytest.approx(max(losses))
        assert run.data.metrics == pytest.approx(result["metrics"], abs=0)
        assert {"bits_per_byte.fr", "perplexity.en", "sparsity.actual", "seconds.mask"} < run.data.metrics.keys()
        assert {"forecast.en", "forecast.fr", "forecast.mean", "forecast.worst"} < run.data.metrics.keys()
    assert {"live.tokens_per_second", "live.shards_busy", "live.trials_finished"} <= parent.data.metrics.keys()
    assert 0 < parent.data.metrics["occupancy.shard_0"] <= 1
    assert undisturbed["ranking"][0]["run"] in parent.data.tags["mlflow.note.content"]
    client = MlflowClient(undisturbed["tracking_uri"])
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    pictures = {f"tiny{kind}.png" for kind in ("", "-calibrations", "-losses", "-languages", "-forecasts")}
    assert artifacts == {"spec.yaml", "environment.txt", *pictures}
    assert parent.info.status == "FINISHED"


TASKS = {
    "perplexity": {"languages": ["en", "fr"], "lines": 4},
    "xnli": {"languages": ["en", "fr"], "data": "xnli"},
    "translation": {"pairs": ["fr-en"], "shots": 1, "lines": 2, "max_new_tokens": 6},
    "tasks": ["sample_xwinograd_en", "sample_xwinograd_fr"],
    "task_items": 6,
}


def test_items_are_stored_and_two_runs_are_compared_by_them(tmp_path: Path) -> None:
    (tmp_path / "xnli").mkdir()
    rows = [{"premise": f"A {n}", "hypothesis": f"B {n}", "label": n % 3} for n in range(7)]
    for code in ("en", "fr"):
        (tmp_path / "xnli" / f"{code}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [f"--set=evaluation={json.dumps(TASKS)}", "--set=search.calibration=[]"]
    outcome = sweep(tmp_path, *given, score=["magnitude"], sparsity=[0.9], propagation=["dense"])
    (trial,) = outcome["ranking"]
    client = MlflowClient(outcome["tracking_uri"])
    text = {run: Path(client.download_artifacts(run, "items.json")).read_text() for run in runs_of(outcome)}
    for result in (outcome["dense"], trial):
        found = trial_metrics(from_json(text[result["run"]]))
        assert found.keys() > {"xnli.fr", "rankc.xnli.en-fr", "bleu.fr-en", "sample_xwinograd_en.acc"}
        assert {name: result["metrics"][name] for name in found} == found
        assert {name: client.get_run(result["run"]).data.metrics[name] for name in found} == found
    assert "|tok:13a|" in client.get_run(outcome["parent_run"]).data.params["signature.bleu.fr-en"]
    words = ["compare", outcome["dense"]["run"], trial["run"], "--set", f"tracking.uri={outcome['tracking_uri']}"]
    card = CliRunner().invoke(main, [*words, "--json", "-"])
    differences = {
        (one["task"], one["language"], one["metric"]): one for one in json.loads(card.stdout)["differences"]
    }
    assert differences.keys() == {
        ("perplexity", "en", "bits_per_byte"),
        ("perplexity", "fr", "bits_per_byte"),
        ("xnli", "en", "accuracy"),
        ("xnli", "fr", "accuracy"),
        ("translation", "fr-en", "bleu"),
        ("translation", "fr-en", "chrf"),
        ("sample_xwinograd_en", "en", "acc"),
        ("sample_xwinograd_fr", "fr", "acc"),
    }
    french = differences["perplexity", "fr", "bits_per_byte"]
    assert french["b"] == trial["metrics"]["bits_per_byte.fr"]
    assert french["difference"] == french["b"] - outcome["dense"]["metrics"]["bits_per_byte.fr"] != 0


def runs_of(outcome: dict[str, Any]) -> list[str]:
    return [result["run"] for result in (outcome["dense"], *outcome["ranking"])]


def test_ranking_is_by_the_objective_and_identical_variants_ran_once(undisturbed: dict[str, Any]) -> None:
    values = [result["metrics"]["loss.mean"] for result in undisturbed["ranking"]]
    assert values == sorted(values)
    best = [result for result in undisturbed["ranking"] if result["to_best"] is None]
    assert len(best) == len({result["variant"]["sparsity"] for result in undisturbed["ranking"]})
    assert all(result["confirmed"] for result in undisturbed["ranking"] if result["tied"] or result in best)
    assert not any(
        result["confirmed"] for result in undisturbed["ranking"] if not result["tied"] and result not in best
    )
    variants = [json.dumps(result["variant"]) for result in undisturbed["ranking"]]
    assert len(set(variants)) == TRIALS
    assert undisturbed["winner"] == undisturbed["ranking"][0]["run"]
    assert undisturbed["dense"]["metrics"]["sparsity.actual"] == 0


def test_the_picture_is_a_valid_image(undisturbed: dict[str, Any]) -> None:
    from PIL import Image

    with Image.open(undisturbed["pictures"][0]) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 100


def test_a_finished_sweep_is_reported_again_without_ray(undisturbed: dict[str, Any]) -> None:
    folder = Path(undisturbed["pictures"][0]).parent.parent
    started = time.time()
    again = sweep(folder)
    assert again["ranking"] == undisturbed["ranking"]
    assert "starting Ray" not in (folder / "log.txt").read_text().split("picture")[-2]
    assert not [p for p in (folder / "store" / "results").glob("*.json") if p.stat().st_mtime > started]
    assert len(runs(again)) == TRIALS + 2


def test_a_full_disk_fails_the_sweep_in_one_line_and_it_resumes(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All trials have finished when a picture finds no space."""
    shutil.copytree(Path(undisturbed["pictures"][0]).parent, tmp_path / "store")
    finished = load_spec(str(spec(tmp_path)))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("mlprune.sweep.sweep.draw_pictures", full)
        with pytest.raises(StorageError, match=r"/store: no space left \([\d,]+ bytes\); free some"):
            run_sweep(finished)

    def status() -> list[str]:
        client = MlflowClient(finished.tracking_uri)
        return [run.info.status for run in client.search_runs(["1"], "tags.`mlprune.sweep` != ''")]

    assert status() == ["FAILED"]
    assert run_sweep(finished).ranking
    assert status() == ["FINISHED"]


def test_optuna_optimises_the_worst_language_and_resumes(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    search = {"samples": 6, "searcher": "optuna", "objective": "worst"}
    first = sweep(tmp_path, **search)
    worst = [result["metrics"]["loss.worst"] for result in first["ranking"]]
    assert worst == sorted(worst)
    assert len(worst) == 6, "samples are different trials"
    expected = numbers(undisturbed)
    assert all(expected[variant] == found for variant, found in numbers(first).items())
    results = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "store" / "results").glob("*.json")}
    again = sweep(tmp_path, **search)
    assert again["ranking"] == first["ranking"], "the same seed and results lead to the same suggestions"
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "store" / "results").glob("*.json")} == results


def test_random_samples_are_seeded_and_different() -> None:
    search = {"score": ["wanda"], "calibration": ["mono:en", "mono:fr"], "sparsity": [0.1, 0.2, 0.3, 0.4]}
    whole = select_variants(parse_spec({"search": search}).search, seed=0)
    drawn = parse_spec({"search": {**search, "samples": 5}}).search
    some = select_variants(drawn, seed=0)
    assert len(whole) == 8
    assert len(set(some)) == 5
    assert set(some) < set(whole)
    assert select_variants(drawn, seed=0) == some
    assert any(select_variants(drawn, seed=seed) != some for seed in (1, 2, 3))


def overflowing(folder: Path) -> Path:
    """Return a model with finite activations whose sums of squares overflow in one layer."""
    model = AutoModelForCausalLM.from_pretrained(source().folder)
    model.model.layers[1].mlp.up_proj.weight.data *= 1e21
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_failed_trial_does_not_stop_others_and_has_a_cause(tmp_path: Path) -> None:
    model = overflowing(tmp_path / "model")
    search = {"score": ["magnitude", "wanda"], "calibration": ["mono:en"], "propagation": ["dense"]}
    out = tmp_path / "out.json"
    args = ["--set", f"model.path={model}", "--json", str(out)]
    assert start(str(spec(tmp_path, **search)), *args, cwd=tmp_path).wait(500) == 1
    outcome = json.loads(out.read_text())
    assert [result["variant"]["score"] for result in outcome["ranking"]] == ["magnitude", "magnitude"]
    assert outcome["failed"].keys() == {"wanda 0.3 mono:en", "wanda 0.5 mono:en"}
    assert all("layer 1, mlp.down_proj" in cause for cause in outcome["failed"].values())
    failed = [run for run in runs(outcome) if run.info.status == "FAILED" and "mlprune.trial" in run.data.tags]
    assert len(failed) == 2
    assert all("mlp.down_proj" in run.data.tags["mlprune.cause"] for run in failed)
    assert "failed     wanda 0.3 mono:en" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_is_not_reported_as_finished(stop: signal.Signals, tmp_path: Path) -> None:
    process = start(str(spec(tmp_path)), cwd=tmp_path)
    results = tmp_path / "store" / "results"
    deadline = time.monotonic() + 240
    while len(list(results.glob("*.json"))) < 3:
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(stop)
    assert process.wait(300) == 128 + stop
    log = (tmp_path / "log.txt").read_text()
    assert log.splitlines()[-1] == f"mlprune: stopped by {stop.name}; run the same command to resume"
    assert not re.search("Traceback|received at time|Aborted", log)
    assert "bits per byte of held-out lines" not in log
    client = MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db")
    parents = client.search_runs(["1"], "tags.`mlprune.sweep` != ''")
    assert [run.info.status for run in parents] == ["KILLED"]
