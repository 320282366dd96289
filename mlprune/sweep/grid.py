"""The lists of a search, as trials in canonical form: variants that would have the same masks are one trial.

Knows which score needs which calibration, so it reads the score registry. How variants are written is in
`spec/variants.py`.
"""

from __future__ import annotations

from itertools import product

from mlprune.errors import SpecError
from mlprune.pruning.scores import Score, Solver, find_score
from mlprune.pruning.structured import UNIT_SCORES
from mlprune.spec.calibrations import MIX, Calibration
from mlprune.spec.search import SearchSpec
from mlprune.spec.variants import (
    Allocation,
    Pattern,
    Propagation,
    Repair,
    Scoring,
    Variant,
    parse_sides,
    two_sides,
)

# within a group of m, the order of wanda-alpha's scores is that of Wanda's
SAME_IN_GROUPS = {"wanda-alpha": "wanda"}


def canonical_variant(
    calibration: Calibration | None,
    score: Scoring,
    sparsity: float,
    pattern: Pattern,
    propagation: Propagation,
    allocation: Allocation = "uniform",
    seed: int = 0,
    key: str = "score",
    repair: Repair = "none",
) -> Variant:
    """Return the trial in canonical form.

    A score that reads no moments has no calibration and no propagation, and if it is not random, no seed. A rule
    that changes weights goes layer by layer, as its authors' does, and so does a repair, which only structured
    patterns have. An n:m pattern fixes the sparsity of every layer. Raises SpecError, naming `key`, for an unknown
    score, or one whose calibrations are not those that it needs.
    """
    rule = find_score(score.name, key)
    repair = repair if pattern.structure else "none"
    fixed = pattern.sparsity
    if fixed is not None:
        score, allocation = Scoring(SAME_IN_GROUPS.get(score.name, score.name), score.sides), "uniform"
    _check_sides(score, rule.sides, key)
    _check_combinations(calibration, score, rule)
    if pattern.structure:
        _check_structured(calibration, score, allocation, repair, key)
    if score.sides:
        calibration = None
    if not rule.sides and repair == "none":
        propagation = "dense"
        if allocation != "owl":
            calibration = None
            seed = seed if isinstance(rule, Score) and rule.seeded else 0
    if isinstance(rule, Solver) or repair != "none":
        propagation = "sequential"
    share = float(sparsity if fixed is None else fixed)
    return Variant(calibration, score, share, pattern, propagation, allocation, seed, repair)


def _check_structured(
    calibration: Calibration | None, score: Scoring, allocation: Allocation, repair: Repair, key: str
) -> None:
    """Refuse what has no meaning for whole units."""
    if score.name not in UNIT_SCORES:
        remedy = f"channels and heads are ranked by {', '.join(UNIT_SCORES)}; write one of them"
        raise SpecError(key, repr(str(score)), remedy)
    if allocation != "uniform":
        remedy = "every layer loses the same number of units; write uniform, or another pattern"
        raise SpecError("search.allocation", repr(allocation), remedy)
    if repair == "none":
        return
    if calibration is None:
        raise SpecError("search.repair", repr(repair), "it needs calibration text; write search.calibration")
    if calibration.combination != MIX:
        remedy = f"{repair} reads products of channels, which only mix combines; write mix, or repair: [none]"
        raise SpecError("search.calibration", repr(str(calibration)), remedy)


def _check_sides(score: Scoring, needed: int, key: str) -> None:
    if score.sides and needed != 2:
        raise SpecError(
            key, repr(str(score)), f"{score.name} reads one calibration at most; write {score.name} alone"
        )
    if needed == 2 and not score.sides:
        raise SpecError(key, repr(str(score)), f"{score.name} needs both sides; write {two_sides(score.name)}")


def _check_combinations(calibration: Calibration | None, score: Scoring, rule: Score | Solver) -> None:
    """Refuse combinations of calibrations that the rule cannot read."""
    for side in score.sides:
        if side.combination.kind == "rank":
            remedy = f"{score.name} compares norms, and rank has none; write max, power or mix"
            raise SpecError("search.score", repr(str(score)), remedy)
    if isinstance(rule, Solver) and calibration is not None and calibration.combination != MIX:
        remedy = f"{score.name} reads products of channels, which only mix combines; write mix, or another score"
        raise SpecError("search.calibration", repr(str(calibration)), remedy)


def parse_variant(
    calibration: str | None,
    score: str,
    sparsity: float,
    pattern: str,
    propagation: Propagation,
    allocation: Allocation = "uniform",
    seed: int = 0,
    repair: Repair = "none",
) -> Variant:
    """Return the canonical trial of plain values, such as a search space's or `Variant.to_dict`'s."""
    parsed, scoring = parse_sides(calibration, score)
    return canonical_variant(
        parsed, scoring, sparsity, Pattern.parse(pattern), propagation, allocation, seed, repair=repair
    )


def variants_of(search: SearchSpec, seed: int = 0) -> tuple[Variant, ...]:
    """Return the grid in the order of the spec, each different trial once.

    `seed` is used where the search names none. Raises SpecError for an unknown score, or where a calibration is
    missing.
    """
    rules = [find_score(score.name, f"search.score[{n}]") for n, score in enumerate(search.score)]
    for score, rule in zip(search.score, rules, strict=True):
        if rule.sides == 1 and not search.calibration:
            raise SpecError("search.calibration", "[]", f"{score} needs calibration; write [mono:en], say")
    if "owl" in search.allocation and not search.calibration and any(rule.sides != 2 for rule in rules):
        raise SpecError("search.calibration", "[]", "owl allocates by calibration; write [mono:en], say")
    grid = product(
        search.calibration or (None,),
        range(len(search.score)),
        search.sparsity,
        search.pattern,
        search.propagation,
        search.allocation,
        search.repair,
        search.seed or (seed,),
    )
    variants = [
        canonical_variant(
            calibration,
            search.score[n],
            sparsity,
            pattern,
            propagation,
            allocation,
            seed,
            f"search.score[{n}]",
            repair,
        )
        for calibration, n, sparsity, pattern, propagation, allocation, repair, seed in grid
    ]
    return tuple(dict.fromkeys(variants))


def needs_dense_moments(variant: Variant) -> bool:
    """Return whether the variant reads moments of the unpruned model."""
    return bool(variant.sides) and (variant.propagation == "dense" or variant.allocation == "owl")
