"""How a trial ends, as frozen types, and their translation to the dicts that Ray Tune reports, and back.

What follows from a lost worker is decided in `failure_policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finished:
    """The trial has a result in the store."""


@dataclass(frozen=True)
class Failed:
    """The trial raised an error, or lost workers too often; it does not run again."""

    cause: str  # one line
    traceback: str


@dataclass(frozen=True)
class WorkerLost:
    """A worker died while the trial used it."""

    cause: str


@dataclass(frozen=True)
class NotStarted:
    """The trial did no work, because a worker was dead before."""

    cause: str


@dataclass(frozen=True)
class Masked:
    """Progress, not an end: the masks are made and the evaluation begins."""


TrialOutcome = Finished | Failed | WorkerLost | NotStarted
TrialReport = TrialOutcome | Masked

_KIND = "trial_report"  # the key that says which type the dict is


def to_tune(report: TrialReport) -> dict[str, object]:
    """Return the dict to report to Ray Tune."""
    return {_KIND: type(report).__name__, **asdict(report)}


def from_tune(values: Mapping[str, object]) -> TrialReport:
    """Return the report in a dict of Ray Tune, which adds its own keys. Raises ValueError for any other dict."""
    kind = values.get(_KIND)
    if kind == Finished.__name__:
        return Finished()
    if kind == Failed.__name__:
        return Failed(str(values["cause"]), str(values["traceback"]))
    if kind == WorkerLost.__name__:
        return WorkerLost(str(values["cause"]))
    if kind == NotStarted.__name__:
        return NotStarted(str(values["cause"]))
    if kind == Masked.__name__:
        return Masked()
    raise ValueError(f"not the report of a trial: {dict(values)}")
