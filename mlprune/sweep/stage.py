"""Stages: the rounds of trials that a sweep consists of. How a stage is run is in `stage_runner`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mlprune.evaluation.suite import Suite

MASKS_ONLY = Suite(())  # no task: masks are made, and forecasts of the loss with them


class Purpose(Enum):
    """What the results of a stage are for."""

    SCREEN = "forecasts, which choose the variants to evaluate"
    BLOCK = "a block of held-out lines, after which the worst variants are dropped"
    SELECT = "all tasks: the trials' own results"
    CONFIRM = "held-out lines that nothing was chosen by"


@dataclass(frozen=True, eq=False)
class Stage:
    """One round of trials: each makes a variant's masks and runs the suite on the masked model.

    A search runs one stage in batches, and chooses each batch by the results so far.
    """

    purpose: Purpose
    name: str  # in the status and in messages
    suite: Suite
    trials: int | None = None  # in all batches, at most; None: the stage is run at once
