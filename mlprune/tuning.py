"""Trials under Ray Tune: a grid as it is, or what Optuna chooses. The only door to Ray Tune.

A trial runs in a process of its own and does nothing there but ask the pipeline and wait: the arithmetic is in
the shards' workers. So this module, which such a process imports, keeps away from MLflow.
"""

from __future__ import annotations

import logging
import os
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlprune.console import step
from mlprune.grid import variant_of
from mlprune.prepare import Prepared
from mlprune.shards.actors import TRIAL_SLOT
from mlprune.shards.pipeline import Pipeline
from mlprune.store import Result
from mlprune.trial import run_trial
from mlprune.variants import Variant

if TYPE_CHECKING:
    from mlprune.tracking import SweepTracker

METRICS = "metrics"  # of a report: ours, beside what Ray Tune adds


def run_trials(
    prepared: Prepared, pipeline: Pipeline, tracker: SweepTracker, todo: Sequence[Variant]
) -> tuple[list[Result], dict[str, str]]:
    """Run `todo`, or what Optuna chooses: the results, each variant once, and the failed ones' causes by label."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end a sweep as if it were finished
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints its panels whatever the verbosity
    from ray import tune

    search = prepared.spec.search
    objective = f"bits_per_byte.{search.objective}"
    optuna = search.searcher == "optuna"
    total = search.samples if optuna and search.samples else len(todo)
    with (
        step("pruning and evaluating", "trials") as progress,
        tempfile.TemporaryDirectory(prefix="mlprune-tune-") as scratch,
    ):
        progress(0, total)
        watch = _watcher(prepared, tracker, lambda done: progress(done, total))
        given = {"prepared": prepared, "pipeline": pipeline, "objective": objective}
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(tune_trial, **given), {"CPU": 0, TRIAL_SLOT: 1}),
            param_space=None if optuna else {"variant": tune.grid_search([vars(v) for v in todo])},
            tune_config=tune.TuneConfig(
                metric=objective if optuna else None,
                mode="min" if optuna else None,
                reuse_actors=True,
                search_alg=_optuna(prepared, objective) if optuna else None,
                num_samples=total if optuna else 1,
                # one at a time, what Optuna suggests follows from its seed and from results alone, so that
                # a sweep started again is led through the results that are there, and goes on
                max_concurrent_trials=1 if optuna else None,
            ),
            run_config=tune.RunConfig(storage_path=scratch, name="sweep", callbacks=[watch], verbose=0),
        )
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        tuner.fit()
    return list({result.key: result for result in watch.results}.values()), watch.failed


def _optuna(prepared: Prepared, objective: str) -> Any:
    import optuna
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, seed = prepared.spec.search, prepared.spec.calibration.seed
    names = ("calibration", "score", "sparsity", "pattern", "propagation", "allocation")
    space = {name: tune.choice(list(getattr(search, name)) or [None]) for name in names}
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5)
    return OptunaSearch({"variant": space}, metric=objective, mode="min", sampler=sampler)


def tune_trial(config: dict[str, Any], prepared: Prepared, pipeline: Pipeline, objective: str) -> None:
    """What Ray Tune runs: one variant, unless its result is there."""
    from ray import tune

    variant = variant_of(**config["variant"])
    store = prepared.results()
    try:
        result = store.load(prepared.result_key(variant))
        if result is None:
            result, items = run_trial(prepared, pipeline, variant, _under_way(prepared))
            store.save(result, items)
        tune.report({METRICS: dict(result.metrics), objective: result.metrics[objective]})
    except Exception as error:  # whatever it is, it ends this trial and not the others; the sweep reports it
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        tune.report({"cause": cause, "traceback": traceback.format_exc(), objective: float("inf")})


def _under_way(prepared: Prepared) -> Callable[[Mapping[str, float]], None]:
    """Reports what is known before a trial ends; to Optuna nothing, which wants its objective in every report."""
    from ray import tune

    if prepared.spec.search.searcher == "optuna":
        return lambda metrics: None
    return lambda metrics: tune.report({METRICS: dict(metrics)})


def _watcher(prepared: Prepared, tracker: SweepTracker, progress: Any) -> Any:
    """A callback of Ray Tune's, in the driver, that logs trials as they go."""
    from ray import tune

    class Watcher(tune.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.results: list[Result] = []
            self.failed: dict[str, str] = {}
            self._done = 0

        def __reduce__(self) -> Any:  # Tune pickles its set-up to disk, for a restore that we do not do
            return (tune.Callback, ())

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            tracker.trial_run(*_key_and_variant(prepared, trial))

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            key, variant = _key_and_variant(prepared, trial)
            if "cause" in result:
                self.failed[variant.label] = result["cause"]
                tracker.fail_trial(key, variant, result["traceback"])
                return
            tracker.log_trial(key, variant, result[METRICS])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            store = prepared.results()
            finished = store.load(_key_and_variant(prepared, trial)[0])
            self._done += 1
            progress(self._done)
            if finished is not None:
                self.results.append(finished)
                tracker.finish_trial(finished, store.items(finished.key))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            key, variant = _key_and_variant(prepared, trial)
            self.failed[variant.label] = "its process died"
            tracker.fail_trial(key, variant, "its process died")

    return Watcher()


def _key_and_variant(prepared: Prepared, trial: Any) -> tuple[str, Variant]:
    variant = variant_of(**trial.config["variant"])
    return prepared.result_key(variant), variant
