"""Two runs of the same items, item by item: what differs, how surely, and which language lost most."""

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
    """Run b against run a."""

    a: TrialRun
    b: TrialRun
    differences: tuple[Difference, ...]

    def is_worst(self, found: Difference) -> bool:
        """Whether no other language of the task fares worse in b, against a."""
        alike = [other for other in self.differences if family_of(other) == family_of(found)]
        return len(alike) > 1 and found is min(alike, key=gain)


def compare_runs(spec: SweepSpec, runs: Sequence[str]) -> Comparison:
    """Compare two trials, by MLflow run ids. Raises SpecError where one is none, or they share no items."""
    (a, items_a), (b, items_b) = (load_trial_items(spec.tracking_uri, run, "RUN") for run in runs)
    try:
        return Comparison(a, b, tuple(compare(from_json(items_a), from_json(items_b))))
    except ValueError as error:
        raise SpecError("RUN", f"{a.name} and {b.name}", str(error)) from None
