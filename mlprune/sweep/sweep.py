"""Runs a sweep: the grid of variants as trials on one model, then a ranking.

A finished trial is recognised by its result file, whose name is a content hash. So an interrupted sweep resumes
where it stopped: it runs only unfinished trials. Ray Tune's own snapshots are not used for that (they lag behind,
and are pickles): its state is temporary.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version

from mlprune.analysis.claim_picture import ClaimPoint, draw_claims
from mlprune.analysis.sweep_pictures import draw_pictures
from mlprune.errors import SpecError, SweepError
from mlprune.evaluation.items import signatures, to_json
from mlprune.evaluation.loss import LOSS
from mlprune.spec.schema import SweepSpec
from mlprune.spec.urls import redact
from mlprune.storage.files import Storage, storage_errors
from mlprune.storage.lock import sweep_lock
from mlprune.storage.results import Result
from mlprune.sweep.claims import claim_values
from mlprune.sweep.monitor import Show
from mlprune.sweep.plan import SweepPlan, plan_sweep
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.ranking import RankedVariant, Standing, SweepOutcome, task_metrics
from mlprune.sweep.stage_runner import StageRunner
from mlprune.sweep.verdict import Verdict, run_stages, unknown_languages
from mlprune.tracking.tracker import SweepTracker

MLFLOW_PATIENCE_SECONDS = 600  # for an MLflow server that is unavailable when the sweep is done
REPORT_SECONDS = 30  # between two messages that it is unavailable
KILLED_PATIENCE_SECONDS, FAILED_PATIENCE_SECONDS = 10, 60  # when the sweep ends without an outcome
PACKAGES = (
    *("mlprune", "torch", "transformers", "ray", "mlflow", "deepspeed", "datasets", "numpy"),
    *("lm_eval", "sacrebleu", "scipy"),
)

logger = logging.getLogger(__name__)


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
        with StageRunner(plan.prepared, tracker, show) as runner:
            verdict = run_stages(plan, runner)
            runner.summarize()
        failed = {variant.label: cause for variant, cause in runner.failed.items()}
        if not verdict.ranking:
            causes = "; ".join(f"{label}: {cause}" for label, cause in failed.items())
            raise SweepError(f"no trial finished; {causes}")
        outcome = _conclude(plan.prepared, verdict, failed, runner.nodes, tracker)
    except Exception:
        _end_without_outcome(tracker, "FAILED", FAILED_PATIENCE_SECONDS)
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        _end_without_outcome(tracker, "KILLED", KILLED_PATIENCE_SECONDS)
        raise
    tracker.describe(describe(outcome))
    best = {f"best.{name}": value for name, value in outcome.ranking[0].metrics.items()}
    tracker.finish_sweep("FAILED" if failed else "FINISHED", best, outcome.pictures)
    _flush(tracker, MLFLOW_PATIENCE_SECONDS)
    tracker.close()
    return outcome


def _end_without_outcome(tracker: SweepTracker, status: str, patience: float) -> None:
    tracker.finish_sweep(status, {}, [])
    with contextlib.suppress(SpecError, SweepError):  # an MLflow problem must not hide why the sweep ends
        _flush(tracker, patience)
    tracker.close()


def _start_tracking(prepared: Prepared) -> SweepTracker:
    spec = prepared.spec
    experiment = spec.tracking.experiment or spec.name
    tracker = SweepTracker(spec.tracking_uri, experiment, spec.artifacts_folder, spec.key, spec.name)
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
    reported = -math.inf

    def report(count: int, reason: str) -> None:
        nonlocal reported
        if time.monotonic() >= reported + REPORT_SECONDS:
            reported = time.monotonic()
            logger.info("  %d updates queued for MLflow: %s", count, reason)

    delivered = tracker.flush(patience, report)
    if not delivered:
        lost = f"{tracker.pending} updates did not reach MLflow ({tracker.last_error})"
        raise SweepError(f"{lost}; all results are stored: run the same command when MLflow is available")


def _conclude(
    prepared: Prepared, verdict: Verdict, failed: Mapping[str, str], nodes: Sequence[str], tracker: SweepTracker
) -> SweepOutcome:
    """Log what the ranking says of each trial, and draw the pictures."""
    spec = prepared.spec
    for trial in verdict.unfinished:
        tracker.finish_trial(trial.result, partial(to_json, trial.items), trial.standing.value)
    for entry in verdict.ranking:
        for result in entry.seeds:
            tracker.log_trial(result.key, result.variant, _verdict_metrics(entry, result))
    if verdict.claims:
        values = [claim_values(test) for test in verdict.claims]
        tracker.log_sweep({}, {"claims.json": json.dumps(values, indent=1, ensure_ascii=False)})
    shows_mean = spec.search.metric in ("loss.mean", *task_metrics(verdict.dense.metrics))
    drawn = [entry.result for entry in verdict.ranking if entry.standing is Standing.EVALUATED]
    with storage_errors("storage", str(spec.local_folder)):
        pictures = draw_pictures(
            verdict.dense,
            drawn,
            spec.evaluation.perplexity.languages,
            f"{spec.name}: {spec.model.path}, {len(drawn)} variants",
            spec.local_folder,
            spec.name,
            {entry.key: entry.loss for entry in verdict.ranking if entry.loss and shows_mean},
        )
        if verdict.claims:
            pictures.append(spec.local_folder / f"{spec.name}-claims.png")
            points = [
                ClaimPoint(test.claim.claim, test.sparsity, test.mean.estimate, test.mean.verdict != "unknown")
                for test in verdict.claims
            ]
            draw_claims(points, f"{spec.name}: {spec.model.path}", pictures[-1])
    _flush(tracker, MLFLOW_PATIENCE_SECONDS)  # run ids are known only when runs have been created
    results = (verdict.dense, *(result for entry in verdict.ranking for result in entry.seeds))
    return SweepOutcome(
        spec=spec,
        dense=verdict.dense,
        ranking=verdict.ranking,
        agreements=verdict.agreements,
        unknown_languages=unknown_languages(prepared, verdict.dense),
        runs={result.key: tracker.run_id(result.key) for result in results},
        parent_run=tracker.parent_id,
        experiment=tracker.experiment_id,
        pictures=tuple(pictures),
        failed=failed,
        nodes=tuple(nodes),
        claims=verdict.claims,
    )


def _verdict_metrics(entry: RankedVariant, result: Result) -> dict[str, float]:
    """Return the losses of one seed, and the intervals of its variant over all seeds."""
    metrics = {name: value for name, value in result.metrics.items() if name.startswith(LOSS)}
    for name, one in (("loss", entry.loss), ("to_best", entry.to_best), ("confirmation.loss", entry.confirmed)):
        if one is not None:
            metrics |= {f"{name}.estimate": one.value, f"{name}.low": one.low, f"{name}.high": one.high}
    return metrics
