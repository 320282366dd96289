"""A store that an earlier version wrote: its moments are used, its results are readable, variants keep their keys.

`tests/data/store-2` was written by mlprune 0.1.0 (store format 2) for the tiny model beside it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlprune.data.corpora import SAMPLE
from mlprune.evaluation.items import from_json, metrics_of
from mlprune.spec.loading import load_spec, parse_spec
from mlprune.spec.variants import Allocation, Propagation, Variant
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.plan import SweepPlan, plan_sweep
from mlprune.sweep.session import open_local

STORED = Path(__file__).parent / "data" / "store-2"


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepPlan:
    """Plan the sweep with the text that it had: the first 600 lines of what is the sample today."""
    shutil.copytree(STORED, tmp_path / "stored")
    (tmp_path / "stored" / "text").mkdir()
    for name in ("en.txt", "fr.txt", "DOCUMENT_IDS.tsv"):
        lines = (SAMPLE / name).read_text(encoding="utf-8").split("\n")[:600]
        (tmp_path / "stored" / "text" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "stored")
    return plan_sweep(load_spec("sweep.yaml", ["calibration.corpus=text"]))


def test_moments_are_not_gathered_again(plan: SweepPlan) -> None:
    """Trials run again, because they are evaluated on other lines than that version chose."""
    assert len(plan.variants) == 13
    assert plan.passes["calibration"] == 1, "the text of the forecast for French is new"


def test_results_and_items_are_read_as_they_were_written(plan: SweepPlan) -> None:
    outcomes = json.loads((STORED / "outcome.json").read_text())
    stored = {_text(one["variant"]): one for one in outcomes}
    store = plan.prepared.result_store()
    results = [store.load(file.stem) for file in (STORED / "store" / "results").iterdir()]
    assert len(stored) == len(results) == 14
    for result in results:
        assert result is not None
        variant = result.variant and {
            k: v for k, v in result.variant.to_dict().items() if k not in ("seed", "repair")
        }
        expected = stored[_text(variant)]
        assert {name: result.metrics[name] for name in expected["metrics"]} == expected["metrics"]
        assert result.digest == expected["masks"]
        metrics = metrics_of(from_json(store.items(result.key)))
        assert {name: result.metrics[name] for name in metrics} == metrics


def test_masks_are_those_of_the_earlier_version(plan: SweepPlan) -> None:
    """Masks made from the stored moments have the digests that were stored with the results."""
    outcomes = json.loads((STORED / "outcome.json").read_text())
    digests = {_text(one["variant"]): one["masks"] for one in outcomes if one["variant"]}
    with open_local(plan.prepared) as pipeline:
        gather_moments(plan.prepared, pipeline, plan.variants)
        for variant in plan.variants:
            if variant.allocation == "owl":
                continue  # its total was rounded down in every row, and is exact today
            assert make_masks(plan.prepared, pipeline, variant).digest == digests[_text(as_written(variant))]
            pipeline.release(variant.key)


def as_written(variant: Variant) -> dict[str, object]:
    """Return the values that the earlier version had."""
    return {name: value for name, value in variant.to_dict().items() if name not in ("seed", "repair")}


def _text(variant: object) -> str:
    return json.dumps(variant, sort_keys=True)


def test_moments_are_read_and_intact(plan: SweepPlan) -> None:
    store = plan.prepared.moment_store()
    read = {str(part) for variant in plan.variants for part in variant.demonstrations}
    keys = [plan.prepared.set_of(name).key for name in read]
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


def test_a_spec_keeps_its_key() -> None:
    """A sweep that a later version resumes continues its run in MLflow; new keys of the spec have no influence."""
    search = {"calibration": ["mono:en"], "score": ["wanda"], "sparsity": [0.5]}
    assert parse_spec({"name": "kept", "search": search}).key == "2cc4a7f0f752c4c0"
