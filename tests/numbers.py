"""What a sweep's outcome must be, wherever and however often interrupted it ran."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlprune.spec.loading import load_spec
from mlprune.sweep.grid import variants_of
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.prepare import prepare
from mlprune.sweep.session import open_local
from mlprune.sweep.trial import run_dense, run_trial

Numbers = Mapping[str, tuple[str, Mapping[str, float]]]  # a variant -> the digest of its masks, and metrics


def numbers(outcome: Mapping[str, Any]) -> Numbers:
    """Of what `mlprune sweep --json` says, all that must not depend on when and where a trial ran."""
    told = (outcome["dense"], *outcome["ranking"])
    return {json.dumps(one["variant"]): (one["masks"], _lasting(one["metrics"])) for one in told}


def plain_numbers(spec: Path) -> Numbers:
    """The same sweep without Ray, shards or replicas, in this process."""
    asked = load_spec(str(spec), ["pipeline.shards=1", f"storage={spec.parent / 'plain'}"])
    variants = variants_of(asked.search)
    prepared = prepare(asked, variants)
    with open_local(prepared) as pipeline:
        results = [run_dense(prepared, pipeline)[0]]
        gather_moments(prepared, pipeline, variants)
        results += [run_trial(prepared, pipeline, variant)[0] for variant in variants]
    return {
        json.dumps(one.variant.to_dict() if one.variant else None): (one.digest, _lasting(one.metrics))
        for one in results
    }


def _lasting(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("seconds")}
