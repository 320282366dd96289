"""`mlprune compare`: two runs, read from MLflow, item by item."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlprune.cli import main
from mlprune.evaluation.items import Items, metrics_of, to_json
from mlprune.spec.loading import load_spec
from mlprune.spec.variants import Variant
from mlprune.storage import results as store
from mlprune.sweep.grid import parse_variant
from mlprune.tracking.tracker import SweepTracker

LINES = tuple(str(n) for n in range(200))


def variant(sparsity: float) -> Variant:
    return parse_variant("mono:en", "wanda", sparsity, "unstructured", "dense")


def likelihoods(language: str, more: float) -> Items:
    """Return likelihoods of lines of 100 bytes, about `more` nats higher than another run's."""
    nll = tuple(90.0 + n % 7 + more * (1 + (n % 3 - 1) / 2) for n in range(len(LINES)))
    columns = {"nll": nll, "tokens": (30,) * len(LINES), "bytes": (100,) * len(LINES)}
    return Items("perplexity", language, "likelihood", LINES, columns)


def answers(language: str, wrong: Sequence[int]) -> Items:
    values = tuple(0.0 if n in wrong else 1.0 for n in range(len(LINES)))
    return Items(f"xwinograd_{language}", language, "value", LINES, {"value": values}, "acc")


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepTracker:
    monkeypatch.chdir(tmp_path)
    spec = load_spec("quickstart")
    return SweepTracker(spec.tracking_uri, "ours", spec.storage_folder / "mlartifacts", spec.key, spec.name)


def finished(tracker: SweepTracker, key: str, sparsity: float, items: Sequence[Items]) -> str:
    made = store.Result(key, variant(sparsity), metrics_of(items))
    tracker.finish_trial(made, lambda: to_json(items))
    assert tracker.flush(10, print)
    return tracker.run_id(key)


def compared(*words: str) -> Result:
    return CliRunner().invoke(main, ["compare", *words])


def test_the_printed_table(tracker: SweepTracker) -> None:
    a = finished(
        tracker, "a", 0.3, [likelihoods("en", 0), likelihoods("fr", 0), answers("en", []), answers("fr", [])]
    )
    worse = [likelihoods("en", 2.0), likelihoods("fr", 9.0), answers("en", [4]), answers("fr", range(40))]
    b = finished(tracker, "b", 0.5, worse)
    result = compared(a, b)
    assert result.exit_code == 0, result.stderr
    rows = {
        " ".join(re.findall("[a-z_]+", line.split("0.")[0])): line
        for line in result.stdout.splitlines()
        if "[" in line
    }
    ends = {name: re.split(r"\d ", line.rstrip())[-1].strip() for name, line in rows.items()}
    assert ends == {
        "bits_per_byte en": "worse",
        "bits_per_byte fr": "worse *",
        "xwinograd acc en": "not significant",
        "xwinograd acc fr": "worse *",
    }
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
    assert result.stdout.startswith(f"a  en 0.3 wanda  {a}\nb  en 0.5 wanda  {b}\n")


def test_the_same_as_json(tracker: SweepTracker) -> None:
    a = finished(tracker, "a", 0.3, [likelihoods("en", 0), likelihoods("fr", 0)])
    b = finished(tracker, "b", 0.5, [likelihoods("en", 9.0), likelihoods("fr", 2.0)])
    values: dict[str, Any] = json.loads(compared(a, b, "--json", "-").stdout)
    assert (values["a"]["run_id"], values["b"]["run_id"]) == (a, b)
    en, fr = values["differences"]
    assert (en["language"], en["verdict"], en["worst"]) == ("en", "worse", True)
    assert (fr["language"], fr["verdict"], fr["worst"]) == ("fr", "worse", False)
    assert en["difference"] == pytest.approx(en["b"] - en["a"])
    assert en["low"] < en["difference"] < en["high"]
    turned = json.loads(compared(b, a, "--json", "-").stdout)
    assert [one["verdict"] for one in turned["differences"]] == ["better", "better"]
    assert [one["worst"] for one in turned["differences"]] == [False, True]  # gained least


def test_a_run_against_itself(tracker: SweepTracker) -> None:
    a = finished(tracker, "a", 0.3, [likelihoods("en", 0), answers("en", [])])
    values = json.loads(compared(a, a, "--json", "-").stdout)
    assert {one["verdict"] for one in values["differences"]} == {"no difference shown"}


def test_harness_tasks_of_one_name_are_corrected_together(tracker: SweepTracker) -> None:
    languages = ("en", "fr", "de", "es")
    a = finished(tracker, "a", 0.3, [answers(code, []) for code in languages])
    b = finished(tracker, "b", 0.5, [answers(code, range(7)) for code in languages])
    one, *_ = json.loads(compared(a, b, "--json", "-").stdout)["differences"]
    assert one["p"] == pytest.approx(2 / 2**7)
    assert one["adjusted"] == pytest.approx(4 * one["p"])


def test_runs_that_cannot_be_compared_are_reported(tracker: SweepTracker) -> None:
    a = finished(tracker, "a", 0.3, [likelihoods("en", 0)])
    other = finished(tracker, "b", 0.5, [likelihoods("fr", 0)])
    tracker.start_trial("c", variant(0.7))
    assert tracker.flush(10, print)
    going = tracker.run_id("c")
    for words, remedy in (
        ((a, "nothing"), "'nothing': no such run in sqlite:///"),
        ((a, tracker.parent_id), "not the run of a trial of mlprune"),
        ((going, a), "has no items.json: it did not finish"),
        ((a, other), "only one of the two runs has it"),
    ):
        result = compared(*words)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert result.stderr.startswith("mlprune: RUN: ")
        assert remedy in result.stderr
