"""The searches for mixtures that a spec requests, and how many trials they take. `mixture_search` runs them.

Like the grid, this knows which score reads which calibration.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from mlprune.errors import SpecError
from mlprune.pruning.scores import Solver, find_score
from mlprune.spec.calibrations import MIX, Calibration
from mlprune.spec.mixtures import KEY, MinimaxMixture, OptunaMixture
from mlprune.spec.search import SearchSpec
from mlprune.spec.variants import Scoring, Variant
from mlprune.sweep.grid import canonical_variant


@dataclass(frozen=True)
class MixtureSearch:
    """The search of one mixture's weights, for one score, sparsity, pattern, allocation and propagation."""

    section: OptunaMixture | MinimaxMixture
    equal: Variant  # the trial with equal weights and seed 0
    seeds: tuple[int, ...]

    def trials(self, calibration: Calibration) -> list[Variant]:
        """Return the trials with this calibration: one for each seed."""
        return [replace(self.equal, calibration=calibration, seed=seed) for seed in self.seeds]

    @property
    def forecast(self) -> list[Variant]:
        """As many trials as are forecast at most; each stands for one that is not known before."""
        return self._many(self.section.trials if isinstance(self.section, OptunaMixture) else 0)

    @property
    def evaluated(self) -> list[Variant]:
        """As many trials as are evaluated at most; each stands for one that is not known before."""
        section = self.section
        return self._many(section.evaluate if isinstance(section, OptunaMixture) else section.rounds)

    def _many(self, count: int) -> list[Variant]:
        assert self.equal.calibration is not None
        return self.trials(self.equal.calibration) * count


def mixture_searches(search: SearchSpec, seed: int) -> tuple[MixtureSearch, ...]:
    """Return the searches in the order of the spec; `seed` is used where the search names none.

    Scores that read no calibration, or two of them, take no part. Raises SpecError if no score is left.
    """
    seeds = search.seed or (seed,)
    searches = []
    for section in search.mixture:
        equal = section.calibration([1] * len(section.parts))
        grid = product(
            _scores(search, section), search.sparsity, search.pattern, search.propagation, search.allocation
        )
        starts = [
            canonical_variant(equal, score, sparsity, pattern, propagation, allocation)
            for score, sparsity, pattern, propagation, allocation in grid
        ]
        searches += [MixtureSearch(section, start, seeds) for start in dict.fromkeys(starts)]
    return tuple(searches)


def _scores(search: SearchSpec, section: OptunaMixture | MinimaxMixture) -> list[Scoring]:
    """Return the scores that read one calibration."""
    scores = []
    for n, score in enumerate(search.score):
        rule = find_score(score.name, f"search.score[{n}]")
        if rule.sides != 1:
            continue
        if isinstance(rule, Solver) and section.combination != MIX:
            remedy = f"{score} reads products of channels, which only mix combines; write mix, or another score"
            raise SpecError(f"{KEY}.combination", repr(str(section.combination)), remedy)
        scores.append(score)
    if not scores:
        texts = ", ".join(map(str, search.score))
        raise SpecError("search.score", f"[{texts}]", f"none reads the mixtures of {KEY}; add wanda, say")
    return scores


def forecast_trials(searches: Iterable[MixtureSearch]) -> list[Variant]:
    """Return as many trials as all searches forecast at most."""
    return [trial for search in searches for trial in search.forecast]


def evaluated_trials(searches: Iterable[MixtureSearch]) -> list[Variant]:
    """Return as many trials as all searches evaluate at most."""
    return [trial for search in searches for trial in search.evaluated]
