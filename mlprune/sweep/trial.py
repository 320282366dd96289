"""One trial: a variant and a pipeline in, what it answered and its metrics out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from mlprune.errors import ModelError
from mlprune.evaluation.consistency import consistency
from mlprune.evaluation.items import Items, metrics_of, to_json
from mlprune.shards.pipeline import Pipeline, Progress
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.masks import make_masks
from mlprune.sweep.prepare import Prepared


def run_trial(
    prepared: Prepared,
    pipeline: Pipeline,
    variant: Variant,
    report: Callable[[Mapping[str, float]], None] = lambda _: None,
) -> tuple[Result, str]:
    """Mask, evaluate, let go of the masks: the result, and what was answered (JSON of items).

    `report` is given the metrics so far after each phase.
    """
    assert prepared.evaluation is not None
    started = time.monotonic()
    try:
        pruned = make_masks(prepared, pipeline, variant)
        so_far = {"sparsity.actual": pruned.sparsity, "seconds.mask": time.monotonic() - started}
        report(so_far)
        masked = time.monotonic()
        items = prepared.evaluation.run(pipeline, variant.key)
    finally:
        pipeline.release(variant.key)
    so_far |= {**scores_of(items), "seconds.evaluate": time.monotonic() - masked}
    key = prepared.result_key(variant)
    return Result(key, variant, so_far, pruned.digest, pruned.unseen), to_json(items)


def scores_of(items: Sequence[Items]) -> dict[str, float]:
    """All that is measured by what was answered: each task's metrics, and how far languages agree.

    The mean over languages is there twice: as `bits_per_byte`, before all others by name, because MLflow's page of
    parallel coordinates begins with the first metric of a run.
    """
    found = metrics_of(items)
    return {"bits_per_byte": found["bits_per_byte.mean"], **found, **consistency(items)}


def unseen_note(unseen: tuple[str, ...]) -> str:
    """What to tell of experts' matrices that were pruned blind."""
    return (
        f"no calibration token reached {len(unseen)} expert matrices ({unseen[0]}, ...): scored by |W| alone; "
        "raise calibration.samples"
    )


def run_dense(prepared: Prepared, pipeline: Pipeline, progress: Progress | None = None) -> tuple[Result, str]:
    """The baseline: the dense model, evaluated in the same way."""
    assert prepared.evaluation is not None
    started = time.monotonic()
    items = prepared.evaluation.run(pipeline, None, progress)
    found = scores_of(items)
    if not math.isfinite(found["bits_per_byte.mean"]):
        remedy = "the dense model's own likelihood is not finite; load it in float32, or check its weights"
        raise ModelError("model.dtype", prepared.spec.model.dtype, remedy)
    found |= {"sparsity.actual": 0.0, "seconds.evaluate": time.monotonic() - started}
    return Result(prepared.result_key(None), None, found), to_json(items)
