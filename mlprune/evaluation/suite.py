"""All that a model is asked: tasks answered by likelihoods, in one pass for all, and tasks that ask themselves."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from mlprune.data.calibration import EvaluationSet, RowSet
from mlprune.evaluation.items import Items
from mlprune.shards.pipeline import Pipeline, Progress


class Scored(Protocol):
    """A task answered by the negative log-likelihood of token rows."""

    @property
    def rows(self) -> RowSet | EvaluationSet: ...

    def answer(self, nll: Sequence[float]) -> list[Items]: ...


class Asking(Protocol):
    """A task that asks the pipeline by itself, as one that has text written."""

    @property
    def key(self) -> str:
        """A content hash of all that its numbers depend on, but the model."""

    @property
    def tokens(self) -> int:
        """Of its requests, pads included."""

    @property
    def longest(self) -> int:
        """Tokens of its longest row."""

    @property
    def written(self) -> int:
        """Tokens of rows that are written at the same time, prompts included; 0 if nothing is written."""

    def ask(self, pipeline: Pipeline, variant: str | None, progress: Progress | None = None) -> list[Items]: ...


@dataclass(frozen=True, eq=False)
class Suite:
    """The tasks of a sweep; every one of its trials, and the dense model, answers them all."""

    scored: tuple[Scored, ...]
    asking: tuple[Asking, ...] = ()

    @functools.cached_property
    def key(self) -> str:
        parts = [*(task.rows.key for task in self.scored), *(task.key for task in self.asking)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]

    @functools.cached_property
    def rows(self) -> RowSet:
        """Of all tasks answered by likelihoods, one after another."""
        batches = []
        count = 0
        for task in self.scored:
            for batch in task.rows.batches:
                batches.append(replace(batch, rows=tuple(row + count for row in batch.rows)))
            count += task.rows.count
        return RowSet(count, tuple(batches), self.key)

    def run(self, pipeline: Pipeline, variant: str | None = None, progress: Progress | None = None) -> list[Items]:
        """What the dense model, or a variant of it, answers."""
        rows = self.rows
        nll = pipeline.likelihood(rows, variant, progress)
        items = []
        starts = accumulate((task.rows.count for task in self.scored), initial=0)
        for task, start in zip(self.scored, starts, strict=False):
            items += task.answer(nll[start : start + task.rows.count])
        for asking in self.asking:
            items += asking.ask(pipeline, variant, progress)
        return items
