"""Which metrics an evaluation yields, so that an unknown objective is refused before any work starts."""

from __future__ import annotations

from collections.abc import Sequence

from mlprune.data.batches import RowSet
from mlprune.errors import SpecError
from mlprune.evaluation.loss import loss_metrics
from mlprune.evaluation.suite import Suite
from mlprune.shards.decoding import Ended
from mlprune.shards.pipeline import Progress
from mlprune.spec.search import SearchSpec
from mlprune.sweep.trial import trial_metrics


class _BlankModel:
    """A model for which every text is certain, and which writes nothing: enough to learn the metrics' names."""

    def likelihood(
        self, rows: RowSet, variant: str | None = None, progress: Progress | None = None
    ) -> list[float]:
        return [1.0] * rows.count

    def likelihood_and_greedy(
        self, rows: RowSet, variant: str | None = None, progress: Progress | None = None
    ) -> list[tuple[float, bool]]:
        return [(1.0, True)] * rows.count

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        ended: Ended,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        return [[]] * len(prompts)


def metric_names(suite: Suite) -> list[str]:
    """Return the names of all metrics that a trial of the suite has, losses first."""
    metrics = trial_metrics(suite.run(_BlankModel()))
    return [*loss_metrics(metrics, metrics), *metrics]


def check_objective(search: SearchSpec, suite: Suite) -> None:
    """Raise SpecError unless the evaluation yields the metric by which trials are to be ranked."""
    if search.objective in ("mean", "worst"):
        return
    names = metric_names(suite)
    if search.metric not in names:
        remedy = f"the evaluation does not yield it; write mean, worst or one of {', '.join(names)}"
        raise SpecError("search.objective", repr(search.objective), remedy)
