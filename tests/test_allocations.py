"""Allocations of whole models: exact totals, measurements that are stored, resumed and independent of shards."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch

from mlprune.commands.prune import prune
from mlprune.errors import SpecError
from mlprune.models.matrices import matrices
from mlprune.pruning import agreement, allocation, sensitivity, spectra
from mlprune.shards.pipeline import LocalPipeline, MaskOutcome, Pipeline
from mlprune.spec.loading import parse_spec
from mlprune.spec.variants import Allocation, Variant
from mlprune.storage.files import Storage
from mlprune.storage.results import ResultStore
from mlprune.sweep.allocations import (
    allocate,
    layer_exponents,
    layer_losses,
    measure_model_for,
    missing_measurements,
    reference_variant,
    uniform_counts,
)
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.trial import run_dense, run_trial
from tests.tiny_models import source
from tests.work import masks_of, opened

ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
LAYERS = 4


def variant(allocation: str, score: str = "wanda", sparsity: float = 0.5, propagation: Any = "dense") -> Variant:
    text = None if score.startswith("contrastive") else "mono:hi"
    return parse_variant(text, score, sparsity, "unstructured", propagation, cast(Allocation, allocation))


def prepared_for(
    folder: Path,
    variants: list[Variant],
    family: str = "llama",
    shards: int = 1,
    languages: tuple[str, ...] = ("en", "hi"),
    evaluate: bool = True,
) -> Prepared:
    spec = parse_spec(
        {
            "model": {"path": str(source(family).folder)},
            "pipeline": {"shards": shards},
            "calibration": {"samples": 6, "shots": 1, "max_tokens": 100},
            "search": {"calibration": ["mono:hi"], "score": ["wanda"], "sparsity": [0.5]},
            "evaluation": {"perplexity": {"languages": languages, "lines": 4, "confirmation_lines": 0}},
            "storage": str(folder),
        }
    )
    return prepare(spec, variants, evaluate)


def masked(prepared: Prepared, pipeline: Pipeline, variants: list[Variant]) -> list[MaskOutcome]:
    gather_moments(prepared, pipeline, variants)
    measure_model_for(prepared, pipeline, variants)
    return [make_masks(prepared, pipeline, one, forecast=True) for one in variants]


@pytest.mark.parametrize("score", ["wanda", "ria", "magnitude", "sparsegpt", "contrastive:mono:hi/mono:en"])
def test_every_allocation_drops_as_many_weights_as_uniform(score: str, tmp_path: Path) -> None:
    """0.37 of 32 and of 48 inputs is no whole number, so rows and layers are rounded."""
    variants = [variant(one, score, 0.37) for one in ALLOCATIONS]
    prepared = prepared_for(tmp_path, variants)
    with opened(prepared) as pipeline:
        uniform, *others = masked(prepared, pipeline, variants)
    digests = {one.allocation: outcome.digest for one, outcome in zip(variants[1:], others, strict=True)}
    digests.pop("sensitivity-worst")  # of two layers, both languages may spare the same one as far as they can
    assert len(set(digests.values())) == len(digests)
    for outcome in others:
        assert (outcome.dropped, outcome.weights) == (uniform.dropped, uniform.weights)
        assert len(set(outcome.layers)) > 1
        assert all(0 <= share <= 0.99 for share in outcome.layers)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_totals_are_exact_for_experts_and_transposed_matrices(family: str, tmp_path: Path) -> None:
    variants = [variant(one) for one in ALLOCATIONS]
    prepared = prepared_for(tmp_path, variants, family)
    with opened(prepared) as pipeline:
        outcomes = masked(prepared, pipeline, variants)
        zeros = [
            sum(int((weight == 0).sum()) for weight in masks_of(prepared, pipeline, one).values())
            for one in variants
        ]
        dense = sum(int((w == 0).sum()) for piece in pipeline.weights(None) for w in piece.values())
    assert {outcome.dropped for outcome in outcomes} == {outcomes[0].dropped}
    assert {count - dense for count in zeros} == {outcomes[0].dropped}


def test_sequential_pruning_has_the_same_total(tmp_path: Path) -> None:
    variants = [variant(one, propagation="sequential") for one in ALLOCATIONS]
    prepared = prepared_for(tmp_path, variants)
    with opened(prepared) as pipeline:
        outcomes = masked(prepared, pipeline, variants)
    assert len({outcome.dropped for outcome in outcomes}) == 1


def test_results_do_not_depend_on_shards(tmp_path: Path) -> None:
    variants = [variant(one) for one in ALLOCATIONS]
    outcomes, losses = [], []
    for shards in (1, 3):
        prepared = prepared_for(tmp_path / str(shards), variants, shards=shards)
        with opened(prepared) as pipeline:
            outcomes.append(masked(prepared, pipeline, variants))
            losses.append(layer_losses(prepared).tobytes())
    assert outcomes[0] == outcomes[1]
    assert losses[0] == losses[1]


def test_losses_are_those_of_the_model_with_one_pruned_layer(tmp_path: Path) -> None:
    """Held to plain pruning: all other layers get their dense weights back by hand."""
    one = variant("sensitivity-worst")
    prepared = prepared_for(tmp_path, [one])
    assert prepared.measuring is not None
    with opened(prepared) as pipeline:
        masked(prepared, pipeline, [one])
        losses = layer_losses(prepared)
        assert isinstance(pipeline, LocalPipeline)
        (worker,) = pipeline._workers
        reference = reference_variant(prepared, sensitivity.REFERENCES[0])
        pipeline.prune(prepared.recipe(reference))
        dense = run_dense(prepared, pipeline, prepared.measuring)[0].metrics
        with worker._residency.borrow(2) as layer:
            for name, matrix in matrices(layer).items():
                mask = worker._masks[reference.key][2][name]
                mask.apply_(matrix.view_OI(layer.get_parameter(matrix.parameter).data))
        pruned = run_dense(prepared, pipeline, prepared.measuring)[0].metrics
    for number, code in enumerate(("en", "hi")):
        expected = pruned[f"bits_per_byte.{code}"] / dense[f"bits_per_byte.{code}"] - 1
        assert losses[0, 2, number] == pytest.approx(expected, abs=1e-12)
    assert losses.shape == (2, LAYERS, 2)


def test_an_interrupted_measurement_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = variant("sensitivity-mean")
    prepared = prepared_for(tmp_path, [one])
    evaluated: list[str | None] = []
    whole = LocalPipeline.likelihood

    def dying(self: Any, rows: Any, key: str | None = None, progress: Any = None) -> list[float]:
        if len(evaluated) == 4:
            raise KeyboardInterrupt
        evaluated.append(key)
        return whole(self, rows, key, progress)

    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [one])
        assert len(missing_measurements(prepared, [one]).evaluations) == 1 + 2 * LAYERS
        monkeypatch.setattr(LocalPipeline, "likelihood", dying)
        with pytest.raises(KeyboardInterrupt):
            measure_model_for(prepared, pipeline, [one])
        assert len(missing_measurements(prepared, [one]).evaluations) == 2 * LAYERS - 3
        assert not pipeline._workers[0]._masks  # type: ignore[attr-defined]
        monkeypatch.setattr(LocalPipeline, "likelihood", whole)
        measure_model_for(prepared, pipeline, [one])
        assert not missing_measurements(prepared, [one, variant("sensitivity-worst")])
        resumed = layer_losses(prepared)
        monkeypatch.delattr(LocalPipeline, "likelihood")  # nothing is measured again
        measure_model_for(prepared, pipeline, [one])
    fresh = prepared_for(tmp_path / "other", [one])
    monkeypatch.setattr(LocalPipeline, "likelihood", whole)
    with opened(fresh) as pipeline:
        masked(fresh, pipeline, [one])
        assert layer_losses(fresh).tobytes() == resumed.tobytes()


def test_spectra_are_computed_once_and_without_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = variant("alpha", "magnitude")
    assert one.calibration is None
    prepared = prepared_for(tmp_path, [one], evaluate=False)
    assert not prepared.sets
    with opened(prepared) as pipeline:
        measure_model_for(prepared, pipeline, [one])
        monkeypatch.setattr(spectra, "tail_exponent", None)
        measure_model_for(prepared, pipeline, [one])
        outcome = make_masks(prepared, pipeline, one)
        dense = {name: data for piece in pipeline.weights(None) for name, data in piece.items()}
    monkeypatch.undo()
    for layer, exponent in enumerate(layer_exponents(prepared)):
        weights = [data for name, data in dense.items() if f"layers.{layer}." in name and "proj" in name]
        assert exponent == pytest.approx(spectra.layer_exponent(weights), rel=1e-9)
    # the heaviest tail stays densest, within 0.3 of the sparsity on both sides
    order = sorted(range(LAYERS), key=lambda layer: layer_exponents(prepared)[layer])
    assert sorted(range(LAYERS), key=lambda layer: outcome.layers[layer]) == order
    assert max(outcome.layers) - min(outcome.layers) == pytest.approx(2 * 0.3 * 0.5, abs=0.01)


def test_agreement_and_disagreement_are_opposite(tmp_path: Path) -> None:
    variants = [variant("agreement"), variant("disagreement")]
    prepared = prepared_for(tmp_path, variants)
    with opened(prepared) as pipeline:
        one, other = masked(prepared, pipeline, variants)
        store, signals = prepared.moment_store(), []
        for layer in range(LAYERS):
            moments = [store.load(key, layer) for _, key in prepared.forecasts]
            assert all(moments)
            norms = [{name: seen.sumsq_I for name, seen in (each or {}).items()} for each in moments]
            signals.append(
                agreement.layer_agreement(torch.stack([each[name] for each in norms]) for name in norms[0])
            )
    assert sorted(range(LAYERS), key=lambda layer: -one.layers[layer]) == sorted(
        range(LAYERS), key=lambda layer: signals[layer]
    )
    assert max(one.layers) - min(one.layers) == pytest.approx(agreement.SPREAD, abs=0.01)
    middle = (max(one.layers) + min(one.layers)) / 2
    assert statistics.fmean(one.layers) == pytest.approx(0.5, abs=1e-9)
    mirrored = [2 * middle - share for share in one.layers]
    spread = [a - b for a, b in zip(mirrored, other.layers, strict=True)]
    assert max(spread) - min(spread) < 0.005


def test_a_layer_that_drops_nothing_has_no_masks(tmp_path: Path) -> None:
    """Its weights stay what they were, and no energy of it is dropped."""
    one = variant("uniform")
    prepared = prepared_for(tmp_path, [one])
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [one])
        counts = uniform_counts(prepared, one)
        alone = tuple(count if layer == 1 else 0 for layer, count in enumerate(counts))
        recipe = replace(prepared.recipe(one), dropped=alone, forecasts=prepared.forecasts)
        outcome = pipeline.prune(recipe)
        weights = masks_of(prepared, pipeline, one)
        dense = {name: data for piece in pipeline.weights(None) for name, data in piece.items()}
        whole = make_masks(prepared, pipeline, one, forecast=True)
        pruned = masks_of(prepared, pipeline, one)
    assert outcome.dropped == counts[1]
    assert outcome.weights == whole.weights
    assert outcome.layers == (0.0, 0.5, 0.0, 0.0)
    for name, data in weights.items():
        assert torch.equal(data, pruned[name] if "layers.1." in name else dense[name])
    assert 0 < outcome.forecast["en"] < whole.forecast["en"]


def test_an_empty_layer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "CEILING", 1.0)
    one = variant("owl", sparsity=0.97)
    prepared = prepared_for(tmp_path, [one])
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [one])
        with pytest.raises(SpecError) as caught:
            allocate(prepared, pipeline, prepared.recipe(one))
    line = str(caught.value)
    assert line.startswith("search.allocation: 'owl': at sparsity 0.97 it empties layer ")
    assert line.endswith("; write uniform or a lower sparsity")


def test_keys_of_results_change_with_what_an_allocation_reads(tmp_path: Path) -> None:
    variants = [variant(one) for one in ALLOCATIONS]
    prepared = prepared_for(tmp_path, variants)
    other = prepared_for(tmp_path, variants, languages=("en", "fr", "hi"))
    other = replace(other, evaluation=prepared.evaluation)  # evaluated on the same lines
    same = [prepared.result_key(one) == other.result_key(one) for one in variants]
    assert dict(zip(ALLOCATIONS, same, strict=True)) == {
        "uniform": True,
        "owl": True,
        "alpha": True,
        "agreement": False,
        "disagreement": False,
        "sensitivity-mean": False,
        "sensitivity-worst": False,
    }
    assert len({prepared.result_key(one) for one in variants}) == len(variants)


def test_a_trial_and_a_checkpoint_have_the_same_masks(tmp_path: Path) -> None:
    one = variant("sensitivity-worst")
    prepared = prepared_for(tmp_path, [one])
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [one])
        measure_model_for(prepared, pipeline, [one])
        result, _ = run_trial(prepared, pipeline, one, prepared.suite)
    written = prune(prepared.spec.model_copy(update={"storage": str(tmp_path / "new")}), one, tmp_path / "pruned")
    assert cast(Any, written.manifest["masks"])["digest"] == result.digest
    assert ResultStore(Storage(str(tmp_path / "new"))).load(result.key) is None, "no trial ran there"
