"""A sweep: the grid of variants, run as trials that talk to one pipeline, to a ranking.

What has finished is known by its result file, named by a content hash: a sweep that was killed and is started
again runs only what is missing. Ray Tune's own snapshots are not used for that (they lag behind, and are
pickles), so its state is scratch.
"""

from __future__ import annotations

import contextlib
import platform
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from mlprune.analysis.sweep_pictures import pictures_of
from mlprune.console import say, size_text, step, warn
from mlprune.errors import SpecError, SweepError
from mlprune.evaluation.items import signatures
from mlprune.runtime.replicas import ReplicaGroup
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.schema import SweepSpec
from mlprune.spec.search import SearchSpec
from mlprune.spec.urls import redact
from mlprune.spec.variants import Variant
from mlprune.storage.files import Storage
from mlprune.storage.lock import sweep_lock
from mlprune.storage.results import Result
from mlprune.sweep.grid import needs_dense_moments, variants_of
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.monitor import LOOK_SECONDS, TRIALS, Show, Watch
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.ranking import Interval, SweepOutcome, ranking_of
from mlprune.sweep.session import open_replicas
from mlprune.sweep.trial import run_dense, unseen_note
from mlprune.sweep.tune_runner import Trials, run_trials
from mlprune.tracking.mlflow_client import check_tracking
from mlprune.tracking.tracker import SweepTracker

PATIENCE = 600  # seconds for an MLflow server that is away when all else is done
PACKAGES = (
    *("mlprune", "torch", "transformers", "ray", "mlflow", "deepspeed", "datasets", "numpy"),
    *("lm_eval", "sacrebleu", "scipy"),
)


def chosen_variants(search: SearchSpec, seed: int) -> tuple[Variant, ...]:
    """The trials that the spec asks for; for Optuna, all that it may choose from."""
    variants = variants_of(search)
    if search.samples is None or search.searcher == "optuna" or search.samples >= len(variants):
        return variants
    return tuple(random.Random(seed).sample(variants, search.samples))


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """What a sweep will do, known before a weight is loaded."""

    prepared: Prepared
    variants: tuple[Variant, ...]
    finished: tuple[Result, ...]  # of the variants, by an earlier run

    @property
    def unfinished(self) -> list[Variant]:
        finished = {result.variant for result in self.finished}
        return [variant for variant in self.variants if variant not in finished]

    @property
    def passes(self) -> dict[str, int]:
        """Passes over the model still to go, by kind. Calibration sets are counted singly; they pass together."""
        todo = self.unfinished
        store, layers = self.prepared.store(), range(len(self.prepared.model_size.layers))
        dense = {str(part) for variant in todo if needs_dense_moments(variant) for part in variant.demonstrations}
        missing = [
            name for name in dense if not all(store.has(self.prepared.sets[name].key, layer) for layer in layers)
        ]
        sequential = [variant for variant in todo if variant.propagation == "sequential"]
        baseline = self.prepared.results().load(self.prepared.result_key(None)) is None
        return {
            "calibration": len(missing),
            "sequential pruning (two forwards each)": len(sequential),
            "evaluation": len(todo) + baseline,
        }

    @property
    def disk(self) -> int:
        """Bytes that the storage will take, to within its small files: moments, results, pictures."""
        moments = sum(self.prepared.model_size.widths.values()) * 8 * len(self.prepared.sets)
        return moments + 2**13 * len(self.variants) + 2**21


def plan_sweep(spec: SweepSpec) -> SweepPlan:
    """Check everything and lay out the work. Raises UserError for the first mistake."""
    variants = chosen_variants(spec.search, spec.calibration.seed)
    prepared = prepare(spec, variants)
    check_tracking(spec.tracking_uri)
    store = prepared.results()
    found = [store.load(prepared.result_key(variant)) for variant in variants]
    return SweepPlan(prepared, variants, tuple(result for result in found if result is not None))


@dataclass(frozen=True)
class Ran:
    """What became of the trials: the dense model's result, every trial's, and the causes of those that failed."""

    dense: Result
    results: list[Result]
    failed: dict[str, str]
    nodes: list[str]  # of each shard of the first replica; empty if nothing was run


def run_sweep(
    spec: SweepSpec,
    show: Show = lambda _: None,
    describe: Callable[[SweepOutcome], str] = lambda _: "",
) -> SweepOutcome:
    """Run what is missing of a sweep and rank it all.

    `show` is told each second how it stands; `describe` makes the text on top of its page in MLflow.

    Raises SweepError when no trial could be finished.
    """
    plan = plan_sweep(spec)
    with sweep_lock(Storage(spec.storage), spec.key):
        return _run(plan, show, describe)


def _run(plan: SweepPlan, show: Show, describe: Callable[[SweepOutcome], str]) -> SweepOutcome:
    prepared, spec = plan.prepared, plan.prepared.spec
    tracker = SweepTracker(
        spec.tracking_uri,
        spec.tracking.experiment or spec.name,
        spec.local_folder / "mlartifacts",
        spec.key,
        spec.name,
    )
    tracker.log_sweep(
        _sweep_params(prepared), {"spec.yaml": _without_password(spec).yaml(), "environment.txt": _environment()}
    )
    try:
        ran = _all_trials(plan, tracker, show)
    except BaseException:
        tracker.finish_sweep("KILLED", {}, [])
        with contextlib.suppress(SpecError):  # what MLflow refuses is not why the sweep ends
            _settle(tracker, patience=10)
        raise
    if not ran.results:
        tracker.finish_sweep("FAILED", {}, [])
        _settle(tracker, patience=60)
        raise SweepError("no trial finished; " + "; ".join(f"{k}: {v}" for k, v in ran.failed.items()))
    outcome = _concluded(prepared, ran, tracker)
    tracker.describe(describe(outcome))
    best = {f"best.{name}": value for name, value in outcome.ranking[0].metrics.items()}
    tracker.finish_sweep("FAILED" if ran.failed else "FINISHED", best, outcome.pictures)
    _settled(tracker)
    tracker.close()
    return outcome


def _concluded(prepared: Prepared, ran: Ran, tracker: SweepTracker) -> SweepOutcome:
    """Rank and draw."""
    spec = prepared.spec
    ranking = ranking_of(ran.dense, ran.results, spec.search.objective, prepared.results())
    for result in ranking.trials:
        tracker.log_trial(result.key, result.variant, _change_metrics(ranking.changes[result.key]))
    pictures = pictures_of(
        ran.dense,
        ranking.trials,
        spec.evaluation.perplexity.languages,
        f"{spec.name}: {spec.model.path}, {len(ranking.trials)} variants",
        spec.local_folder,
        spec.name,
        ranking.changes,
    )
    _settled(tracker)  # the ids of runs are known then
    return SweepOutcome(
        spec=spec,
        dense=ran.dense,
        ranking=ranking.trials,
        changes=ranking.changes,
        level=ranking.level,
        runs={result.key: tracker.run_id(result.key) for result in (ran.dense, *ranking.trials)},
        parent_run=tracker.parent_id,
        experiment=tracker.experiment_id,
        pictures=tuple(pictures),
        failed=ran.failed,
        nodes=tuple(ran.nodes),
    )


def _without_password(spec: SweepSpec) -> SweepSpec:
    """To be read again from any folder, and by anyone."""
    uri = spec.tracking.uri and redact(spec.tracking.uri)
    return spec.anchored().model_copy(update={"tracking": spec.tracking.model_copy(update={"uri": uri})})


def _settled(tracker: SweepTracker) -> None:
    """Wait for MLflow; raises SweepError when it does not come back. All results are in the storage by then."""
    if not tracker.flush(PATIENCE, lambda count, why: say(f"  {count} updates queued for MLflow: {why}")):
        waits = f"{tracker.pending} updates did not reach MLflow ({tracker.last_error})"
        raise SweepError(f"{waits}; all results are kept: run the same command when it is back")


def _settle(tracker: SweepTracker, patience: float) -> bool:
    settled = tracker.flush(patience, lambda count, reason: say(f"  {count} updates queued for MLflow: {reason}"))
    tracker.close()
    return settled


def _change_metrics(change: Interval) -> dict[str, float]:
    names = ("bits_per_byte.change", "bits_per_byte.change.low", "bits_per_byte.change.high")
    return dict(zip(names, change, strict=True))


def _sweep_params(prepared: Prepared) -> dict[str, object]:
    spec = prepared.spec
    translation = spec.evaluation.translation
    told = signatures(translation.pairs) if translation else {}
    return {
        "model": spec.model.path,
        "model.fingerprint": prepared.fingerprint,
        "model.dtype": str(prepared.model_size.dtype).removeprefix("torch."),
        "corpus": spec.calibration.corpus,
        "samples": spec.calibration.samples,
        "shots": spec.calibration.shots,
        "max_tokens": spec.calibration.max_tokens,
        "seed": spec.calibration.seed,
        "evaluation.languages": ",".join(spec.evaluation.perplexity.languages),
        "evaluation.lines": spec.evaluation.perplexity.lines,
        **{f"signature.{name}": signature for name, signature in told.items()},
    }


def _environment() -> str:
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    return "\n".join([f"python {platform.python_version()}", platform.platform(), *packages]) + "\n"


def _all_trials(plan: SweepPlan, tracker: SweepTracker, show: Show) -> Ran:
    """What is missing of the sweep is run; what was there is told to MLflow again, which may not know it."""
    prepared, store = plan.prepared, plan.prepared.results()
    dense = store.load(prepared.result_key(None))
    if dense is not None:
        tracker.finish_trial(dense, partial(store.items, dense.key))
    if plan.finished:
        say(f"  {len(plan.finished)} of {len(plan.variants)} trials had finished before")
    optuna = prepared.spec.search.searcher == "optuna"
    # Optuna chooses anew, by the same seed, and is led through the results that are there
    done = [] if optuna else list(plan.finished)
    for result in done:
        tracker.finish_trial(result, partial(store.items, result.key))
    todo = [variant for variant in plan.variants if variant not in {result.variant for result in done}]
    if dense is not None and not todo:
        return Ran(dense, done, {}, [])
    samples = prepared.spec.search.samples
    trials = Trials(samples if optuna and samples else len(todo))
    at_once = prepared.plan.trials * prepared.plan.replicas
    with open_replicas(prepared) as replicas:
        watch = Watch(prepared.spec.name, replicas, trials, at_once, tracker, show)
        with watch.watching():
            watch.enter("evaluating the dense model")
            dense = dense or _dense(prepared, replicas, tracker)
            watch.enter("calibrating")
            for replica in range(prepared.plan.replicas):
                replicas.run_with_retries(
                    "calibration", lambda pipeline: gather_moments(prepared, pipeline, plan.unfinished), replica
                )
            watch.enter(TRIALS)
            with step(TRIALS):
                run_trials(prepared, replicas, tracker, todo, trials)
            tracker.log_sweep_metrics(watch.report(), 0)
        nodes = [usage.node for usage in replicas.pipelines[0].usage(LOOK_SECONDS) if usage]
        _tell_memory(prepared, replicas)
    for result in trials.results.values():
        if result.unseen and result.variant:
            warn(f"{result.variant.label}: {unseen_note(result.unseen)}")
    failed = {variant.label: cause for variant, cause in trials.failed.items()}
    for label, cause in failed.items():
        warn(f"{label} failed: {cause}")
    return Ran(dense, [*done, *trials.results.values()], failed, nodes)


def _dense(prepared: Prepared, replicas: ReplicaGroup, tracker: SweepTracker) -> Result:
    store = prepared.results()
    tracker.start_trial(prepared.result_key(None), None)

    def work(pipeline: Pipeline) -> tuple[Result, str]:
        with step("evaluating the dense model", "batches") as progress:
            return run_dense(prepared, pipeline, progress)

    dense, items = replicas.run_with_retries("evaluation of the dense model", work)
    store.save(dense, items)
    tracker.finish_trial(dense, partial(store.items, dense.key))
    return dense


def _tell_memory(prepared: Prepared, replicas: ReplicaGroup) -> None:
    held = replicas.run_with_retries("a look at memory", lambda pipeline: max(pipeline.peak_bytes()))
    planned = max(need.total for need in prepared.plan.memory)
    say(f"  a worker held {size_text(held)} at most; {size_text(planned)} were planned")
