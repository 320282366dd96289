"""Decides what happens to trials that lost a worker. It only decides: it starts nothing and knows nothing of Ray.

Trials share workers, so the trial that kills a worker and the trials that only used it look the same. A trial that
lost workers twice therefore runs alone, which separates the cause from its victims.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum

from mlprune.spec.variants import Variant

logger = logging.getLogger(__name__)

LOSSES_BEFORE_ALONE = 2  # a trial with so many losses runs alone


class FailureDecision(Enum):
    RETRY = "runs again"
    RETRY_ALONE = "runs again, alone"
    GIVE_UP = "has failed"


class FailurePolicy:
    """Records the losses of each trial and decides about it. A trial fails at its `max_losses`-th loss."""

    def __init__(self, max_losses: int) -> None:
        self._max_losses = max_losses
        self._causes: dict[Variant, list[str]] = {}

    def record_loss(self, variant: Variant, cause: str) -> FailureDecision:
        """Record that the trial lost a worker; return what happens to the trial."""
        causes = self._causes.setdefault(variant, [])
        causes.append(cause)
        decision = self.decision(variant)
        logger.warning("%s: %s; the trial %s", variant.label, cause, decision.value)
        return decision

    def decision(self, variant: Variant) -> FailureDecision:
        """Return what happens to the trial the next time."""
        losses = len(self._causes.get(variant, ()))
        if losses >= self._max_losses:
            return FailureDecision.GIVE_UP
        return FailureDecision.RETRY_ALONE if losses >= LOSSES_BEFORE_ALONE else FailureDecision.RETRY

    @property
    def given_up(self) -> dict[Variant, str]:
        """The trials that have failed, and why."""
        return {
            variant: f"a worker died {len(causes)} times under it: {causes[-1]}"
            for variant, causes in self._causes.items()
            if self.decision(variant) is FailureDecision.GIVE_UP
        }

    def next_round(self, todo: Sequence[Variant]) -> tuple[list[Variant], bool]:
        """Return which of the trials run next, and whether a single one runs alone."""
        together = [variant for variant in todo if self.decision(variant) is FailureDecision.RETRY]
        return (together, False) if together else (list(todo[:1]), True)
