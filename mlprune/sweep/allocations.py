"""How many weights each layer of a variant drops, and the measurements of the model that this needs.

A measurement is done once for a model and its texts, and stored; the arithmetic is in `mlprune.pruning`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mlprune.console import step
from mlprune.errors import ModelError, SpecError
from mlprune.evaluation.items import Items, metrics_of, to_json
from mlprune.evaluation.loss import LOSS, loss_metrics
from mlprune.pruning import agreement, outliers, spectra
from mlprune.pruning.allocation import layer_counts, linear_ratios
from mlprune.pruning.masks import uniform_count
from mlprune.pruning.scores import find_score
from mlprune.pruning.sensitivity import REFERENCES, fit_curves, split_budget
from mlprune.shards.masking import MaskRecipe
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.calibrations import Calibration
from mlprune.spec.variants import MEASURED, Scoring, Variant
from mlprune.storage.files import FORMAT
from mlprune.storage.results import Result
from mlprune.sweep.prepare import Prepared

Losses = NDArray[np.float64]


def allocate(prepared: Prepared, pipeline: Pipeline, recipe: MaskRecipe) -> tuple[int, ...]:
    """Return how many weights each layer drops; the total is that of `uniform`.

    The model has been measured if the allocation needs it (`measure_model_for`), and moments are gathered. Raises
    SpecError if a matrix would be emptied.
    """
    variant, weights = recipe.variant, prepared.model_size.pruned
    total = sum(uniform_counts(prepared, variant))
    sparsity = total / sum(weights)
    if variant.allocation in MEASURED:
        worst = variant.allocation == "sensitivity-worst"
        ratios = split_budget(fit_curves(layer_losses(prepared)), weights, sparsity, worst)
    else:
        signals, spread = _signals(prepared, pipeline, recipe)
        ratios = linear_ratios(signals, weights, sparsity, spread)
    counts = layer_counts(ratios, weights, total)
    empty = [layer for layer, (count, weight) in enumerate(zip(counts, weights, strict=True)) if count == weight]
    if empty:
        remedy = f"at sparsity {variant.sparsity} it empties layer {empty[0]}; write uniform or a lower sparsity"
        raise SpecError("search.allocation", repr(variant.allocation), remedy)
    return counts


def uniform_counts(prepared: Prepared, variant: Variant) -> list[int]:
    """Return how many weights each layer drops if all have the variant's sparsity."""
    rule, counts = find_score(variant.score.name), [0] * len(prepared.model_size.layers)
    for name, (rows, width) in prepared.model_size.shapes.items():
        counts[int(name.partition(".")[0])] += uniform_count(rows, width, variant.sparsity, rule.within)
    return counts


def _signals(prepared: Prepared, pipeline: Pipeline, recipe: MaskRecipe) -> tuple[list[float], float]:
    """Return the signal of each layer (the largest stays densest), and the spread of the sparsities."""
    match recipe.variant.allocation:
        case "owl":
            return pipeline.signals(recipe), outliers.SPREAD
        case "alpha":
            spread = 2 * spectra.EPSILON * recipe.variant.sparsity
            return [-exponent for exponent in layer_exponents(prepared)], spread
    sign = 1 if recipe.variant.allocation == "agreement" else -1
    agreements = pipeline.signals(replace(recipe, sides=(), forecasts=prepared.forecasts))
    return [sign * value for value in agreements], agreement.SPREAD


# measurements


def measure_model_for(prepared: Prepared, pipeline: Pipeline, variants: Iterable[Variant]) -> None:
    """Measure what the variants' allocations need and the storage lacks. Moments must have been gathered.

    Every evaluation is stored, so that an interrupted measurement resumes.
    """
    missing = missing_measurements(prepared, variants)
    store = prepared.result_store()
    if missing.spectra:
        with step("spectra of the layers"):
            exponents = pipeline.signals(MaskRecipe(Variant(None, Scoring("magnitude"), 0.0, allocation="alpha")))
        metrics = {f"exponent.{layer}": exponent for layer, exponent in enumerate(exponents)}
        store.save(Result(_spectra_key(prepared), None, metrics), to_json([]))
    if missing.evaluations:
        with step("losses of single pruned layers", "evaluations") as progress:
            for done, (layer, sparsity) in enumerate(missing.evaluations):
                progress(done, len(missing.evaluations))
                items = _evaluate(prepared, pipeline, layer, sparsity)
                store.save(Result(_loss_key(prepared, layer, sparsity), None, metrics_of(items)), to_json(items))


@dataclass(frozen=True)
class MissingMeasurements:
    """What has to be measured: the spectra, and layers alone pruned to a sparsity (None: the dense model)."""

    spectra: bool
    evaluations: tuple[tuple[int | None, float], ...]

    def __bool__(self) -> bool:
        return self.spectra or bool(self.evaluations)


def missing_measurements(prepared: Prepared, variants: Iterable[Variant]) -> MissingMeasurements:
    """Return what the variants' allocations need and the storage lacks."""
    allocations, store = {variant.allocation for variant in variants}, prepared.result_store()
    needed: list[tuple[int | None, float]] = []
    if allocations & set(MEASURED):
        layers = range(len(prepared.model_size.layers))
        needed = [(None, 0.0), *((layer, sparsity) for sparsity in REFERENCES for layer in layers)]
    evaluations = tuple(one for one in needed if store.load(_loss_key(prepared, *one)) is None)
    return MissingMeasurements("alpha" in allocations and store.load(_spectra_key(prepared)) is None, evaluations)


def layer_exponents(prepared: Prepared) -> list[float]:
    """Return the mean exponent of the spectra of each layer, which has been measured."""
    result = prepared.result_store().load(_spectra_key(prepared))
    assert result is not None, "the spectra are measured before the trials"
    return [result.metrics[f"exponent.{layer}"] for layer in range(len(prepared.model_size.layers))]


def _evaluate(prepared: Prepared, pipeline: Pipeline, layer: int | None, sparsity: float) -> list[Items]:
    assert prepared.measuring is not None
    if layer is None:
        return prepared.measuring.run(pipeline)
    variant = reference_variant(prepared, sparsity)
    counts = uniform_counts(prepared, variant)
    alone = tuple(count if index == layer else 0 for index, count in enumerate(counts))
    pipeline.prune(replace(prepared.recipe(variant), dropped=alone))
    try:
        return prepared.measuring.run(pipeline, variant.key)
    finally:
        pipeline.release(variant.key)


def reference_variant(prepared: Prepared, sparsity: float) -> Variant:
    """Return the variant by which layers are measured: Wanda on all languages' monolingual text in equal parts."""
    languages = prepared.spec.evaluation.perplexity.languages
    text = Calibration.parse("mix:" + ",".join(f"mono:{code}" for code in languages))
    return Variant(text, Scoring("wanda"), sparsity, seed=prepared.spec.calibration.seed)


def layer_losses(prepared: Prepared) -> Losses:
    """Return the measured relative losses of single pruned layers: [reference sparsities, layers, languages].

    Raises ModelError where one is not finite.
    """
    languages = prepared.spec.evaluation.perplexity.languages
    dense = _metrics(prepared, None, 0.0)
    losses = np.empty((len(REFERENCES), len(prepared.model_size.layers), len(languages)))
    for number, sparsity in enumerate(REFERENCES):
        for layer in range(losses.shape[1]):
            metrics = loss_metrics(_metrics(prepared, layer, sparsity), dense)
            losses[number, layer] = [metrics[f"{LOSS}{code}"] for code in languages]
            if not np.isfinite(losses[number, layer]).all():
                remedy = f"pruned to {sparsity} alone, the loss is not finite; load the model in float32"
                raise ModelError("model.dtype", f"layer {layer}", remedy)
    return losses


def _metrics(prepared: Prepared, layer: int | None, sparsity: float) -> dict[str, float]:
    result = prepared.result_store().load(_loss_key(prepared, layer, sparsity))
    assert result is not None, "layers are measured before the trials"
    return dict(result.metrics)


def _spectra_key(prepared: Prepared) -> str:
    return _key(prepared, "spectra")


def _loss_key(prepared: Prepared, layer: int | None, sparsity: float) -> str:
    assert prepared.measuring is not None
    texts = [f"{code}={key}" for code, key in prepared.forecasts]
    return _key(prepared, "layer", str(layer), str(sparsity), prepared.measuring.key, *texts)


def _key(prepared: Prepared, *content: str) -> str:
    text = " ".join([FORMAT, prepared.fingerprint, str(prepared.model_size.dtype), *content])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
