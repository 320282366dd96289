"""Forecasts of damage: the share of energy that a mask drops, of one matrix and of whole models."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlprune.pruning import energy
from mlprune.pruning.energy import dropped_energy
from mlprune.spec.variants import Variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import prepare
from mlprune.sweep.trial import forecast_metrics
from tests.tiny_models import source
from tests.work import OWL, RANDOM, SEQUENTIAL, SPARSEGPT, WANDA, masks_of, opened, ready

TEXTS = {"en": "mono:en", "hi": "mono:hi"}


def plain_share(weight: Any, keep: Any, sumsq: Any) -> float:
    """The same sums in Python, one weight at a time."""
    dropped = total = 0.0
    for i, j in itertools.product(range(len(weight)), range(len(sumsq))):
        energy_ij = float(weight[i][j]) ** 2 * float(sumsq[j])
        total += energy_ij
        dropped += 0.0 if keep[i][j] else energy_ij
    return dropped / total


@pytest.mark.parametrize("block", [1, 40, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_is_that_of_a_plain_loop(
    block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "BLOCK", block)
    weight_OI = torch.randn(11, 13).to(dtype)
    keep_OI = torch.rand(11, 13) < torch.rand(1)
    sumsq_LI = torch.rand(3, 13, dtype=torch.float64) * 1e6
    before = weight_OI.clone()
    shares = dropped_energy(weight_OI, keep_OI, sumsq_LI)
    assert shares.tolist() == pytest.approx([plain_share(weight_OI, keep_OI, sumsq) for sumsq in sumsq_LI])
    assert torch.equal(weight_OI, before)


def test_a_worked_example() -> None:
    """Weights 1 2 / 3 0 on channels of 10 and 1: 10 + 4 + 90; the mask drops the 2 and the 3."""
    weight, keep = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, False], [False, True]])
    share, unreached = dropped_energy(weight, keep, torch.tensor([[10.0, 1.0], [0.0, 0.0]]).double()).tolist()
    assert share == 94 / 104
    assert math.isnan(unreached)
    assert dropped_energy(weight, torch.ones(2, 2) > 0, torch.ones(1, 2).double()).tolist() == [0]
    assert dropped_energy(weight, torch.zeros(2, 2) > 0, torch.ones(1, 2).double()).tolist() == [1]


@pytest.mark.parametrize("variant", [WANDA, SEQUENTIAL, RANDOM, OWL, SPARSEGPT], ids=str)
def test_a_forecast_is_the_mean_over_matrices_on_dense_moments(variant: Variant, tmp_path: Path) -> None:
    prepared = ready(tmp_path)
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [variant])
        outcome = make_masks(prepared, pipeline, variant, forecast=True)
        masked = masks_of(prepared, pipeline, variant)
    dense = load_file(prepared.source.folder / "model.safetensors")
    for language, text in TEXTS.items():
        shares = []
        for layer in range(4):
            moments = prepared.moment_store().load(prepared.set_of(text).key, layer)
            assert moments is not None
            for matrix, seen in moments.items():
                name = f"model.layers.{layer}.{matrix}.weight"
                shares.append(plain_share(dense[name], masked[name] != 0, seen.sumsq_I))
        assert outcome.forecast[language] == pytest.approx(sum(shares) / len(shares))
    assert outcome.forecast["en"] != outcome.forecast["hi"]
    assert list(outcome.forecast) == ["en", "hi"]


def test_an_expert_that_no_token_of_a_language_reaches_is_left_out_of_its_mean(tmp_path: Path) -> None:
    few = {"samples": 1, "shots": 1, "max_tokens": 3, "seed": 0}
    prepared = ready(tmp_path, source("qwen3_moe"), calibration=few)
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [RANDOM])
        outcome = make_masks(prepared, pipeline, RANDOM, forecast=True)
    reached = {
        text: sum(
            seen.tokens > 0
            for layer in range(4)
            for seen in (prepared.moment_store().load(prepared.set_of(text).key, layer) or {}).values()
        )
        for text in TEXTS.values()
    }
    assert all(count < 4 * (4 + 2 * 4) for count in reached.values()), "the test needs an expert without tokens"
    assert all(math.isfinite(share) and 0 < share < 1 for share in outcome.forecast.values())


def test_texts_are_calibration_sets_only_where_something_is_evaluated(tmp_path: Path) -> None:
    spec = ready(tmp_path).spec
    assert prepare(spec, [RANDOM]).sets.keys() == {(text, 0) for text in TEXTS.values()}
    assert prepare(spec, []).sets == {}  # mlprune evaluate
    alone = prepare(spec, [WANDA], evaluate=False)  # mlprune prune
    assert alone.sets.keys() == {(str(WANDA.calibration), 0)}
    with opened(alone) as pipeline:
        gather_moments(alone, pipeline, [WANDA])
        outcome = make_masks(alone, pipeline, WANDA)
    assert outcome.forecast == {}
    evaluated = prepare(spec, [WANDA])
    with opened(evaluated) as pipeline:
        gather_moments(evaluated, pipeline, [WANDA])
        forecast = make_masks(evaluated, pipeline, WANDA, forecast=True)
    assert forecast.forecast.keys() == TEXTS.keys()
    assert forecast.digest == outcome.digest


def test_forecasts_are_metrics_of_a_trial() -> None:
    assert forecast_metrics({"en": 0.25, "fr": 0.75}) == {
        "forecast.en": 0.25,
        "forecast.fr": 0.75,
        "forecast.mean": 0.5,
        "forecast.worst": 0.75,
    }
