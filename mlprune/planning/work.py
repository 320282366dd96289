"""How much a job asks of the model: tokens, rows and trials. Memory and time follow from it in other modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from mlprune.data.batches import MICRO_BATCH_TOKENS
from mlprune.pruning.scores import Score, Solver, find_score
from mlprune.spec.variants import Variant


@dataclass(frozen=True)
class Work:
    """The work of a job. Token counts include padding."""

    calibration: tuple[int, ...]  # tokens of each calibration set that passes the dense model
    evaluation: int  # tokens of all evaluation tasks
    longest: int  # tokens of the longest row
    variants: int  # trials that are evaluated
    sequential: int = 0  # trials that are pruned layer by layer
    sequential_tokens: int = 0  # tokens of all calibration sets of the largest such trial
    solved: int = 0  # trials whose remaining weights are changed (sparsegpt, repair)
    sorted_matrix: bool = False  # whether some trial ranks the weights of a whole matrix over several texts
    written: int = 0  # tokens of the rows that are generated at the same time, prompts included
    forecast: int = 0  # further trials of which only masks are made, in a search for mixtures
    measuring: int = 0  # tokens on which single pruned layers are evaluated; 0: no allocation needs it
    returning: int = 0  # trials whose masks may be used again by a later stage: of a race, or after screening

    @property
    def micro_batch(self) -> int:
        """Return the tokens of the largest micro-batch."""
        return max(MICRO_BATCH_TOKENS, self.longest)


def build_work(
    variants: Sequence[Variant],
    tokens: Mapping[tuple[str, int], int],
    dense: Set[tuple[str, int]],
    evaluation: int,
    longest: int,
    written: int = 0,
    stages: bool = False,
    forecast: Sequence[Variant] = (),
    measuring: int = 0,
) -> Work:
    """Count the work of the variants; `stages`: they are evaluated in several stages.

    `forecast`: further trials, of which only masks are made.

    `tokens` maps each demonstration, as text, and seed to the tokens of its calibration set. `dense` names those
    that pass the dense model. `evaluation`, `longest`, `written` and `measuring` are the fields of Work.
    """
    sequential = [
        sum(tokens[str(part), variant.seed] for part in variant.demonstrations)
        for variant in (*variants, *forecast)
        if variant.propagation == "sequential"
    ]
    return Work(
        calibration=tuple(count for name, count in tokens.items() if name in dense),
        evaluation=evaluation,
        longest=longest,
        variants=len(variants),
        sequential=len(sequential),
        sequential_tokens=max(sequential, default=0),
        solved=sum(map(_changes_weights, variants)),
        sorted_matrix=any(map(_sorts_matrices, variants)),
        written=written,
        forecast=len(forecast),
        measuring=measuring,
        returning=len(variants) if stages else 0,
    )


def _changes_weights(variant: Variant) -> bool:
    return isinstance(find_score(variant.score.name), Solver) or variant.repair != "none"


def _sorts_matrices(variant: Variant) -> bool:
    rule = find_score(variant.score.name)
    within_matrix = isinstance(rule, Score) and rule.within == "matrix" and not variant.pattern.group
    return within_matrix and any(side.combination.kind == "rank" for side in variant.sides)
