"""`mlprune compare`: two trials, item by item: which differences are significant, and which language lost most.

The tests are in `evaluation/significance.py`; the table is in `report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlprune.errors import SpecError
from mlprune.evaluation.items import from_json
from mlprune.evaluation.significance import Difference, compare, family_of, gain
from mlprune.spec.schema import SweepSpec
from mlprune.tracking.lookup import TrialRun, load_trial_items


@dataclass(frozen=True)
class Comparison:
    """Run b compared with run a."""

    a: TrialRun
    b: TrialRun
    differences: tuple[Difference, ...]

    def is_worst(self, difference: Difference) -> bool:
        """Return whether the task has several languages and this one gains least, or loses most, from a to b."""
        same_task = [other for other in self.differences if family_of(other) == family_of(difference)]
        return len(same_task) > 1 and difference is min(same_task, key=gain)


def compare_runs(spec: SweepSpec, runs: Sequence[str]) -> Comparison:
    """Compare two trials, given by their MLflow run ids.

    Raises SpecError if a run is not a finished trial, or if the two share no items.
    """
    (a, items_a), (b, items_b) = (load_trial_items(spec.tracking_uri, run, "RUN") for run in runs)
    try:
        return Comparison(a, b, tuple(compare(from_json(items_a), from_json(items_b))))
    except ValueError as error:
        raise SpecError("RUN", f"{a.name} and {b.name}", str(error)) from None
