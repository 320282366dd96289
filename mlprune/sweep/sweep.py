"""Runs a sweep: the grid of variants as trials on one model, then a ranking.

A finished trial is recognised by its result file, whose name is a content hash. So an interrupted sweep resumes
where it stopped: it runs only unfinished trials. Ray Tune's own snapshots are not used for that (they lag behind,
and are pickles): its state is temporary.
"""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from mlprune.analysis.sweep_pictures import draw_pictures
from mlprune.console import size_text, step
from mlprune.errors import SpecError, SweepError
from mlprune.evaluation.items import signatures
from mlprune.evaluation.significance import Interval
from mlprune.runtime.replicas import ReplicaGroup
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.schema import SweepSpec
from mlprune.spec.urls import redact
from mlprune.spec.variants import Variant
from mlprune.storage.files import Storage
from mlprune.storage.lock import sweep_lock
from mlprune.storage.results import Result
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.monitor import POLL_SECONDS, TRIALS_PHASE, Show, SweepMonitor
from mlprune.sweep.plan import SweepPlan, plan_sweep
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.ranking import SweepOutcome, rank_trials
from mlprune.sweep.session import open_replicas
from mlprune.sweep.trial import run_dense, unseen_warning
from mlprune.sweep.trial_progress import TrialProgress
from mlprune.sweep.tune_runner import run_trials
from mlprune.tracking.tracker import SweepTracker

MLFLOW_PATIENCE_SECONDS = 600  # for an MLflow server that is unavailable when the sweep is done
KILLED_PATIENCE_SECONDS, FAILED_PATIENCE_SECONDS = 10, 60  # when the sweep ends without an outcome
PACKAGES = (
    *("mlprune", "torch", "transformers", "ray", "mlflow", "deepspeed", "datasets", "numpy"),
    *("lm_eval", "sacrebleu", "scipy"),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialResults:
    """The results of the dense model and of all finished trials, and the causes of the failed ones."""

    dense: Result
    finished: list[Result]
    failed: dict[str, str]  # label of the trial -> cause
    nodes: list[str]  # node of each shard of the first replica; empty if nothing had to be run


def run_sweep(
    spec: SweepSpec,
    show: Show = lambda _: None,
    describe: Callable[[SweepOutcome], str] = lambda _: "",
) -> SweepOutcome:
    """Run the unfinished trials of a sweep and rank all of them.

    `show` is called every second with the sweep's status; `describe` returns the text on the sweep's MLflow page.

    Raises SweepError if no trial finishes.
    """
    plan = plan_sweep(spec)
    with sweep_lock(Storage(spec.storage), spec.key):
        return _run(plan, show, describe)


def _run(plan: SweepPlan, show: Show, describe: Callable[[SweepOutcome], str]) -> SweepOutcome:
    tracker = _start_tracking(plan.prepared)
    try:
        results = _run_unfinished(plan, tracker, show)
    except BaseException:
        tracker.finish_sweep("KILLED", {}, [])
        with contextlib.suppress(SpecError, SweepError):  # an MLflow problem must not hide why the sweep ends
            _flush(tracker, KILLED_PATIENCE_SECONDS)
        tracker.close()
        raise
    if not results.finished:
        tracker.finish_sweep("FAILED", {}, [])
        with contextlib.suppress(SweepError):
            _flush(tracker, FAILED_PATIENCE_SECONDS)
        tracker.close()
        causes = "; ".join(f"{label}: {cause}" for label, cause in results.failed.items())
        raise SweepError(f"no trial finished; {causes}")
    outcome = _conclude(plan.prepared, results, tracker)
    tracker.describe(describe(outcome))
    best = {f"best.{name}": value for name, value in outcome.ranking[0].metrics.items()}
    tracker.finish_sweep("FAILED" if results.failed else "FINISHED", best, outcome.pictures)
    _flush(tracker, MLFLOW_PATIENCE_SECONDS)
    tracker.close()
    return outcome


def _start_tracking(prepared: Prepared) -> SweepTracker:
    spec = prepared.spec
    experiment = spec.tracking.experiment or spec.name
    tracker = SweepTracker(spec.tracking_uri, experiment, spec.local_folder / "mlartifacts", spec.key, spec.name)
    files = {"spec.yaml": _published_spec(spec).yaml(), "environment.txt": _environment()}
    tracker.log_sweep(_sweep_params(prepared), files)
    return tracker


def _published_spec(spec: SweepSpec) -> SweepSpec:
    """Return the spec with absolute paths and without passwords: readable from any folder, and by anyone."""
    uri = spec.tracking.uri and redact(spec.tracking.uri)
    return spec.anchored().model_copy(update={"tracking": spec.tracking.model_copy(update={"uri": uri})})


def _sweep_params(prepared: Prepared) -> dict[str, object]:
    perplexity, translation = prepared.spec.evaluation.perplexity, prepared.spec.evaluation.translation
    metric_signatures = signatures(translation.pairs) if translation else {}
    return {
        **prepared.params(),
        "evaluation.languages": ",".join(perplexity.languages),
        "evaluation.lines": perplexity.lines,
        **{f"signature.{name}": signature for name, signature in metric_signatures.items()},
    }


def _environment() -> str:
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    return "\n".join([f"python {platform.python_version()}", platform.platform(), *packages]) + "\n"


def _flush(tracker: SweepTracker, patience: float) -> None:
    """Wait for the updates queued for MLflow.

    Raises SweepError if MLflow is still unavailable after `patience` seconds, SpecError if it rejected an update.
    """
    delivered = tracker.flush(
        patience, lambda count, reason: logger.info("  %d updates queued for MLflow: %s", count, reason)
    )
    if not delivered:
        lost = f"{tracker.pending} updates did not reach MLflow ({tracker.last_error})"
        raise SweepError(f"{lost}; all results are stored: run the same command when MLflow is available")


def _conclude(prepared: Prepared, results: TrialResults, tracker: SweepTracker) -> SweepOutcome:
    """Rank the trials and draw the pictures."""
    spec = prepared.spec
    ranking = rank_trials(results.dense, results.finished, spec.search.objective, prepared.result_store())
    for result in ranking.trials:
        tracker.log_trial(result.key, result.variant, _change_metrics(ranking.changes[result.key]))
    pictures = draw_pictures(
        results.dense,
        ranking.trials,
        spec.evaluation.perplexity.languages,
        f"{spec.name}: {spec.model.path}, {len(ranking.trials)} variants",
        spec.local_folder,
        spec.name,
        ranking.changes,
    )
    _flush(tracker, MLFLOW_PATIENCE_SECONDS)  # run ids are known only when runs have been created
    return SweepOutcome(
        spec=spec,
        dense=results.dense,
        ranking=ranking.trials,
        changes=ranking.changes,
        tied=ranking.tied,
        runs={result.key: tracker.run_id(result.key) for result in (results.dense, *ranking.trials)},
        parent_run=tracker.parent_id,
        experiment=tracker.experiment_id,
        pictures=tuple(pictures),
        failed=results.failed,
        nodes=tuple(results.nodes),
    )


def _change_metrics(change: Interval) -> dict[str, float]:
    names = ("bits_per_byte.change", "bits_per_byte.change.low", "bits_per_byte.change.high")
    return dict(zip(names, change, strict=True))


def _run_unfinished(plan: SweepPlan, tracker: SweepTracker, show: Show) -> TrialResults:
    """Run the unfinished trials; log the finished ones again, because MLflow may lack them."""
    prepared, store = plan.prepared, plan.prepared.result_store()
    dense = store.load(prepared.result_key(None))
    if dense is not None:
        tracker.finish_trial(dense, partial(store.items, dense.key))
    if plan.finished:
        logger.info("  %d of %d trials had finished before", len(plan.finished), len(plan.variants))
    # Optuna suggests the same trials again, from the same seed, and reads the stored results of finished ones
    optuna = prepared.spec.search.searcher == "optuna"
    finished = [] if optuna else list(plan.finished)
    for result in finished:
        tracker.finish_trial(result, partial(store.items, result.key))
    variants = list(plan.variants) if optuna else plan.unfinished
    if dense is not None and not variants:
        return TrialResults(dense, finished, {}, [])
    samples = prepared.spec.search.samples
    trials = TrialProgress(samples if optuna and samples else len(variants))
    with open_replicas(prepared) as replicas:
        dense = _run_phases(plan, replicas, tracker, show, dense, variants, trials)
        nodes = [usage.node for usage in replicas.pipelines[0].usage(POLL_SECONDS) if usage]
        _log_memory(prepared, replicas)
    failed = {variant.label: cause for variant, cause in trials.failed.items()}
    _warn_of(trials, failed)
    return TrialResults(dense, [*finished, *trials.results.values()], failed, nodes)


def _run_phases(
    plan: SweepPlan,
    replicas: ReplicaGroup,
    tracker: SweepTracker,
    show: Show,
    dense: Result | None,
    variants: list[Variant],
    trials: TrialProgress,
) -> Result:
    """Evaluate the dense model if `dense` is None, calibrate, run the trials; return the dense model's result."""
    prepared = plan.prepared
    at_once = prepared.plan.trials * prepared.plan.replicas
    monitor = SweepMonitor(prepared.spec.name, replicas, trials, at_once, tracker, show)
    with monitor.running():
        monitor.enter("evaluating the dense model")
        dense = dense or _evaluate_dense(prepared, replicas, tracker)
        monitor.enter("calibrating")
        for replica in range(prepared.plan.replicas):
            replicas.run_with_retries(
                "calibration", lambda pipeline: gather_moments(prepared, pipeline, plan.unfinished), replica
            )
        monitor.enter(TRIALS_PHASE)
        with step(TRIALS_PHASE):
            run_trials(prepared, replicas, tracker, variants, trials)
        tracker.log_sweep_metrics(monitor.report(), 0)
    return dense


def _evaluate_dense(prepared: Prepared, replicas: ReplicaGroup, tracker: SweepTracker) -> Result:
    store = prepared.result_store()
    tracker.start_trial(prepared.result_key(None), None)

    def work(pipeline: Pipeline) -> tuple[Result, str]:
        with step("evaluating the dense model", "batches") as progress:
            return run_dense(prepared, pipeline, progress)

    dense, items = replicas.run_with_retries("evaluation of the dense model", work)
    store.save(dense, items)
    tracker.finish_trial(dense, partial(store.items, dense.key))
    return dense


def _log_memory(prepared: Prepared, replicas: ReplicaGroup) -> None:
    peak = replicas.run_with_retries("reading the peak memory", lambda pipeline: max(pipeline.peak_bytes()))
    planned = max(need.total for need in prepared.plan.memory)
    logger.info("  peak memory of a worker: %s; planned: %s", size_text(peak), size_text(planned))


def _warn_of(trials: TrialProgress, failed: Mapping[str, str]) -> None:
    for result in trials.results.values():
        if result.unseen and result.variant:
            logger.warning("%s: %s", result.variant.label, unseen_warning(result.unseen))
    for label, cause in failed.items():
        logger.warning("%s failed: %s", label, cause)
