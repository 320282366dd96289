"""The state of all trials of a sweep, as the driver knows it: plain data.

`tune_runner` writes it, `monitor` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlprune.spec.variants import Variant
from mlprune.storage.results import Result


@dataclass(frozen=True)
class ActiveTrial:
    """A running trial. Times are seconds of time.monotonic."""

    label: str
    started: float
    phase: str  # "masking" or "evaluating"
    phase_started: float


@dataclass
class TrialProgress:
    """Finished, failed and running trials."""

    total: int
    results: dict[str, Result] = field(default_factory=dict)  # by result key
    failed: dict[Variant, str] = field(default_factory=dict)  # causes
    durations: list[float] = field(default_factory=list)  # of finished trials, in seconds
    active: dict[str, ActiveTrial] = field(default_factory=dict)  # by the id that Ray Tune gave the trial

    @property
    def ended(self) -> int:
        return len(self.results) + len(self.failed)
