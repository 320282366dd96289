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
        """Run the unfinished trials of a stage; return the results of all its trials, without failed ones."""
        results = self.stored(stage, variants)
        todo = [variant for variant in variants if variant not in results and variant not in self.failed]
        if stage.purpose is Purpose.SELECT:
            self.log_finished(results.values())
            if results:
                logger.info("  %d of %d trials had finished before", len(results), len(variants))
        if todo:
            results |= self._run(stage, todo, len(todo))
        return {variant: results[variant] for variant in variants if variant in results}

    def log_finished(self, results: Iterable[Result]) -> None:
        """Log stored results as finished trials, in case MLflow lacks them."""
        for result in results:
            self._tracker.finish_trial(result, partial(self._store.items, result.key))

    def search(self, stage: Stage, variants: Sequence[Variant], samples: int) -> dict[Variant, Result]:
        """Run the trials that Optuna chooses among the variants.

        From the same seed it suggests the same trials again, and reads the stored results of finished ones.
        """
        return self._run(stage, variants, samples)

    def stored(self, stage: Stage, variants: Sequence[Variant]) -> dict[Variant, Result]:
        """Return the stored results of a stage."""
        results = {v: self._store.load(self._prepared.result_key(v, stage.suite)) for v in variants}
        return {variant: result for variant, result in results.items() if result is not None}

    def _run(self, stage: Stage, todo: Sequence[Variant], count: int) -> dict[Variant, Result]:
        replicas, monitor = self._opened()
        monitor.enter("calibrating")
        for replica in range(self._prepared.plan.replicas):
            replicas.run_with_retries(
                "calibration", lambda pipeline: gather_moments(self._prepared, pipeline, todo), replica
            )
        trials = TrialProgress(count)
        monitor.enter(stage.name, trials)
        with step(stage.name):
            run_trials(self._prepared, replicas, self._tracker, stage, todo, trials)
        self.failed |= trials.failed
        self._warn(stage, trials)
        return {result.variant: result for result in trials.results.values() if result.variant}

    def _warn(self, stage: Stage, trials: TrialProgress) -> None:
        for result in trials.results.values():
            if result.unseen and result.variant and stage.purpose is not Purpose.CONFIRM:
                logger.warning("%s: %s", result.variant.label, unseen_warning(result.unseen))
        for variant, cause in trials.failed.items():
            logger.warning("%s failed: %s", variant.label, cause)

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
