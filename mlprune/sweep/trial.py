"""Runs one trial, or the dense model, on an open pipeline: metrics and evaluated items are the result.

It neither stores results nor knows Ray Tune: `sweep` and `tune_runner` do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from mlprune.errors import ModelError
from mlprune.evaluation.consistency import consistency
from mlprune.evaluation.items import Items, metrics_of, to_json
from mlprune.evaluation.suite import Suite
from mlprune.shards.pipeline import Pipeline, Progress
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.masks import make_masks
from mlprune.sweep.prepare import Prepared


def run_trial(
    prepared: Prepared,
    pipeline: Pipeline,
    variant: Variant,
    suite: Suite,
    report: Callable[[Mapping[str, float]], None] = lambda _: None,
) -> tuple[Result, str]:
    """Make masks, run the suite, release the masks; return the result and the evaluated items as JSON.

    `report` is called with the metrics so far when the masks are made.
    """
    started, finished = time.monotonic(), False
    keep = prepared.plan.kept_masks > 0
    try:
        reused = pipeline.reuse(variant.key) if keep else None
        outcome = reused or make_masks(prepared, pipeline, variant, forecast=True)
        metrics = {
            "sparsity.actual": outcome.sparsity,
            **forecast_metrics(outcome.forecast),
            "seconds.mask": time.monotonic() - started,
        }
        report(metrics)
        masked = time.monotonic()
        items = suite.run(pipeline, variant.key)
        finished = True
    finally:
        pipeline.release(variant.key, keep=keep and finished)
    metrics |= {**trial_metrics(items), "seconds.evaluate": time.monotonic() - masked}
    result = Result(prepared.result_key(variant, suite), variant, metrics, outcome.digest, outcome.unseen)
    return result, to_json(items)


def trial_metrics(items: Sequence[Items]) -> dict[str, float]:
    """Return all metrics of the evaluated items: of each task, and how far languages agree. No items, no metrics.

    The mean over languages is there twice. Once it is called `bits_per_byte`, which sorts before all other names:
    MLflow's parallel coordinates page begins with the first metric of a run.
    """
    if not items:
        return {}
    metrics = metrics_of(items)
    return {"bits_per_byte": metrics["bits_per_byte.mean"], **metrics, **consistency(items)}


def forecast_metrics(by_language: Mapping[str, float]) -> dict[str, float]:
    """Return the forecast of each language, their mean and the largest: the worst."""
    values = by_language.values()
    named = {f"forecast.{language}": value for language, value in by_language.items()}
    worst = max(values, key=lambda value: (math.isnan(value), value))  # NaN is the worst
    return {**named, "forecast.mean": fmean(values), "forecast.worst": worst}


def unseen_warning(unseen: tuple[str, ...]) -> str:
    """Return the warning for expert matrices that no calibration token reached."""
    return (
        f"no calibration token reached {len(unseen)} expert matrices ({unseen[0]}, ...): scored by |W| alone; "
        "raise calibration.samples"
    )


def run_dense(
    prepared: Prepared, pipeline: Pipeline, suite: Suite, progress: Progress | None = None
) -> tuple[Result, str]:
    """Evaluate the dense model, the baseline, in the same way; return the result and the items as JSON."""
    started = time.monotonic()
    items = suite.run(pipeline, None, progress)
    metrics = trial_metrics(items)
    if not math.isfinite(metrics["bits_per_byte.mean"]):
        remedy = "the dense model's own likelihood is not finite; load it in float32, or check its weights"
        raise ModelError("model.dtype", prepared.spec.model.dtype, remedy)
    metrics |= {"sparsity.actual": 0.0, "seconds.evaluate": time.monotonic() - started}
    return Result(prepared.result_key(None, suite), None, metrics), to_json(items)
