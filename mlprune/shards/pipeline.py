"""The seam between the arithmetic and the cluster: all shards of one model, in order.

What is asked of a pipeline is written once, in `Pipeline`; its two forms differ only in how a worker is
called. A call returns a promise of what each rank of the shard returns. A promise may be given to a later call,
whose ranks each take the value of their own, so that hidden states go from shard to shard without passing here.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from mlprune.data.calibration import Batch, CalibrationSet, EvaluationSet, RowSet
from mlprune.errors import WorkerLostError
from mlprune.models.hollow import Span
from mlprune.planning.memory import Chunks
from mlprune.shards.decoding import Ended, Step, grouped, waves
from mlprune.shards.features import SharedDrops
from mlprune.shards.masking import MaskSummary, Recipe
from mlprune.shards.worker import ShardWorker

Progress = Callable[[int, int], None]  # done, of how many

SEQUENTIAL_LAYERS = 4  # pruned by one call; other trials' calls come between


@dataclass(frozen=True)
class Pruned:
    """What a variant's masks came to over the whole model."""

    dropped: int
    weights: int
    digest: str  # of every mask's bits, the same for any number of shards
    unseen: tuple[str, ...]  # matrices of experts that no calibration token reached: scored by |W| alone
    layers: tuple[float, ...]  # the sparsity of each layer

    @property
    def sparsity(self) -> float:
        return self.dropped / self.weights


class Pipeline(ABC):
    """A model in shards, and how its passes are cut."""

    def __init__(self, spans: Sequence[Span], chunks: Chunks) -> None:
        self.spans = tuple(spans)
        self._chunks = chunks

    @abstractmethod
    def call(self, shard: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a worker's method; a promise of what it returns. Arguments may be promises."""

    @abstractmethod
    def get(self, promise: Any) -> list[Any]:
        """The value of each rank. Raises what a worker raised."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the workers."""

    def everywhere(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker at the same time; the first ranks' values, in order of shards."""
        promises = [self.call(shard, method, *args) for shard in range(len(self.spans))]
        return [self.get(promise)[0] for promise in promises]

    # what is asked of a model

    def restore(self, key: str) -> tuple[bool, tuple[str, ...]]:
        """Whether the store had all moments of a calibration set, and which of its files were corrupt."""
        promises = [self.call(shard, "restore_moments", key) for shard in range(len(self.spans))]
        found = [part for promise in promises for part in self.get(promise)]
        corrupt = dict.fromkeys(file for part in found for file in part.corrupt)
        return all(part.complete for part in found), tuple(corrupt)

    def gather(self, sets: Sequence[CalibrationSet], progress: Progress | None = None) -> None:
        """Pass calibration sets through the dense model together; keep their moments, here and on disk."""
        passing = uuid4().hex
        batches = [batch for made in sets for batch in made.batches]
        keys = [made.key for made in sets for _ in made.batches]
        ends = dict(zip(accumulate(len(made.batches) for made in sets), sets, strict=True))
        saved = 0
        try:
            for done, _ in self._pass("forward", batches, progress, {"passing": passing}, gather=keys):
                for number in range(saved + 1, done + 1):
                    if number in ends:  # whole: it is not lost if a later set breaks off
                        self.everywhere("save_moments", ends[number].key, passing)
                saved = done
        except BaseException:
            with contextlib.suppress(WorkerLostError):  # a shard may be the reason
                self.everywhere("end_pass", passing)
            raise

    def prune(self, recipe: Recipe) -> Pruned:
        """Make a variant's masks from gathered moments: every shard its own, at the same time."""
        return _pruned([layer for part in self.everywhere("mask", recipe) for layer in part])

    def outlier_shares(self, recipe: Recipe) -> list[float]:
        """Of each layer, the share of outliers by the recipe's first calibration, whose moments are gathered."""
        return [share for part in self.everywhere("outliers", recipe) for share in part]

    def gather_features(
        self, sets: Sequence[CalibrationSet], width: int, progress: Progress | None = None
    ) -> list[Tensor]:
        """As `gather`; and in the same pass measure what leaves the layers, of the model's hidden width `width`.

        For each set the L2 norm of every channel over a prompt's tokens, summed over the prompts: float64
        [layers, H].
        """
        by_key = {made.key: made for made in sets}
        self.everywhere("start_features", list(by_key), width)
        self.gather(list(by_key.values()), progress)
        parts = self.everywhere("take_features")
        return [torch.cat([part[made.key] for part in parts]) for made in sets]

    def shared_drops(self, recipes: Sequence[Recipe]) -> list[SharedDrops]:
        """How much of their masks the variants share, a layer each, from moments that were gathered."""
        return [layer for part in self.everywhere("shared_drops", recipes) for layer in part]

    def prune_sequentially(
        self, recipe: Recipe, sets: Sequence[CalibrationSet], progress: Progress | None = None
    ) -> Pruned:
        """Make a variant's masks layer by layer, each from inputs that the pruned layers before it computed.

        `sets` are those of `recipe.keys`, in that order.
        """
        batches = [calibration.batches for calibration in sets]
        hidden = None
        for shard, span in enumerate(self.spans):
            for start in range(span.first, span.end, SEQUENTIAL_LAYERS):
                layers = range(start, min(start + SEQUENTIAL_LAYERS, span.end))
                hidden = self.call(shard, "prune_through", recipe, batches, hidden, layers)
                if progress:
                    self.get(self.call(shard, "ready"))  # answered when the layers before it are done
                    progress(layers.stop, span.count)
        self.get(hidden)
        return _pruned([layer for part in self.everywhere("summary", recipe.variant.key) for layer in part])

    def likelihood(
        self, rows: RowSet | EvaluationSet, variant: str | None = None, progress: Progress | None = None
    ) -> list[float]:
        """The negative log-likelihood of each row's scored tokens, in nats; `variant` None is the dense model."""
        return self._of_rows(rows, progress, variant=variant)

    def likelihood_and_greedy(
        self, rows: RowSet, variant: str | None = None, progress: Progress | None = None
    ) -> list[tuple[float, bool]]:
        """The same, and whether greedy decoding would have written these very tokens."""
        told = self._of_rows(rows, progress, variant=variant, greedy=True)
        return [(nll, bool(greedy)) for nll, greedy in told]

    def _of_rows(self, rows: RowSet | EvaluationSet, progress: Progress | None, **given: Any) -> list[Any]:
        told: list[Any] = [None] * rows.count
        passing = self._pass("likelihood", rows.batches, progress, given)
        values = (value for _, chunk in passing for value in chunk)
        for batch, of_rows in zip(rows.batches, values, strict=True):
            for row, value in zip(batch.rows, of_rows.tolist(), strict=True):
                told[row] = value
        return told

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        ended: Ended,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """The greedy continuation of each prompt, of at most `max_new` tokens.

        A row ends with the token after which `ended(row, its new tokens)` is true. No prompt may be longer than
        the model's positions less `max_new`.
        """
        groups = grouped(prompts, max_new)
        for wave in waves(groups):
            session = f"{variant} {uuid4().hex}"
            try:
                while steps := [group.step() for group in wave if group.open]:
                    told = self._step(session, steps, variant)
                    for group in wave:
                        if group.open:
                            group.take(told[group.number], ended)
                    if progress:
                        progress(len(prompts) - sum(group.open for group in groups), len(prompts))
            finally:
                with contextlib.suppress(WorkerLostError):  # then it is gone
                    self.everywhere("end_session", session)
        written = {row: tokens for group in groups for row, tokens in group.written.items()}
        return [written[row] for row in range(len(prompts))]

    def release(self, variant: str) -> None:
        """Let go of a variant's masks."""
        with contextlib.suppress(WorkerLostError):  # then they are gone
            self.everywhere("release", variant)

    def peak_bytes(self) -> list[int]:
        """The most memory that each shard's largest rank has held."""
        promises = [self.call(shard, "peak_bytes") for shard in range(len(self.spans))]
        return [max(self.get(promise)) for promise in promises]

    def weights(self, variant: str | None) -> Iterator[dict[str, Tensor]]:
        """The whole model's weights, masked by `variant`: what is beside the layers, then layer by layer."""
        for shard, span in enumerate(self.spans):
            if span.is_first or span.is_last:
                yield self.get(self.call(shard, "other_weights"))[0]
        for shard, span in enumerate(self.spans):
            for index in span.layers:
                yield self.get(self.call(shard, "layer_weights", index, variant))[0]

    # how a pass goes

    def _pass(
        self,
        last: str,
        batches: Sequence[Batch],
        progress: Progress | None,
        given: dict[str, Any],
        gather: Sequence[str] = (),
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Send chunks through all shards, the next on its way while one works; `given` to the last one's method.

        Yields, chunk by chunk, how many micro-batches are done and what the last shard returned. At most two
        chunks a shard are on their way: what waits takes memory.
        """
        waiting: list[tuple[Any, int]] = []
        sent = 0

        def take() -> tuple[int, list[Tensor]]:
            promise, done = waiting.pop(0)
            values = in_order(self.get(promise))
            if progress:
                progress(done, len(batches))
            return done, values

        for chunk in self._chunks.split(batches, len(self.spans), masked=given.get("variant") is not None):
            if len(waiting) >= 2 * len(self.spans):
                yield take()
            keys = gather[sent : sent + len(chunk)]
            sent += len(chunk)
            waiting.append((self._send(last, chunk, {**given, "gather": keys} if keys else given), sent))
        while waiting:
            yield take()

    def _step(self, session: str, steps: Sequence[Step], variant: str | None) -> dict[int, list[int]]:
        """One token more for each group; from the last shard come numbers alone."""
        promise = None
        for shard, span in enumerate(self.spans):
            method = "next_tokens" if span.is_last else "decode"
            promise = self.call(shard, method, session, steps, promise, variant)
        return {group: tokens for of_rank in self.get(promise) for group, tokens in of_rank.items()}

    def _send(self, last: str, chunk: Sequence[Batch], given: dict[str, Any]) -> Any:
        hidden = None
        of_all = {name: value for name, value in given.items() if name in ("variant", "gather", "passing")}
        for shard in range(len(self.spans) - 1):
            hidden = self.call(shard, "forward", chunk, hidden, **of_all)
        return self.call(len(self.spans) - 1, last, chunk, hidden, **given)


def in_order(shares: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What was shared out to ranks in turn, in the order that it had before."""
    return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]


def _pruned(layers: Sequence[MaskSummary]) -> Pruned:
    return Pruned(
        dropped=sum(layer.dropped for layer in layers),
        weights=sum(layer.weights for layer in layers),
        digest=hashlib.sha256("".join(layer.digest for layer in layers).encode()).hexdigest()[:32],
        unseen=tuple(name for layer in layers for name in layer.unseen),
        layers=tuple(layer.dropped / layer.weights for layer in layers),
    )


class LocalPipeline(Pipeline):
    """All shards in this process, one rank each, one after another."""

    def __init__(self, workers: Sequence[ShardWorker], chunks: Chunks) -> None:
        super().__init__([worker.span for worker in workers], chunks)
        self._workers = list(workers)

    def call(self, shard: int, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._workers[shard], method)(*args, **kwargs)

    def get(self, promise: Any) -> list[Any]:
        return [promise]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()
