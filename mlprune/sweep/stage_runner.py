"""Runs the stages of a sweep on the model, which is opened when the first stage has unfinished trials.

A finished trial of a stage is recognised by its result file, whose name is a content hash. What the stages are,
and what follows from their results, is decided in `verdict`, `screening` and `racing`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from functools import partial

from mlprune.console import size_text, step
from mlprune.evaluation.suite import Suite
from mlprune.runtime.replicas import ReplicaGroup
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.allocations import measure_model_for, missing_measurements
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.monitor import POLL_SECONDS, Show, SweepMonitor
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.session import open_replicas
from mlprune.sweep.stage import Purpose, Stage
from mlprune.sweep.trial import run_dense, unseen_warning
from mlprune.sweep.trial_progress import TrialProgress
from mlprune.sweep.tune_runner import run_trials
from mlprune.tracking.tracker import SweepTracker

logger = logging.getLogger(__name__)


class StageRunner(contextlib.ExitStack):
    """Runs stages while its block runs; the model is held from the first unfinished trial to the block's end."""

    def __init__(self, prepared: Prepared, tracker: SweepTracker, show: Show) -> None:
        super().__init__()
        self._prepared, self._tracker, self._show = prepared, tracker, show
        self._store = prepared.result_store()
        self._open: tuple[ReplicaGroup, SweepMonitor] | None = None
        self._in_batches: dict[Stage, TrialProgress] = {}
        self._logged: set[str] = set()  # keys of results that are logged as finished trials
        self.failed: dict[Variant, str] = {}  # causes
        self.nodes: list[str] = []  # node of each shard of the first replica; empty if nothing had to be run

    def dense(self, suite: Suite) -> Result:
        """Return the dense model's result, after an evaluation if there is none yet."""
        key = self._prepared.result_key(None, suite)
        result = self._store.load(key)
        if result is None:
            self._tracker.start_trial(self._prepared.result_key(None), None)
            result = self._evaluate_dense(suite)
        if suite is self._prepared.suite:
            self._tracker.finish_trial(result, partial(self._store.items, key))
        return result

    def _evaluate_dense(self, suite: Suite) -> Result:
        replicas, monitor = self._opened()
        monitor.enter("evaluating the dense model")

        def work(pipeline: Pipeline) -> tuple[Result, str]:
            with step("evaluating the dense model", "batches") as progress:
                return run_dense(self._prepared, pipeline, suite, progress)

        result, items = replicas.run_with_retries("evaluation of the dense model", work)
        self._store.save(result, items)
        return result

    def run(self, stage: Stage, variants: Sequence[Variant]) -> dict[Variant, Result]:
        """Run the unfinished trials of a stage, or of one batch of it.

        Returns the results of all `variants`, without failed ones.
        """
        results = self.stored(stage, variants)
        todo = [variant for variant in variants if variant not in results and variant not in self.failed]
        before = self.log_finished(results.values()) if stage.purpose is Purpose.SELECT else 0
        if stage.trials is not None:
            progress = self._in_batches.setdefault(stage, TrialProgress(stage.trials))
            progress.results |= {result.key: result for result in results.values()}
        else:
            progress = TrialProgress(len(todo))
            if before:
                logger.info("  %d of %d trials had finished before", before, len(variants))
        if todo:
            results |= self._run(stage, todo, progress)
        if stage.purpose is Purpose.SELECT:
            self._logged |= {result.key for result in results.values()}
        return {variant: results[variant] for variant in variants if variant in results}

    def log_finished(self, results: Iterable[Result]) -> int:
        """Log stored results as finished trials, in case MLflow lacks them; return how many they are.

        Those that a stage of this sweep has logged are left out.
        """
        earlier = [result for result in results if result.key not in self._logged]
        for result in earlier:
            self._tracker.finish_trial(result, partial(self._store.items, result.key))
        return len(earlier)

    def stored(self, stage: Stage, variants: Sequence[Variant]) -> dict[Variant, Result]:
        """Return the stored results of a stage."""
        results = {v: self._store.load(self._prepared.result_key(v, stage.suite)) for v in variants}
        return {variant: result for variant, result in results.items() if result is not None}

    def _run(self, stage: Stage, todo: Sequence[Variant], progress: TrialProgress) -> dict[Variant, Result]:
        replicas, monitor = self._opened()
        monitor.enter("calibrating")
        for replica in range(self._prepared.plan.replicas):
            replicas.run_with_retries(
                "calibration", lambda pipeline: gather_moments(self._prepared, pipeline, todo), replica
            )
        if missing_measurements(self._prepared, todo):
            monitor.enter("measuring the layers")
            replicas.run_with_retries(
                "measurement of the layers", lambda pipeline: measure_model_for(self._prepared, pipeline, todo)
            )
        monitor.enter(stage.name, progress)
        with step(stage.name):
            run_trials(self._prepared, replicas, self._tracker, stage, todo, progress)
        ran = set(todo)  # `progress` may hold earlier batches too
        results = {r.variant: r for r in progress.results.values() if r.variant and r.variant in ran}
        failed = {variant: cause for variant, cause in progress.failed.items() if variant in ran}
        self.failed |= failed
        for variant, result in results.items():
            if result.unseen and stage.purpose is not Purpose.CONFIRM:
                logger.warning("%s: %s", variant.label, unseen_warning(result.unseen))
        for variant, cause in failed.items():
            logger.warning("%s failed: %s", variant.label, cause)
        return results

    def _opened(self) -> tuple[ReplicaGroup, SweepMonitor]:
        if self._open is None:
            prepared = self._prepared
            replicas = self.enter_context(open_replicas(prepared))
            at_once = prepared.plan.trials * prepared.plan.replicas
            monitor = SweepMonitor(prepared.spec.name, replicas, at_once, self._tracker, self._show)
            self.enter_context(monitor.running())
            self._open = replicas, monitor
        return self._open

    def summarize(self) -> None:
        """Log what limited the trials and how much memory they took; nothing if no trial had to be run."""
        if self._open is None:
            return
        replicas, monitor = self._open
        self._tracker.log_sweep_metrics(monitor.report(), 0)
        self.nodes = [usage.node for usage in replicas.pipelines[0].usage(POLL_SECONDS) if usage]
        peak = replicas.run_with_retries("reading the peak memory", lambda pipeline: max(pipeline.peak_bytes()))
        planned = max(need.total for need in self._prepared.plan.memory)
        logger.info("  peak memory of a worker: %s; planned: %s", size_text(peak), size_text(planned))
