"""`mlprune evaluate`: the metrics of a model as it is, pruned or not. Trials are evaluated in `sweep/trial.py`."""

from __future__ import annotations

from collections.abc import Mapping

from mlprune.console import step
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.schema import SweepSpec
from mlprune.storage.results import Result
from mlprune.sweep.prepare import prepare
from mlprune.sweep.session import run_on_model
from mlprune.sweep.trial import run_dense


def evaluate_checkpoint(spec: SweepSpec) -> Mapping[str, float]:
    """Return the metrics of the spec's model."""
    prepared = prepare(spec, [])

    def evaluate(pipeline: Pipeline) -> Result:
        with step("evaluating", "batches") as progress:
            return run_dense(prepared, pipeline, prepared.suite, progress)[0]

    result = run_on_model(prepared, "evaluating", evaluate)
    # this sparsity is what mlprune dropped in this run: nothing, whatever the checkpoint's sparsity is
    return {name: value for name, value in result.metrics.items() if name != "sparsity.actual"}
