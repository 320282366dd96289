"""The two kinds of evaluation tasks, and the suite of all tasks of a sweep.

Likelihood tasks share one pass through the model; pipeline tasks call the model themselves. The tasks are in
modules of their own, and `build` makes the suite from a spec.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from mlprune.data.batches import RowSet
from mlprune.evaluation.items import Items, join_items
from mlprune.shards.decoding import Ended
from mlprune.shards.pipeline import Progress


class EvaluatedModel(Protocol):
    """What tasks need of a model; see `shards.pipeline.Pipeline`, which has it."""

    def likelihood(
        self, rows: RowSet, variant: str | None = None, progress: Progress | None = None
    ) -> list[float]: ...

    def likelihood_and_greedy(
        self, rows: RowSet, variant: str | None = None, progress: Progress | None = None
    ) -> list[tuple[float, bool]]: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        ended: Ended,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> list[list[int]]: ...


class LikelihoodTask(Protocol):
    """A task whose items follow from the negative log-likelihoods of token rows."""

    @property
    def rows(self) -> RowSet: ...

    def items(self, nll: Sequence[float]) -> list[Items]:
        """Return the items, given the negative log-likelihood (nats) of each row."""


class PipelineTask(Protocol):
    """A task that calls the model itself, e.g. because it generates text."""

    @property
    def key(self) -> str:
        """A content hash of everything that its numbers depend on, except the model."""

    @property
    def tokens(self) -> int:
        """The number of tokens of its requests, padding included."""

    @property
    def longest_row(self) -> int:
        """The number of tokens of its longest row."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of the rows that are generated at the same time, prompts included; 0 if nothing is generated."""

    def run(self, model: EvaluatedModel, variant: str | None, progress: Progress | None = None) -> list[Items]:
        """Return the items of the dense model (`variant` None) or of a variant."""


@dataclass(frozen=True, eq=False)
class Suite:
    """The tasks of a sweep. Each of its trials, and the dense model, runs all of them."""

    likelihood_tasks: tuple[LikelihoodTask, ...]
    pipeline_tasks: tuple[PipelineTask, ...] = ()

    @functools.cached_property
    def key(self) -> str:
        """A content hash of all tasks. Result keys contain it, so its input must not change."""
        parts = [*(task.rows.key for task in self.likelihood_tasks), *(task.key for task in self.pipeline_tasks)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]

    @functools.cached_property
    def rows(self) -> RowSet:
        """The rows of all likelihood tasks, one task after another."""
        batches = []
        count = 0
        for task in self.likelihood_tasks:
            for batch in task.rows.batches:
                batches.append(replace(batch, rows=tuple(row + count for row in batch.rows)))
            count += task.rows.count
        return RowSet(count, tuple(batches), self.key)

    def run(
        self, model: EvaluatedModel, variant: str | None = None, progress: Progress | None = None
    ) -> list[Items]:
        """Return the items of all tasks for the dense model (`variant` None) or for a variant."""
        if not self.likelihood_tasks and not self.pipeline_tasks:
            return []
        rows = self.rows
        nll = model.likelihood(rows, variant, progress)
        items = []
        starts = accumulate((task.rows.count for task in self.likelihood_tasks), initial=0)
        for task, start in zip(self.likelihood_tasks, starts, strict=False):
            items += task.items(nll[start : start + task.rows.count])
        for pipeline_task in self.pipeline_tasks:
            items += pipeline_task.run(model, variant, progress)
        return join_items(items)
