"""One variant for good: masks, a checkpoint and its manifest; and the score of any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlprune import __version__
from mlprune.commands.checkpoint import check_output, write_checkpoint
from mlprune.console import step, warn
from mlprune.errors import SpecError
from mlprune.pruning.scores import find_score
from mlprune.shards.pipeline import MaskOutcome, Pipeline
from mlprune.spec.loading import apply_assignments, load_spec, parse_spec, read_values, to_assignments
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Calibration, Pattern, Scoring, Variant
from mlprune.storage.results import Result
from mlprune.sweep.grid import variants_of
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import run_on_model
from mlprune.sweep.trial import run_dense, unseen_note
from mlprune.tracking.lookup import load_trial_spec


def choose(
    spec_name: str, chosen: Mapping[str, Any], settings: Mapping[str, Any], assignments: Sequence[str]
) -> tuple[SweepSpec, Variant]:
    """The spec with one variant in it, as options give it (`chosen`: calibration, score, sparsity, ...)."""
    score, pattern = chosen["score"] or "wanda", chosen["pattern"] or "unstructured"
    fixed = Pattern.parse(pattern, "--pattern").sparsity
    sparsity = chosen["sparsity"]
    if sparsity is None and fixed is None:
        raise SpecError("--sparsity", None, "missing; give the share of weights to drop, e.g. --sparsity 0.5")
    if sparsity is not None and fixed is not None and sparsity != fixed:
        raise SpecError("--sparsity", sparsity, f"pattern {pattern} drops {float(fixed):g} of the weights")
    rule = find_score(Scoring.parse(score, "--score").name, "--score")
    if rule.sides == 1 and chosen["calibration"] is None:
        raise SpecError("--calibration", None, f"{score} needs it; write e.g. --calibration translation:en-fr")
    if chosen["calibration"] is not None:
        Calibration.parse(chosen["calibration"], "--calibration")
    search = {
        "calibration": [chosen["calibration"]] if chosen["calibration"] else [],
        "score": [score],
        "sparsity": [float(fixed) if sparsity is None and fixed is not None else sparsity],
        "pattern": [pattern],
        "propagation": [chosen["propagation"] or "sequential"],
        "allocation": [chosen["allocation"] or "uniform"],
    }
    spec = load_spec(spec_name, [*to_assignments({"search": search, **settings}), *assignments])
    return spec, _only_variant(spec)


def _only_variant(spec: SweepSpec) -> Variant:
    variants = variants_of(spec.search)
    if len(variants) != 1:
        raise SpecError("search", f"{len(variants)} variants", "prune writes one; give each list one value")
    return variants[0]


def choose_run(
    run_id: str, chosen: Mapping[str, Any], settings: Mapping[str, Any], assignments: Sequence[str]
) -> tuple[SweepSpec, Variant]:
    """The spec of the sweep that the MLflow run `run_id` was a trial of, and that trial's variant."""
    given = [name for name, value in chosen.items() if value is not None]
    if given:
        raise SpecError("--" + given[0], repr(chosen[given[0]]), "the run says which; leave it out, or --run")
    here = load_spec("quickstart", assignments)  # for the storage and the tracking that were set
    text, params = load_trial_spec(here.tracking_uri, run_id)
    values = apply_assignments(read_values(text, "--run", run_id), [*to_assignments(settings), *assignments])
    search: dict[str, Any] = {name: [params[name]] for name in ("pattern", "propagation", "allocation")}
    two_sided = "/" in params["calibration"]  # of contrastive: both sides belong to the score
    search |= {
        "score": [f"{params['score']}:{params['calibration']}" if two_sided else params["score"]],
        "calibration": [] if two_sided or params["calibration"] == "none" else [params["calibration"]],
        "sparsity": [float(params["sparsity"])],
    }
    spec = parse_spec(values | {"search": search})
    return spec, _only_variant(spec)


def prune(spec: SweepSpec, variant: Variant, output: Path) -> dict[str, Any]:
    """Write `variant` of the spec's model to the new folder `output`; returns the manifest.

    Raises UserError for what is wrong with the spec or the folder, before weights are loaded.
    """
    check_output(output, 0)  # a taken name is known before anything else is done
    prepared = prepare(spec, [variant], evaluate=False)
    check_output(output, prepared.model_size.total)
    return run_on_model(prepared, "pruning", partial(_write, prepared, variant, output))


def _write(prepared: Prepared, variant: Variant, output: Path, pipeline: Pipeline) -> dict[str, Any]:
    gather_moments(prepared, pipeline, [variant])
    with step(f"masks: {variant.label}", "layers") as progress:
        pruned = make_masks(prepared, pipeline, variant, progress)
    if pruned.unseen:
        warn(unseen_note(pruned.unseen))
    manifest = _manifest(prepared, variant, pruned)
    pieces = len(prepared.model_size.layers) + 1
    with step(f"writing {output}", "layers") as progress:
        write_checkpoint(
            prepared.source,
            prepared.model_size.dtype,
            pipeline.weights(variant.key),
            manifest,
            output,
            lambda done: progress(done, pieces),
        )
    return manifest


def _manifest(prepared: Prepared, variant: Variant, pruned: MaskOutcome) -> dict[str, Any]:
    spec, dtype = prepared.spec, str(prepared.model_size.dtype).removeprefix("torch.")
    return {
        "mlprune": __version__,
        "model": {"path": spec.model.path, "fingerprint": prepared.fingerprint, "dtype": dtype},
        "variant": variant.to_dict(),
        "sparsity": {
            "actual": pruned.sparsity,
            "dropped": pruned.dropped,
            "weights": pruned.weights,
            "layers": list(pruned.layers),
        },
        "masks": {"digest": pruned.digest, "unseen": list(pruned.unseen)},
        "calibration": spec.calibration.model_dump(),
        "prompts": [prompt.manifest() for made in prepared.sets_of(variant) for prompt in made.prompts],
    }


def evaluate_checkpoint(spec: SweepSpec) -> Mapping[str, float]:
    """The metrics of the spec's model as it is."""
    prepared = prepare(spec, [])

    def score(pipeline: Pipeline) -> Result:
        with step("evaluating", "batches") as progress:
            return run_dense(prepared, pipeline, progress)[0]

    found = run_on_model(prepared, "evaluating", score)
    dropped = "sparsity.actual"  # nothing was, here
    return {name: value for name, value in found.metrics.items() if name != dropped}
