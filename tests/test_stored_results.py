"""A store that an earlier version wrote: its trials are known as finished, and variants keep their keys.

`tests/data/store-2` was written by mlprune 0.1.0 (store format 2) for the tiny model beside it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlprune.evaluation.items import from_json, metrics_of
from mlprune.spec.loading import load_spec
from mlprune.spec.variants import Allocation, Propagation
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.plan import SweepPlan, plan_sweep

STORED = Path(__file__).parent / "data" / "store-2"


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepPlan:
    shutil.copytree(STORED, tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")
    return plan_sweep(load_spec("sweep.yaml"))


def test_nothing_is_run_again(plan: SweepPlan) -> None:
    assert len(plan.variants) == 13
    assert plan.unfinished == []
    assert set(plan.passes.values()) == {0}


def test_results_and_items_are_read_as_they_were_written(plan: SweepPlan) -> None:
    outcomes = json.loads((STORED / "outcome.json").read_text())
    stored = {_text(one["variant"]): one for one in outcomes}
    dense = plan.prepared.result_store().load(plan.prepared.result_key(None))
    assert dense is not None
    assert len(stored) == 1 + len(plan.finished)
    for result in (dense, *plan.finished):
        expected = stored[_text(result.variant.to_dict() if result.variant else None)]
        assert {name: result.metrics[name] for name in expected["metrics"]} == expected["metrics"]
        assert result.digest == expected["masks"]
        metrics = metrics_of(from_json(plan.prepared.result_store().items(result.key)))
        assert {name: result.metrics[name] for name in metrics} == metrics


def _text(variant: object) -> str:
    return json.dumps(variant, sort_keys=True)


def test_moments_are_read_and_intact(plan: SweepPlan) -> None:
    store = plan.prepared.moment_store()
    read = {str(part) for variant in plan.variants for part in variant.demonstrations}
    keys = [plan.prepared.sets[name].key for name in read]
    layers = [store.load(key, layer) for key in keys for layer in range(2)]
    assert len(layers) == 4
    assert all(layer and {"mlp.down_proj", "self_attn.q_proj"} < layer.keys() for layer in layers)


# calibration, score, sparsity, pattern, propagation, allocation -> key
KEYS: dict[tuple[str | None, str, float, str, Propagation, Allocation], str] = {
    ("mono:en", "wanda", 0.5, "unstructured", "dense", "uniform"): "cf8b0e4aff444ceb",
    ("translation:en-fr", "wanda", 0.3, "unstructured", "sequential", "uniform"): "e931257831f328b9",
    (None, "magnitude", 0.5, "unstructured", "dense", "uniform"): "dbf64d9523f6e979",
    (None, "random", 0.29, "unstructured", "sequential", "uniform"): "511cfb696718eeab",
    ("mono:hi", "wanda", 0.7, "2:4", "dense", "uniform"): "e44c657451eb1429",
    ("mono:hi", "wanda-alpha", 0.7, "4:8", "dense", "owl"): "d4f78c5bdbbe989f",
    (
        "mix:mono:hi=0.75,translation:en-fr=0.25",
        "wanda",
        0.3,
        "unstructured",
        "dense",
        "uniform",
    ): "d1b9d731721b53b2",
    (None, "contrastive:translation:en-fr/code", 0.4, "unstructured", "dense", "uniform"): "94ce14c3525d4b2e",
    ("code", "ria", 0.6, "unstructured", "dense", "owl"): "8425d7dd42baf238",
    ("translation:en-sw", "sparsegpt", 0.5, "unstructured", "dense", "uniform"): "60c0d5cf3970b0ad",
    ("mono:fr", "magnitude", 0.5, "unstructured", "dense", "owl"): "36ee4687a0ea05ca",
    (
        "mix:mono:de=0.334,mono:en=0.333,mono:fr=0.333",
        *("inverse-wanda", 0.1, "unstructured", "sequential", "uniform"),
    ): "ec71e365a79d421f",
}


@pytest.mark.parametrize(("values", "key"), KEYS.items())
def test_variants_keep_their_keys(values: Any, key: str) -> None:
    assert parse_variant(*values).key == key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("quickstart", "134d2cf7a07c8b67"),
        ("paper-demo", "b5e88cecaa26627b"),
        ("paper-bloom-3b", "c7539cc02a3051ac"),
    ],
)
def test_specs_keep_their_keys(name: str, key: str) -> None:
    assert load_spec(name).key == key
