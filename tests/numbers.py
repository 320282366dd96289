"""The numbers of a sweep that must be the same wherever it ran and however often it was interrupted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlprune.evaluation.loss import loss_metrics
from mlprune.spec.loading import load_spec
from mlprune.sweep.grid import variants_of
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.prepare import prepare
from mlprune.sweep.session import open_local
from mlprune.sweep.trial import run_dense, run_trial

Numbers = Mapping[str, tuple[str, Mapping[str, float]]]  # a variant -> the digest of its masks, and metrics


def numbers(outcome: Mapping[str, Any]) -> Numbers:
    """Return the part of `mlprune sweep --json` that must not depend on when and where a trial ran."""
    results = (outcome["dense"], *outcome["ranking"])
    return {json.dumps(result["variant"]): (result["masks"], _lasting(result["metrics"])) for result in results}


def plain_numbers(spec: Path) -> Numbers:
    """Run the same sweep in this process, without Ray, shards or replicas, and return its numbers."""
    plain = load_spec(str(spec), ["pipeline.shards=1", f"storage={spec.parent / 'plain'}"])
    variants = variants_of(plain.search)
    prepared = prepare(plain, variants)
    with open_local(prepared) as pipeline:
        results = [run_dense(prepared, pipeline, prepared.suite)[0]]
        gather_moments(prepared, pipeline, variants)
        results += [run_trial(prepared, pipeline, variant, prepared.suite)[0] for variant in variants]
    dense, *trials = results
    losses = {result.key: loss_metrics(result.metrics, dense.metrics) for result in trials}
    return {
        json.dumps(result.variant.to_dict() if result.variant else None): (
            result.digest,
            _lasting({**result.metrics, **losses.get(result.key, {})}),
        )
        for result in results
    }


def _lasting(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("seconds")}
