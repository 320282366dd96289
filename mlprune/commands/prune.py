"""`mlprune prune`: one variant as a checkpoint: makes its masks and writes the model with a manifest.

The variant comes from options, or from the trial of a sweep. The files are written in `checkpoint`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlprune import __version__
from mlprune.commands.checkpoint import WrittenSize, check_output, write_checkpoint
from mlprune.commands.trim import find_vocabulary
from mlprune.console import size_text, step
from mlprune.data.corpora import Corpus
from mlprune.errors import SpecError
from mlprune.models.structures import smaller_config
from mlprune.pruning.scores import find_score
from mlprune.shards.pipeline import MaskOutcome, Pipeline
from mlprune.spec.calibrations import Calibration
from mlprune.spec.loading import apply_assignments, load_spec, parse_spec, read_values, to_assignments
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Pattern, Scoring, Variant
from mlprune.sweep.allocations import measure_model_for
from mlprune.sweep.grid import variants_of
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import run_on_model
from mlprune.sweep.trial import unseen_warning
from mlprune.tracking.lookup import load_trial_spec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VariantOptions:
    """The options that describe a variant, as text; None: option not used."""

    calibration: str | None = None
    score: str | None = None
    sparsity: float | None = None
    pattern: str | None = None
    allocation: str | None = None
    propagation: str | None = None
    repair: str | None = None


def select_variant(
    spec_name: str, options: VariantOptions, settings: Mapping[str, object], assignments: Sequence[str]
) -> tuple[SweepSpec, Variant]:
    """Load the spec, replace its search by the one variant that the options describe, and return both.

    `settings` and then `assignments` (--set) replace other keys of the spec.
    """
    search = _search(options)
    spec = load_spec(spec_name, [*to_assignments({"search": search, **settings}), *assignments])
    return spec, _only_variant(spec)


def _search(options: VariantOptions) -> dict[str, list[str] | list[float]]:
    """Check the options and return them as the `search` section of a spec."""
    score, pattern = options.score or "wanda", options.pattern or "unstructured"
    sparsity = _sparsity(options.sparsity, Pattern.parse(pattern, "--pattern"))
    rule = find_score(Scoring.parse(score, "--score").name, "--score")
    if rule.sides == 1 and options.calibration is None:
        raise SpecError("--calibration", None, f"{score} needs it; write e.g. --calibration translation:en-fr")
    if options.calibration is not None:
        Calibration.parse(options.calibration, "--calibration")
    return {
        "calibration": [options.calibration] if options.calibration else [],
        "score": [score],
        "sparsity": [sparsity],
        "pattern": [pattern],
        "propagation": [options.propagation or "sequential"],
        "allocation": [options.allocation or "uniform"],
        "repair": [options.repair or "none"],
    }


def _sparsity(requested: float | None, pattern: Pattern) -> float:
    if pattern.sparsity is None:
        if requested is None:
            raise SpecError("--sparsity", None, "missing; give the share of weights to drop, e.g. --sparsity 0.5")
        return requested
    fixed = float(pattern.sparsity)
    if requested is not None and requested != pattern.sparsity:
        raise SpecError("--sparsity", requested, f"pattern {pattern} drops {fixed:g} of the weights")
    return fixed


def _only_variant(spec: SweepSpec) -> Variant:
    variants = variants_of(spec.search, spec.calibration.seed)
    if len(variants) != 1:
        raise SpecError("search", f"{len(variants)} variants", "prune writes one; put one value in each list")
    return variants[0]


def select_run(
    run_id: str, options: VariantOptions, settings: Mapping[str, object], assignments: Sequence[str]
) -> tuple[SweepSpec, Variant]:
    """Return the variant of the trial with the MLflow run `run_id`, and the spec of its sweep.

    Raises SpecError if the options describe a variant too.
    """
    for name, value in vars(options).items():
        if value is not None:
            raise SpecError(f"--{name}", repr(value), "the run determines it; leave out this option or --run")
    defaults = load_spec("quickstart", assignments)  # storage and tracking may be set by --set
    text, params = load_trial_spec(defaults.tracking_uri, run_id)
    values = read_values(text, "--run", run_id)
    if defaults.tracks_in_storage:
        values["storage"] = defaults.storage  # the spec names the folder where the storage was then
    values = apply_assignments(values, [*to_assignments(settings), *assignments])
    two_sided = "/" in params.calibration  # contrastive: both sides belong to the score
    search: dict[str, list[str] | list[float] | list[int]] = {
        "pattern": [params.pattern],
        "propagation": [params.propagation],
        "allocation": [params.allocation],
        "repair": [params.repair],
        "score": [f"{params.score}:{params.calibration}" if two_sided else params.score],
        "calibration": [] if two_sided or params.calibration == "none" else [params.calibration],
        "sparsity": [params.sparsity],
        **({} if params.seed is None else {"seed": [params.seed]}),
    }
    spec = parse_spec(values | {"search": search})
    return spec, _only_variant(spec)


@dataclass(frozen=True)
class PrunedModel:
    """A written checkpoint: the share of dropped weights, its size and the dense model's, and its manifest."""

    sparsity: float
    size: WrittenSize
    dense: WrittenSize
    manifest: dict[str, object]


def size_line(pruned: PrunedModel) -> str:
    """Return in one line how much smaller the checkpoint is."""
    if pruned.size == pruned.dense:
        return f"as large as before ({size_text(pruned.size.bytes)}): dropped weights are stored as zeros"
    before, after = (f"{one.parameters / 1e6:,.1f}" for one in (pruned.dense, pruned.size))
    sizes = f"{size_text(pruned.dense.bytes)} before, {size_text(pruned.size.bytes)} now"
    return f"{after} of {before} million parameters are left; {sizes}"


def prune(spec: SweepSpec, variant: Variant, output: Path, text: Corpus | None = None) -> PrunedModel:
    """Write `variant` of the spec's model to the new folder `output`.

    `text`: keep only the tokens that this text needs, all if None. Raises UserError for a mistake in the spec or
    the folder, before weights are loaded.
    """
    check_output(output, 0)  # report an existing folder before any other work
    prepared = prepare(spec, [variant], evaluate=False)
    check_output(output, prepared.model_size.total)
    vocabulary = find_vocabulary(prepared.source, text) if text else None
    return run_on_model(prepared, "pruning", partial(_write, prepared, variant, output, vocabulary))


def _write(
    prepared: Prepared, variant: Variant, output: Path, vocabulary: Sequence[int] | None, pipeline: Pipeline
) -> PrunedModel:
    gather_moments(prepared, pipeline, [variant])
    measure_model_for(prepared, pipeline, [variant])
    with step(f"masks: {variant.label}", "layers") as progress:
        outcome = make_masks(prepared, pipeline, variant, progress)
    if outcome.unseen:
        logger.warning(unseen_warning(outcome.unseen))
    manifest = _manifest(prepared, variant, outcome)
    pieces = len(prepared.model_size.layers) + 1
    config, removal = prepared.source.config(), prepared.recipe(variant).removal
    if removal is not None:
        config = smaller_config(config, removal.units, removal.kept)
    config.dtype = prepared.model_size.dtype
    with step(f"writing {output}", "layers") as progress:
        size = write_checkpoint(
            prepared.source,
            config,
            pipeline.weights(variant.key, removal.units if removal else None),
            manifest,
            output,
            lambda done: progress(done, pieces),
            vocabulary,
        )
    dense = WrittenSize.of_dense(prepared.model_size)
    return PrunedModel(outcome.sparsity, size, dense, {**manifest, "size": vars(size)})


def _manifest(prepared: Prepared, variant: Variant, outcome: MaskOutcome) -> dict[str, object]:
    spec, sets = prepared.spec, prepared.sets_of(variant)
    return {
        "mlprune": __version__,
        "model": {
            "path": spec.model.path,
            "fingerprint": prepared.fingerprint,
            "dtype": prepared.dtype_name,
        },
        "variant": variant.to_dict(),
        "sparsity": {
            "actual": outcome.sparsity,
            "dropped": outcome.dropped,
            "weights": outcome.weights,
            "layers": list(outcome.layers),
        },
        "masks": {"digest": outcome.digest, "unseen": list(outcome.unseen)},
        "calibration": spec.calibration.model_dump(),
        "prompts": [prompt.manifest() for calibration in sets for prompt in calibration.prompts],
    }
