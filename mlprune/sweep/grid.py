"""The lists of a search to trials in canonical form, so that what would be the same masks is the same trial."""

from __future__ import annotations

from itertools import product

from mlprune.errors import SpecError
from mlprune.pruning.scores import Solver, score_named
from mlprune.spec.schema import SearchSpec
from mlprune.spec.variants import Pattern, Scoring, Variant, two_sides

# the alpha of a group of m is that of Wanda, whose order within the group it keeps
SAME_IN_GROUPS = {"wanda-alpha": "wanda"}


def variant_of(
    calibration: str | None,
    score: str,
    sparsity: float,
    pattern: str,
    propagation: str,
    allocation: str = "uniform",
    key: str = "score",
) -> Variant:
    """A trial in canonical form; `score` is a name, or `NAME:KEEP/AGAINST`.

    What reads no moments needs no calibration and no propagation; a rule that changes weights goes layer by layer,
    as its authors' does; an n:m pattern fixes the sparsity of every layer. Raises SpecError for an unknown score,
    or one whose calibrations are not those that it needs.
    """
    scoring = Scoring.parse(score, key)
    name, rule = scoring.name, score_named(scoring.name, key)
    fixed = Pattern.parse(pattern).sparsity
    if fixed is not None:
        name, allocation = SAME_IN_GROUPS.get(name, name), "uniform"
    if scoring.sides and rule.sides != 2:
        raise SpecError(key, repr(score), f"{name} reads one calibration at most; write {name} alone")
    if scoring.sides:
        calibration = "/".join(map(str, scoring.sides))
    if rule.sides == 2 and "/" not in (calibration or ""):
        raise SpecError(key, repr(score), f"{name} needs both sides; write {two_sides(name)}")
    if not rule.sides:
        propagation = "dense"
        if allocation == "uniform":
            calibration = None
    if isinstance(rule, Solver):
        propagation = "sequential"
    return Variant(
        calibration, name, float(sparsity if fixed is None else fixed), pattern, propagation, allocation
    )


def variants_of(search: SearchSpec) -> tuple[Variant, ...]:
    """The grid, each different trial once, in the order of the spec. Raises SpecError for an unknown score."""
    rules = {n: score_named(Scoring.parse(text).name, f"search.score[{n}]") for n, text in enumerate(search.score)}
    for n, rule in rules.items():
        if rule.sides == 1 and not search.calibration:
            raise SpecError(
                "search.calibration", "[]", f"{search.score[n]} needs calibration; write [mono:en], say"
            )
    if "owl" in search.allocation and not search.calibration and any(rule.sides != 2 for rule in rules.values()):
        raise SpecError("search.calibration", "[]", "owl allocates by calibration; write [mono:en], say")
    grid = product(
        search.calibration or (None,),
        range(len(search.score)),
        search.sparsity,
        search.pattern,
        search.propagation,
        search.allocation,
    )
    points = [
        variant_of(calibration, search.score[n], sparsity, pattern, propagation, allocation, f"search.score[{n}]")
        for calibration, n, sparsity, pattern, propagation, allocation in grid
    ]
    return tuple(dict.fromkeys(points))


def needs_dense(variant: Variant) -> bool:
    """Whether the variant reads moments of the unpruned model."""
    return bool(variant.calibration) and (variant.propagation == "dense" or variant.allocation != "uniform")
