"""A sweep: the grid of variants, run as trials that talk to one pipeline, to a ranking. Ray Tune runs it.

What has finished is known by its result file, named by a content hash: a sweep that was killed and is started
again runs only what is missing. Ray Tune's own snapshots are not used for that (they lag behind, and are
pickles), so its state is scratch.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlprune.analysis.pictures import draw_sweep
from mlprune.config import SearchSpec, SweepSpec
from mlprune.console import say, step, warn
from mlprune.errors import SweepError
from mlprune.prepare import Prepared, gather, open_ray_pipeline, parts_of, prepare, variant_of, variants_of
from mlprune.shards.actors import TRIAL_SLOT
from mlprune.shards.pipeline import Pipeline
from mlprune.store import Result
from mlprune.tracking import SweepTracker, check_tracking
from mlprune.trial import run_dense, tune_trial, unseen_note
from mlprune.variants import Variant

PACKAGES = ("mlprune", "torch", "transformers", "ray", "mlflow", "deepspeed", "datasets", "numpy")


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
    def passes(self) -> dict[str, int]:
        """Passes over the model still to go, by kind; a pass runs every token of its set through it once."""
        finished = {result.variant for result in self.finished}
        todo = [variant for variant in self.variants if variant not in finished]
        store, layers = self.prepared.store(), range(len(self.prepared.shape.layers))
        dense = {str(p) for v in todo if v.propagation == "dense" for p, _ in parts_of(v)}
        missing = [
            name
            for name in dense
            if not all(store.file(self.prepared.sets[name].key, layer).exists() for layer in layers)
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
        moments = sum(self.prepared.shape.widths.values()) * 8 * len(self.prepared.sets)
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
class SweepOutcome:
    """A finished sweep: the dense model, the trials from best to worst, and where to look at them."""

    spec: SweepSpec
    dense: Result
    ranking: tuple[Result, ...]
    runs: Mapping[str, str]  # result key -> MLflow run
    parent_run: str
    picture: Path
    failed: Mapping[str, str]  # a trial's label -> cause

    @property
    def objective(self) -> str:
        return f"bits_per_byte.{self.spec.search.objective}"

    def best_by_sparsity(self) -> list[Result]:
        """The best trial of each sparsity, sparsest last: bits per byte only compare within one."""
        best: dict[float, Result] = {}
        for result in self.ranking:
            assert result.variant is not None
            best.setdefault(result.variant.sparsity, result)
        return [best[sparsity] for sparsity in sorted(best)]


def run_sweep(spec: SweepSpec) -> SweepOutcome:
    """Run what is missing of a sweep and rank it all. Raises SweepError when no trial could be finished."""
    plan = plan_sweep(spec)
    prepared = plan.prepared
    tracker = SweepTracker(
        spec.tracking_uri,
        spec.tracking.experiment or spec.name,
        spec.storage_folder / "mlartifacts",
        spec.key,
        spec.name,
    )
    tracker.log_sweep(
        _sweep_params(prepared), {"spec.yaml": spec.anchored().yaml(), "environment.txt": _environment()}
    )
    try:
        dense, results, failed = _all_trials(plan, tracker)
    except BaseException:
        tracker.finish_sweep("KILLED", {}, [])
        raise
    objective = f"bits_per_byte.{spec.search.objective}"
    ranking = tuple(sorted(results, key=lambda result: _rank(result.metrics[objective])))
    if not ranking:
        tracker.finish_sweep("FAILED", {}, [])
        raise SweepError("no trial finished; " + "; ".join(f"{k}: {v}" for k, v in failed.items()))
    picture = spec.storage_folder / f"{spec.name}.png"
    title = f"{spec.name}: {spec.model.path}, {len(ranking)} variants"
    draw_sweep(dense, ranking, spec.evaluation.perplexity.languages, title, picture)
    best = {f"best.{name}": value for name, value in ranking[0].metrics.items()}
    tracker.finish_sweep("FAILED" if failed else "FINISHED", best, [picture])
    runs = {result.key: tracker.trial_run(result.key, result.variant) for result in (dense, *ranking)}
    return SweepOutcome(spec, dense, ranking, runs, tracker.parent_id, picture, failed)


def _rank(value: float) -> tuple[bool, float]:
    """Lower is better, and no number is worst: a model pruned to pieces may have no likelihood at all."""
    return math.isnan(value), value


def _sweep_params(prepared: Prepared) -> dict[str, object]:
    spec = prepared.spec
    return {
        "model": spec.model.path,
        "model.fingerprint": prepared.fingerprint,
        "model.dtype": str(prepared.shape.dtype).removeprefix("torch."),
        "corpus": spec.calibration.corpus,
        "samples": spec.calibration.samples,
        "shots": spec.calibration.shots,
        "max_tokens": spec.calibration.max_tokens,
        "seed": spec.calibration.seed,
        "evaluation.languages": ",".join(spec.evaluation.perplexity.languages),
        "evaluation.lines": spec.evaluation.perplexity.lines,
    }


def _environment() -> str:
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    return "\n".join([f"python {platform.python_version()}", platform.platform(), *packages]) + "\n"


def _all_trials(plan: SweepPlan, tracker: SweepTracker) -> tuple[Result, list[Result], dict[str, str]]:
    """The dense model's result, every trial's, and the causes of those that failed."""
    prepared, store = plan.prepared, plan.prepared.results()
    dense = store.load(prepared.result_key(None))
    for result in (dense, *plan.finished):
        if result is not None:
            tracker.finish_trial(result)
    if plan.finished:
        say(f"  {len(plan.finished)} of {len(plan.variants)} trials had finished before")
    finished = {result.variant for result in plan.finished}
    todo = [variant for variant in plan.variants if variant not in finished]
    if dense is not None and not todo:
        return dense, list(plan.finished), {}
    with open_ray_pipeline(prepared, trial_slots=len(prepared.spans)) as pipeline:
        if dense is None:
            tracker.trial_run(prepared.result_key(None), None)
            with step("evaluating the dense model", "batches") as progress:
                dense = run_dense(prepared, pipeline, progress)
            store.save(dense)
            tracker.finish_trial(dense)
        gather(prepared, pipeline, todo)
        new, failed = _tune(plan, pipeline, tracker, todo)
    for label, cause in failed.items():
        warn(f"{label} failed: {cause}")
    for result in new:
        if result.unseen and result.variant:
            warn(f"{result.variant.label}: {unseen_note(result.unseen)}")
    ours = {result.key: result for result in (*plan.finished, *new)}
    return dense, list(ours.values()), failed


def _tune(
    plan: SweepPlan, pipeline: Pipeline, tracker: SweepTracker, todo: Sequence[Variant]
) -> tuple[list[Result], dict[str, str]]:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end a sweep as if it were finished
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints its panels whatever the verbosity
    from ray import tune

    search = plan.prepared.spec.search
    objective = f"bits_per_byte.{search.objective}"
    optuna = search.searcher == "optuna"
    total = search.samples if optuna and search.samples else len(todo)
    with step("trials") as progress, tempfile.TemporaryDirectory(prefix="mlprune-tune-") as scratch:
        watch = _watcher(plan.prepared, tracker, lambda done: progress(done, total))
        given = {"prepared": plan.prepared, "pipeline": pipeline, "objective": objective}
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(tune_trial, **given), {"CPU": 0, TRIAL_SLOT: 1}),
            param_space=None if optuna else {"variant": tune.grid_search([vars(v) for v in todo])},
            tune_config=tune.TuneConfig(
                metric=objective if optuna else None,
                mode="min" if optuna else None,
                reuse_actors=True,
                search_alg=_optuna(plan, objective) if optuna else None,
                num_samples=total if optuna else 1,
                # one at a time, what Optuna suggests follows from its seed and from results alone, so that
                # a sweep started again is led through the results that are there, and goes on
                max_concurrent_trials=1 if optuna else None,
            ),
            run_config=tune.RunConfig(storage_path=scratch, name="sweep", callbacks=[watch], verbose=0),
        )
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        tuner.fit()
    return watch.results, watch.failed


def _optuna(plan: SweepPlan, objective: str) -> Any:
    import optuna
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, seed = plan.prepared.spec.search, plan.prepared.spec.calibration.seed
    names = ("calibration", "score", "sparsity", "pattern", "propagation")
    space = {name: tune.choice(list(getattr(search, name)) or [None]) for name in names}
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=max(4, len(names)))
    return OptunaSearch({"variant": space}, metric=objective, mode="min", sampler=sampler)


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
            own = {k: v for k, v in result.items() if k.split(".")[0] in OWN_METRICS and "." in k}
            tracker.log_trial(key, variant, own)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            finished = prepared.results().load(_key_and_variant(prepared, trial)[0])
            self._done += 1
            progress(self._done)
            if finished is not None:
                self.results.append(finished)
                tracker.finish_trial(finished)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            key, variant = _key_and_variant(prepared, trial)
            self.failed[variant.label] = "its process died"
            tracker.fail_trial(key, variant, "its process died")

    return Watcher()


OWN_METRICS = ("bits_per_byte", "perplexity", "sparsity", "seconds")


def _key_and_variant(prepared: Prepared, trial: Any) -> tuple[str, Variant]:
    variant = variant_of(**trial.config["variant"])
    return prepared.result_key(variant), variant
