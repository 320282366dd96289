"""Tests the claims of a spec on the confirmation lines, at each sparsity.

Their text form is in `spec/claims.py`, the statistics are in `evaluation/estimates.py`.

S: seeds. L: languages. R: resamples, after the run itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from mlprune.errors import SpecError
from mlprune.evaluation.estimates import Estimate, estimate
from mlprune.evaluation.items import Items
from mlprune.evaluation.loss import LOSS, SUMMARIES, loss_samples
from mlprune.evaluation.resampling import Samples, clusters
from mlprune.evaluation.significance import LEVEL, holm
from mlprune.spec.claims import ClaimSpec, Side
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Variant
from mlprune.sweep.grid import canonical_variant

Key = TypeVar("Key")
ClaimVerdict = Literal["holds", "fails", "unknown"]
UNTESTED = Estimate(math.nan, math.nan, math.nan, math.nan)  # in each seed a trial failed


@dataclass(frozen=True)
class Pair:
    """Two trials that are compared by a metric; `than` None is the dense model."""

    language: str | None
    metric: str
    better: Variant
    than: Variant | None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The trials, without the dense model."""
        return (self.better,) if self.than is None else (self.better, self.than)


@dataclass(frozen=True, eq=False)
class PlannedClaim:
    """The trials that a claim compares at one sparsity: for each seed, a pair for each language."""

    claim: ClaimSpec
    sparsity: float
    pairs: tuple[tuple[Pair, ...], ...]

    @property
    def variants(self) -> list[Variant]:
        """All trials that it compares."""
        return [variant for seed in self.pairs for pair in seed for variant in pair.variants]


@dataclass(frozen=True)
class ClaimDifference:
    """The metric of `better` minus that of `than`. Negative: the claim is right."""

    estimate: Estimate
    adjusted: float  # p after Holm's correction

    @property
    def verdict(self) -> ClaimVerdict:
        """Whether the difference is significantly negative (holds) or positive (fails)."""
        if not self.adjusted < LEVEL:  # NaN is not
            return "unknown"
        return "holds" if self.estimate.value < 0 else "fails"


@dataclass(frozen=True)
class ClaimTest:
    """A claim at one sparsity, tested on the confirmation lines."""

    claim: ClaimSpec
    sparsity: float
    seeds: int  # that it was tested with: those of which no trial failed
    mean: ClaimDifference  # over the languages; corrected over all claims and sparsities of the sweep
    languages: Mapping[str, ClaimDifference]  # corrected over the languages and sparsities of the claim


def plan_claims(spec: SweepSpec, variants: Sequence[Variant], confirms: bool) -> tuple[PlannedClaim, ...]:
    """Return the claims with the trials that they compare, at each sparsity of the trials `variants`.

    `confirms`: whether there are confirmation lines. Raises SpecError for what cannot be tested.
    """
    if not spec.claims:
        return ()
    _check_search(spec, confirms)
    sparsities = dict.fromkeys(variant.sparsity for variant in variants)
    return tuple(
        _planned(spec, n, sparsity, set(variants)) for n in range(len(spec.claims)) for sparsity in sparsities
    )


def _check_search(spec: SweepSpec, confirms: bool) -> None:
    search = spec.search
    if not confirms:
        lines = spec.evaluation.perplexity.confirmation_lines
        raise SpecError("evaluation.perplexity.confirmation_lines", lines, "claims need such lines; write e.g. 24")
    optuna = search.searcher if search.searcher == "optuna" else None
    for name, value in (("searcher", optuna), ("screen", search.screen), ("racing", search.racing or None)):
        if value is not None:
            remedy = f"may leave out trials that claims compare; leave {name} or the claims out"
            raise SpecError(f"search.{name}", value, remedy)
    axes = {"pattern": search.pattern, "propagation": search.propagation}
    for name, values in axes.items():
        if len(values) > 1:
            remedy = f"claims compare calibrations, rules, allocations and repairs; write one {name}"
            raise SpecError(f"search.{name}", f"[{', '.join(map(str, values))}]", remedy)


def _planned(spec: SweepSpec, n: int, sparsity: float, variants: set[Variant]) -> PlannedClaim:
    claim, key = spec.claims[n], f"claims[{n}]"
    losses = [LOSS + name for name in (*spec.evaluation.perplexity.languages, *SUMMARIES)]
    comparisons = claim.comparisons(key)
    for one in comparisons:
        if one.metric not in losses:
            remedy = f"the evaluation does not yield it; write one of {', '.join(losses)}"
            raise SpecError(f"{key}.metric", repr(one.metric), remedy)

    def trial(side: Side, name: str, seed: int) -> Variant:
        variant = _variant(spec, side, sparsity, seed, f"{key}.{name}")
        if variant not in variants:
            remedy = f"the search has no such trial, which the claim {claim.claim!r} compares; add it"
            raise SpecError(f"{key}.{name}", repr(variant.label), remedy)
        return variant

    pairs = tuple(
        tuple(
            Pair(
                one.language,
                one.metric,
                trial(one.better, "better", seed),
                trial(one.than, "than", seed) if one.than else None,
            )
            for one in comparisons
        )
        for seed in spec.search.seed or (spec.calibration.seed,)
    )
    return PlannedClaim(claim, sparsity, pairs)


def _variant(spec: SweepSpec, side: Side, sparsity: float, seed: int, key: str) -> Variant:
    """Return one side as a trial with the search's only pattern and propagation."""
    search = spec.search
    (pattern,), (propagation,) = search.pattern, search.propagation
    allocation, repair = side.allocation or search.allocation[0], side.repair or search.repair[0]
    return canonical_variant(
        side.calibration, side.score, sparsity, pattern, propagation, allocation, seed, key, repair
    )


def claim_tests(
    claims: Sequence[PlannedClaim], items: Mapping[Variant, Sequence[Items]], dense: Sequence[Items]
) -> tuple[ClaimTest, ...]:
    """Test the claims: d is the mean over languages of the metric of `better` minus that of `than`.

    `items`: what each trial yielded on the confirmation lines; those of failed trials are missing. Seeds are
    paired. A seed of which a trial is missing is left out.
    """
    estimates: dict[PlannedClaim, _Estimates] = {}
    for sparsity in dict.fromkeys(claim.sparsity for claim in claims):  # the samples of one sparsity fit in memory
        within = [claim for claim in claims if claim.sparsity == sparsity]
        losses = _losses(within, items, dense)
        estimates |= {claim: _estimates(claim, losses, dense) for claim in within}
    means = _corrected({claim: estimates[claim].mean for claim in claims})
    by_language: dict[tuple[PlannedClaim, str], ClaimDifference] = {}
    for text in dict.fromkeys(claim.claim for claim in claims):
        same = [claim for claim in claims if claim.claim == text]
        by_language |= _corrected({(x, code): one for x in same for code, one in estimates[x].languages.items()})
    return tuple(
        ClaimTest(
            claim.claim,
            claim.sparsity,
            estimates[claim].seeds,
            means[claim],
            {code: by_language[claim, code] for code in estimates[claim].languages},
        )
        for claim in claims
    )


@dataclass(frozen=True)
class _Estimates:
    """The differences of one claim at one sparsity."""

    seeds: int
    mean: Estimate
    languages: Mapping[str, Estimate]


def _losses(
    claims: Sequence[PlannedClaim], items: Mapping[Variant, Sequence[Items]], dense: Sequence[Items]
) -> dict[Variant, dict[str, Samples]]:
    """Return the samples of each trial, by metric."""
    metrics = dict.fromkeys(pair.metric for claim in claims for seed in claim.pairs for pair in seed)
    variants = dict.fromkeys(variant for claim in claims for variant in claim.variants)
    return {variant: loss_samples(items[variant], dense, metrics) for variant in variants if variant in items}


def _estimates(
    claim: PlannedClaim, losses: Mapping[Variant, Mapping[str, Samples]], dense: Sequence[Items]
) -> _Estimates:
    languages = [pair.language for pair in claim.pairs[0]]
    complete = [
        pairs for pairs in claim.pairs if all(variant in losses for pair in pairs for variant in pair.variants)
    ]
    if not complete:
        return _Estimates(0, UNTESTED, {code: UNTESTED for code in languages if code is not None})
    units = clusters(dense, [pair.metric for pair in claim.pairs[0]])
    with np.errstate(invalid="ignore"):  # of two broken models
        difference_SLR = np.array([[_difference(pair, losses) for pair in pairs] for pairs in complete])
        mean = estimate(list(difference_SLR.mean(1)), units)
    alone = {
        code: estimate(list(difference_SLR[:, n]), units) for n, code in enumerate(languages) if code is not None
    }
    return _Estimates(len(complete), mean, alone)


def _difference(pair: Pair, losses: Mapping[Variant, Mapping[str, Samples]]) -> Samples:
    """Return the samples of the difference between two trials; a loss of the dense model is 0."""
    better = losses[pair.better][pair.metric]
    return better if pair.than is None else better - losses[pair.than][pair.metric]


def _corrected(estimates: Mapping[Key, Estimate]) -> dict[Key, ClaimDifference]:
    """Correct the p-values for the number of estimates."""
    adjusted = holm([one.p for one in estimates.values()])
    return {key: ClaimDifference(one, p) for (key, one), p in zip(estimates.items(), adjusted, strict=True)}


def claim_values(test: ClaimTest) -> dict[str, object]:
    """Return the test of a claim as plain values, with what it compares."""
    return {
        **test.claim.model_dump(mode="json"),
        "sparsity": test.sparsity,
        "seeds": test.seeds,
        **_difference_values(test.mean),
        "by_language": {code: _difference_values(one) for code, one in test.languages.items()},
    }


def _difference_values(one: ClaimDifference) -> dict[str, object]:
    return {"difference": vars(one.estimate), "adjusted": one.adjusted, "verdict": one.verdict}
