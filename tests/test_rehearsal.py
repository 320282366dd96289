"""Scale on a small machine: measured against planned memory, a deep model in many shards, a model too large."""

from pathlib import Path
from typing import Any

import pytest

from mlprune.errors import ModelError
from mlprune.spec.loading import parse_spec
from mlprune.spec.schema import SweepSpec
from mlprune.storage.results import Result
from mlprune.sweep.grid import variants_of
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.ranking import SweepOutcome
from mlprune.sweep.session import open_replicas
from mlprune.sweep.sweep import run_sweep
from mlprune.sweep.trial import run_dense, run_trial
from tests.tiny_models import config, save
from tests.work import needs_libaio, opened

MIB = 2**20
Run = tuple[Prepared, list[Result], list[int]]
ZERO = [
    {"residency": "zero", "offload": "cpu"},
    pytest.param({"residency": "zero", "offload": "nvme"}, marks=needs_libaio),
]


def spec(storage: Path, model: str, lines: int, **pipeline: Any) -> SweepSpec:
    return parse_spec(
        {
            "name": "rehearsal",
            "model": {"path": model},
            "pipeline": pipeline,
            "calibration": {"samples": 8, "shots": 1, "max_tokens": 128},
            "search": {
                "calibration": ["translation:en-fr"],
                "score": ["wanda"],
                "sparsity": [0.5],
                "propagation": ["dense", "sequential"],
            },
            "evaluation": {"perplexity": {"languages": ["en", "fr"], "lines": lines}},
            "storage": str(storage),
        }
    )


def checked(asked: SweepSpec) -> Prepared:
    return prepare(asked, variants_of(asked.search))


def run(prepared: Prepared) -> tuple[list[Result], list[int]]:
    """A sweep's work over real actors: results, and the peak of each shard's worker."""
    variants = variants_of(prepared.spec.search)
    with open_replicas(prepared) as replicas:
        (pipeline,) = replicas.pipelines
        results = [run_dense(prepared, pipeline, prepared.suite)[0]]
        gather_moments(prepared, pipeline, variants)
        results += [run_trial(prepared, pipeline, variant, prepared.suite)[0] for variant in variants]
        return results, pipeline.peak_bytes()


def numbers(results: Any) -> dict[str, Any]:
    """What must not depend on how the model is held: all but the times; losses follow from the rest."""
    kept = [
        (r.key, r.digest, {k: v for k, v in r.metrics.items() if not k.startswith(("seconds", "loss"))})
        for r in results
    ]
    return {key: rest for key, *rest in kept}


# the demo model: plans that can be believed


@pytest.fixture(scope="module")
def resident(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Prepared, list[Result], list[int]]:
    prepared = checked(demo(tmp_path_factory.mktemp("resident")))
    return prepared, *run(prepared)


def demo(storage: Path, **pipeline: Any) -> SweepSpec:
    return spec(storage, "demo", 16, **pipeline)


def check_peaks(prepared: Prepared, peaks: list[int]) -> None:
    planned = [need.total for need in prepared.plan.memory]
    for need, peak in zip(planned, peaks, strict=True):
        assert need == pytest.approx(peak, rel=0.15), (planned, peaks)


def test_a_resident_worker_uses_the_planned_memory(resident: Run) -> None:
    prepared, _, peaks = resident
    check_peaks(prepared, peaks)
    assert prepared.plan.reason == ""


@pytest.mark.parametrize("pipeline", ZERO, ids=str)
def test_zero_uses_the_planned_memory_with_identical_results(
    pipeline: dict[str, Any], resident: Run, tmp_path: Path
) -> None:
    prepared = checked(demo(tmp_path, **pipeline))
    results, peaks = run(prepared)
    assert numbers(results) == numbers(resident[1])
    check_peaks(prepared, peaks)


@pytest.mark.usefixtures("ray_cluster")
def test_shards_use_the_planned_memory(tmp_path: Path) -> None:
    prepared = checked(demo(tmp_path, shards=2))
    check_peaks(prepared, run(prepared)[1])


# the depth of a 70B model, its vocabulary for its width, and its grouped heads; the width made small


@pytest.mark.usefixtures("ray_cluster")
def test_eighty_layers_in_eight_shards(tmp_path: Path) -> None:
    small = config(
        "llama",
        num_hidden_layers=80,
        hidden_size=64,
        intermediate_size=224,
        num_attention_heads=8,
        num_key_value_heads=1,
        vocab_size=1002,
    )
    model = str(save(small, tmp_path / "model").folder)
    outcome: SweepOutcome = run_sweep(spec(tmp_path / "eight", model, 6, shards=8))
    assert not outcome.failed
    assert len(outcome.ranking) == 2
    one = checked(spec(tmp_path / "one", model, 6))
    variants = variants_of(one.spec.search)
    with opened(one) as pipeline:
        gather_moments(one, pipeline, variants)
        alone = [
            run_dense(one, pipeline, one.suite)[0],
            *(run_trial(one, pipeline, variant, one.suite)[0] for variant in variants),
        ]
    assert numbers([outcome.dense, *(seed for entry in outcome.ranking for seed in entry.seeds)]) == numbers(alone)


# too big for a worker


@needs_libaio
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_too_large_for_a_worker_is_offloaded_to_disk_or_refused(tmp_path: Path) -> None:
    wide = config("llama", num_hidden_layers=48, hidden_size=512, intermediate_size=1792, num_attention_heads=8)
    model = str(save(wide, tmp_path / "model").folder)
    limit = {"worker_memory": "900MiB"}
    with pytest.raises(ModelError, match=r"pipeline.residency: resident: .* 900 MiB per worker; take auto"):
        checked(spec(tmp_path, model, 4, residency="resident", **limit))
    prepared = checked(spec(tmp_path, model, 4, **limit))
    assert str(prepared.plan.residency) == "zero/nvme"
    results, peaks = run(prepared)
    assert max(peaks) < 900 * MIB
    assert len(results) == 3
    assert not list(prepared.spec.offload_folder.glob("shard-*")), "nothing is left on the disk"
