"""What a sweep will do: its trials, the finished ones among them, and the passes and disk space that are needed.

Running it is in `sweep`; memory and shards are planned in `mlprune.planning`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mlprune.errors import SpecError
from mlprune.evaluation.perplexity import FIRST_BLOCK
from mlprune.spec.schema import SweepSpec
from mlprune.spec.search import SearchSpec
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.allocations import missing_measurements
from mlprune.sweep.claims import PlannedClaim, plan_claims
from mlprune.sweep.grid import variants_of
from mlprune.sweep.mixtures import MixtureSearch, evaluated_trials, forecast_trials, mixture_searches
from mlprune.sweep.objective import check_objective
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.tracking.mlflow_client import check_tracking


def select_variants(search: SearchSpec, seed: int) -> tuple[Variant, ...]:
    """Return the trials of the search; for Optuna, all that it may choose from.

    `search.samples` counts variants, each with all its seeds.
    """
    variants = variants_of(search, seed)
    without_seeds = list(dict.fromkeys(variant.without_seed for variant in variants))
    if search.samples is None or search.searcher == "optuna" or search.samples >= len(without_seeds):
        return variants
    drawn = random.Random(seed).sample(without_seeds, search.samples)
    return tuple(variant for one in drawn for variant in variants if variant.without_seed == one)


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """What a sweep will do; known before weights are loaded."""

    prepared: Prepared
    variants: tuple[Variant, ...]
    finished: tuple[Result, ...]  # results of the variants from an earlier run
    claims: tuple[PlannedClaim, ...] = ()
    searches: tuple[MixtureSearch, ...] = ()

    @property
    def unfinished(self) -> list[Variant]:
        """Return the variants without a result."""
        finished = {result.variant for result in self.finished}
        return [variant for variant in self.variants if variant not in finished]

    @property
    def passes(self) -> dict[str, int]:
        """Return the passes over the model still to do, by kind.

        Calibration sets are counted one by one, though all of them share one pass.
        """
        unfinished, search = self.unfinished, self.prepared.spec.search
        forecast, evaluated = forecast_trials(self.searches), evaluated_trials(self.searches)
        trials = [*unfinished, *forecast, *evaluated]
        store, layers = self.prepared.moment_store(), range(len(self.prepared.model_size.layers))
        needed = self.prepared.dense_sets(trials).values()
        missing = [one for one in needed if not all(store.has(one.key, layer) for layer in layers)]
        measurements = len(missing_measurements(self.prepared, trials).evaluations)
        sequential = [variant for variant in trials if variant.propagation == "sequential"]
        evaluation = "evaluation, at most" if search.has_stages or evaluated else "evaluation"
        no_baseline = self.prepared.result_store().load(self.prepared.result_key(None)) is None
        return {
            "calibration": len(missing),
            **({"evaluation of single pruned layers, on few lines": measurements} if measurements else {}),
            "sequential pruning (two forwards each)": len(sequential),
            **({"masks of mixtures, for forecasts, at most": len(forecast)} if forecast else {}),
            evaluation: len(unfinished) + len(evaluated) + no_baseline,
            **({"confirmation, for claims": self._untested} if self.claims else {}),
        }

    @property
    def _untested(self) -> int:
        """The number of trials that claims compare and that have no result on the confirmation lines."""
        assert self.prepared.evaluation is not None
        suite, store = self.prepared.evaluation.confirmation, self.prepared.result_store()
        variants = {variant for claim in self.claims for variant in claim.variants}
        return sum(store.load(self.prepared.result_key(variant, suite)) is None for variant in variants)

    @property
    def disk(self) -> int:
        """Estimate the bytes that moments, results and pictures take in the storage."""
        moments = sum(self.prepared.model_size.widths.values()) * 8 * len(self.prepared.sets)
        mixtures = len(forecast_trials(self.searches)) + len(evaluated_trials(self.searches))
        return moments + 2**13 * (len(self.variants) + mixtures) + 2**21


def _check_race(prepared: Prepared) -> None:
    """Raise SpecError if a race would have a single block of lines, and could drop nothing."""
    spec = prepared.spec
    assert prepared.evaluation is not None
    if spec.search.racing and len(prepared.evaluation.blocks) == 1:
        remedy = (
            f"search.racing needs at least {2 * FIRST_BLOCK}: the first variants are dropped after {FIRST_BLOCK}"
        )
        raise SpecError("evaluation.perplexity.lines", spec.evaluation.perplexity.lines, remedy)


def plan_sweep(spec: SweepSpec) -> SweepPlan:
    """Check everything and plan the work. Raises UserError for the first mistake."""
    variants = select_variants(spec.search, spec.calibration.seed)
    searches = mixture_searches(spec.search, spec.calibration.seed)
    prepared = prepare(spec, variants, searches=searches)
    check_objective(spec.search, prepared.suite)
    _check_race(prepared)
    assert prepared.evaluation is not None
    claims = plan_claims(spec, variants, confirms=prepared.evaluation.confirmation is not None)
    check_tracking(spec.tracking_uri)
    store = prepared.result_store()
    results = [store.load(prepared.result_key(variant)) for variant in variants]
    finished = tuple(result for result in results if result is not None)
    return SweepPlan(prepared, variants, finished, claims, searches)
