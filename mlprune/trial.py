"""One trial: a variant and a pipeline in, metrics out; and the form in which Ray Tune runs it."""

import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from mlprune.evaluation.perplexity import evaluate, metrics
from mlprune.prepare import Prepared, make_masks, variant_of
from mlprune.shards.pipeline import Pipeline, Progress
from mlprune.store import Result
from mlprune.variants import Variant


def run_trial(
    prepared: Prepared,
    pipeline: Pipeline,
    variant: Variant,
    report: Callable[[Mapping[str, float]], None] = lambda _: None,
) -> Result:
    """Mask, evaluate, let go of the masks. `report` is given the metrics so far after each phase."""
    assert prepared.evaluation is not None
    started = time.monotonic()
    try:
        pruned = make_masks(prepared, pipeline, variant)
        so_far = {"sparsity.actual": pruned.sparsity, "seconds.mask": time.monotonic() - started}
        report(so_far)
        masked = time.monotonic()
        scores = evaluate(pipeline, prepared.evaluation, variant.key)
    finally:
        pipeline.release(variant.key)
    so_far |= {**metrics(scores), "seconds.evaluate": time.monotonic() - masked}
    return Result(prepared.result_key(variant), variant, so_far, pruned.digest, pruned.unseen)


def unseen_note(unseen: tuple[str, ...]) -> str:
    """What to tell of experts' matrices that were pruned blind."""
    return (
        f"no calibration token reached {len(unseen)} expert matrices ({unseen[0]}, ...): scored by |W| alone; "
        "raise calibration.samples"
    )


def run_dense(prepared: Prepared, pipeline: Pipeline, progress: Progress | None = None) -> Result:
    """The baseline: the dense model, evaluated in the same way."""
    assert prepared.evaluation is not None
    started = time.monotonic()
    found = metrics(evaluate(pipeline, prepared.evaluation, None, progress))
    found |= {"sparsity.actual": 0.0, "seconds.evaluate": time.monotonic() - started}
    return Result(prepared.result_key(None), None, found)


def tune_trial(config: dict[str, Any], prepared: Prepared, pipeline: Pipeline, objective: str) -> None:
    """What Ray Tune runs: one variant, unless its result is there."""
    from ray import tune

    variant = variant_of(**config["variant"])
    store = prepared.results()
    try:
        result = store.load(prepared.result_key(variant))
        if result is None:
            result = run_trial(prepared, pipeline, variant, _under_way(prepared))
            store.save(result)
        tune.report(dict(result.metrics))
    except Exception as error:  # whatever it is, it ends this trial and not the others; the sweep reports it
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        tune.report({"cause": cause, "traceback": traceback.format_exc(), objective: float("inf")})


def _under_way(prepared: Prepared) -> Callable[[Mapping[str, float]], None]:
    """Reports what is known before a trial ends; to Optuna nothing, which wants its objective in every report."""
    from ray import tune

    if prepared.spec.search.searcher == "optuna":
        return lambda metrics: None
    return lambda metrics: tune.report(dict(metrics))
