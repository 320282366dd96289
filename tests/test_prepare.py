"""What is known before weights are loaded: which variants are one trial, and what a result key depends on."""

from pathlib import Path
from typing import Any

import pytest

from mlprune.models.source import ModelSource
from mlprune.spec.loading import parse_spec
from mlprune.spec.schema import ModelSpec
from mlprune.spec.variants import Variant
from mlprune.sweep.grid import parse_variant, variants_of
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.stage import MASKS_ONLY
from tests.tiny_models import config, save, source
from tests.work import MIXED, RANDOM, WANDA, ready, seeded


def test_variants_with_the_same_masks_are_one_trial() -> None:
    search = {
        "calibration": ["mono:en", "mix:mono:en=1", "mix:mono:fr=0.5,mono:en=0.5", "mix:mono:en=0.50,mono:fr=.5"],
        "score": ["magnitude", "wanda"],
        "sparsity": [0.5, 0.25],
        "pattern": ["unstructured", "2:4"],
        "propagation": ["dense", "sequential"],
    }
    variants = variants_of(parse_spec({"search": search}).search)
    magnitude = {(str(v.pattern), v.sparsity) for v in variants if v.score.name == "magnitude"}
    assert magnitude == {("unstructured", 0.5), ("unstructured", 0.25), ("2:4", 0.5)}
    wanda = [v for v in variants if v.score.name == "wanda"]
    assert len(wanda) == 2 * 2 * 3  # two different calibrations, two propagations
    assert len(variants) == 3 + 12
    assert parse_variant(**variants[-1].to_dict()) == variants[-1]


def key(storage: Path, variant: Variant | None, model: ModelSource | None = None, **changes: Any) -> str:
    prepared = ready(storage, model, **changes)
    return prepared.result_key(variant and seeded(variant, prepared.spec.calibration.seed))


CALIBRATION = {"samples": 24, "shots": 1, "max_tokens": 300, "seed": 0}
CHANGES: dict[str, dict[str, Any]] = {
    "lines": {"evaluation": {"perplexity": {"languages": ["en", "hi"], "lines": 19}}},
    "languages": {"evaluation": {"perplexity": {"languages": ["hi", "en"], "lines": 20}}},
    "samples": {"calibration": {**CALIBRATION, "samples": 23}},
    "shots": {"calibration": {**CALIBRATION, "shots": 2}},
    "tokens": {"calibration": {**CALIBRATION, "max_tokens": 299}},
    "seed": {"calibration": {**CALIBRATION, "seed": 4}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_key_depends_on_all_inputs(change: str, tmp_path: Path) -> None:
    assert key(tmp_path, WANDA) == key(tmp_path / "elsewhere", WANDA, shards=3)
    assert key(tmp_path, WANDA) != key(tmp_path, WANDA, **CHANGES[change])


def test_another_dtype_has_another_key(tmp_path: Path) -> None:
    prepared = ready(tmp_path)
    spec = prepared.spec.model_copy(update={"model": ModelSpec(path=str(source().folder), dtype="bfloat16")})
    assert prepare(spec, [WANDA]).result_key(WANDA) != prepared.result_key(WANDA)


def test_the_dense_model_does_not_depend_on_calibration(tmp_path: Path) -> None:
    assert key(tmp_path, None) == key(tmp_path, None, **CHANGES["samples"])
    assert key(tmp_path, None) != key(tmp_path, None, **CHANGES["lines"])


def test_random_scores_depend_on_the_seed_though_they_need_no_text(tmp_path: Path) -> None:
    assert key(tmp_path, RANDOM) == key(tmp_path, RANDOM, **CHANGES["samples"])
    assert key(tmp_path, RANDOM) != key(tmp_path, RANDOM, **CHANGES["seed"])


def test_masks_without_tasks_are_stored_with_the_texts_of_their_forecasts(tmp_path: Path) -> None:
    """Otherwise a sweep in other languages would be screened by the forecasts of an earlier one."""

    def screening_key(**changes: Any) -> str:
        return ready(tmp_path, **changes).result_key(seeded(RANDOM, 0), MASKS_ONLY)

    for change in ("languages", "samples", "seed"):
        assert screening_key(**CHANGES[change]) != screening_key(), change
    assert screening_key(**CHANGES["lines"]) == screening_key()


def test_another_model_has_another_key(tmp_path: Path) -> None:
    other = save(config("llama", rope_theta=500.0), tmp_path / "model")  # the same weights
    assert key(tmp_path, WANDA) != key(tmp_path, WANDA, other)


def test_a_mixtures_weights_are_part_of_its_key(tmp_path: Path) -> None:
    prepared: Prepared = ready(tmp_path)
    other = parse_variant("mix:translation:en-fr=0.26,mono:hi=0.74", "wanda", 0.3, "unstructured", "dense")
    assert prepared.result_key(MIXED) != prepared.result_key(other)
    assert len({prepared.result_key(variant) for variant in (WANDA, RANDOM, MIXED, None)}) == 4
