"""Runs the stages of a sweep in this process, without Ray, Tune and MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlprune.evaluation.items import from_json
from mlprune.evaluation.suite import Suite
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.allocations import measure_model_for
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.plan import SweepPlan
from mlprune.sweep.stage import Purpose, Stage
from mlprune.sweep.stage_runner import StageRunner
from mlprune.sweep.trial import run_dense, run_trial
from mlprune.sweep.trial_progress import TrialProgress


def lasting(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in sorted(metrics.items()) if not name.startswith("seconds.")}


@dataclass
class Tracker:
    """What is logged of trials, in place of MLflow."""

    finished: dict[str, Result] = field(default_factory=dict)

    def start_trial(self, key: str, variant: Variant | None) -> None:
        pass

    def finish_trial(self, result: Result, items: Any, standing: str = "") -> None:
        assert from_json(items())
        self.finished[result.key] = result


class KilledError(Exception):
    """The driver dies."""


class LocalRunner(StageRunner):
    """Runs trials one after another on an open model, and dies before the trial number `dies`."""

    def __init__(self, plan: SweepPlan, model: Any, dies: int = -1, broken: Sequence[Variant] = ()) -> None:
        tracker: Any = Tracker()
        super().__init__(plan.prepared, tracker, lambda _: None)
        self.tracker: Tracker = tracker
        self._model, self._dies, self._broken = model, dies, broken
        self.ran: list[tuple[Purpose | None, Variant | None]] = []
        self.totals: dict[str, list[int]] = {}  # of the live table, after each batch of a stage
        self.counts: dict[str, list[int]] = {}

    def _evaluate_dense(self, suite: Suite) -> Result:
        return self._kept(None, run_dense(self._prepared, self._model, suite))

    def _run(self, stage: Stage, todo: Sequence[Variant], progress: TrialProgress) -> dict[Variant, Result]:
        gather_moments(self._prepared, self._model, todo)
        measure_model_for(self._prepared, self._model, todo)
        self.failed |= dict.fromkeys([one for one in todo if one in self._broken], "it is broken")
        trials = {one: run_trial(self._prepared, self._model, one, stage.suite) for one in todo}
        results = {
            one: self._kept(stage.purpose, trial) for one, trial in trials.items() if one not in self.failed
        }
        progress.results |= {result.key: result for result in results.values()}
        return results

    def run(self, stage: Stage, variants: Sequence[Variant]) -> dict[Variant, Result]:
        results = super().run(stage, variants)
        if progress := self._in_batches.get(stage):
            self.totals.setdefault(stage.name, []).append(progress.total)
            self.counts.setdefault(stage.name, []).append(len(progress.results))
        return results

    def _kept(self, purpose: Purpose | None, trial: tuple[Result, str]) -> Result:
        if len(self.ran) == self._dies:
            raise KilledError
        self._store.save(*trial)
        self.ran.append((purpose, trial[0].variant))
        return trial[0]


def planned(base: SweepPlan, storage: Path, **search: Any) -> SweepPlan:
    """Return the plan with another storage and other keys of the search."""
    spec = base.prepared.spec
    changed = spec.model_copy(update={"storage": str(storage), "search": spec.search.model_copy(update=search)})
    return replace(base, prepared=replace(base.prepared, spec=changed))
