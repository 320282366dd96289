"""Searches with Optuna, in batches; and the search of the grid (`searcher: optuna`).

Each batch is run as an ordinary stage, by `StageRunner.run`. What is suggested follows from the seed and from
results alone, whatever the number of trials that run at a time: an interrupted search makes the same suggestions
again, and finds their results in the store. Searches for mixtures are in `mixtures`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Generic, TypeVar

from mlprune.evaluation.loss import loss_metrics, lower_is_better
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.plan import SweepPlan
from mlprune.sweep.stage import Purpose, Stage
from mlprune.sweep.stage_runner import StageRunner

BATCH = 4  # points of a batch; fixed, because suggestions must not depend on the size of the cluster
RANDOM_POINTS = 5  # before Optuna models the results, and after the points that the search begins with
REPEATS = 100  # suggestions of known points in a row, after which a random new point is taken
AXES = ("calibration", "score", "sparsity", "pattern", "propagation", "allocation", "repair")

Point = Mapping[str, Any]  # a value for each axis of a search space, as Optuna holds it
T = TypeVar("T", bound=Hashable)


class Suggestions(Generic[T]):
    """The points that Optuna suggests, in batches and each once, by a tree-structured Parzen estimator.

    Until the values of a batch are known, its points count as bad ones, so that a batch does not consist of
    neighbours (the constant liar of Ginsbourger et al. 2010).

    `space`: the choices of each axis, None: a number in [0, 1]. `parse` returns what a point stands for; points
    that stand for the same are one. `first`: points to begin with. `others`: random points, for when Optuna
    suggests nothing new.
    """

    def __init__(
        self,
        space: Mapping[str, Sequence[object] | None],
        parse: Callable[[Point], T],
        others: Iterable[Point],
        seed: int,
        first: Sequence[Point] = (),
        minimize: bool = True,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=len(first) + RANDOM_POINTS
        )
        self._study = optuna.create_study(direction="minimize" if minimize else "maximize", sampler=sampler)
        self._failed, self._worst = optuna.trial.TrialState.FAIL, math.inf if minimize else -math.inf
        kinds = optuna.distributions
        self._space = {
            name: kinds.FloatDistribution(0, 1) if choices is None else kinds.CategoricalDistribution(choices)
            for name, choices in space.items()
        }
        for point in first:
            self._study.enqueue_trial(dict(point))
        self._parse, self._others = parse, iter(others)
        self._known: set[T] = set()
        self._open: dict[T, Any] = {}  # Optuna's trial of each point of the batch

    def ask(self, count: int) -> list[T]:
        """Return the next batch of at most `count` new points; fewer if there are no more."""
        assert not self._open, "the values of the last batch are missing"
        for _ in range(count):
            trial = self._next()
            if trial is not None:
                self._open[self._parse(trial.params)] = trial
                self._known |= self._open.keys()
        return list(self._open)

    def _next(self) -> Any:
        """Return Optuna's trial of a new point; None if there is none."""
        for _ in range(REPEATS):
            trial = self._study.ask(self._space)
            if self._parse(trial.params) not in self._known:
                return trial
            self._study.tell(trial, state=self._failed)  # Optuna ignores it
        for point in self._others:
            if self._parse(point) not in self._known:
                self._study.enqueue_trial(dict(point))
                return self._study.ask(self._space)
        return None

    def tell(self, values: Mapping[T, float]) -> None:
        """Tell Optuna the values of the batch, in its order. Failed points are missing; NaN is the worst value."""
        for point, trial in self._open.items():
            if point not in values:
                self._study.tell(trial, state=self._failed)
            else:
                self._study.tell(trial, self._worst if math.isnan(values[point]) else values[point])
        self._open = {}


def search_grid(plan: SweepPlan, runner: StageRunner, dense: Result) -> dict[Variant, Result]:
    """Evaluate as many trials of the grid as `search.samples` says, each chosen by the results so far.

    Returns their results, without failed ones.
    """
    spec = plan.prepared.spec
    metric, total = spec.search.metric, min(spec.search.samples or 0, len(plan.variants))
    stage = Stage(Purpose.SELECT, "pruning and evaluating", plan.prepared.suite, trials=total)
    suggestions = _grid_suggestions(plan)
    results: dict[Variant, Result] = {}
    for start in range(0, total, BATCH):
        batch = runner.run(stage, suggestions.ask(min(BATCH, total - start)))
        suggestions.tell(
            {
                variant: {**one.metrics, **loss_metrics(one.metrics, dense.metrics)}[metric]
                for variant, one in batch.items()
            }
        )
        results |= batch
    return results


def _grid_suggestions(plan: SweepPlan) -> Suggestions[Variant]:
    """Return suggestions among the points of the grid, of which several may be the same trial."""
    spec = plan.prepared.spec
    lists = spec.search.model_dump(mode="json")
    space = {name: lists[name] or [None] for name in AXES}
    (seed,) = spec.search.seed or (spec.calibration.seed,)
    trials = {
        values: parse_variant(**dict(zip(space, values, strict=True)), seed=seed)
        for values in product(*space.values())
    }

    def shuffled() -> Iterator[Point]:
        for values in random.Random(spec.calibration.seed).sample(list(trials), len(trials)):
            yield dict(zip(space, values, strict=True))

    return Suggestions(
        space,
        lambda point: trials[tuple(point[name] for name in space)],
        shuffled(),
        spec.calibration.seed,
        minimize=lower_is_better(spec.search.metric),
    )
