"""All shards of one model in order: the interface through which trials, evaluation and analysis use the model.

`Pipeline` holds every operation once, and `LocalPipeline` runs all shards in this process; the form over Ray
actors is in `mlprune.runtime.actors`. This module knows nothing of Ray.

The forms differ only in how they call a worker. A call names a method of `ShardWorker` and returns a `Future` of
what each rank of the shard returns. Hidden states pass from shard to shard as futures, so they never come here.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Concatenate, Generic, ParamSpec, TypeVar, cast
from uuid import uuid4

import torch
from torch import Tensor

from mlprune.data.batches import Batch, RowSet
from mlprune.data.calibration import CalibrationSet
from mlprune.errors import WorkerLostError
from mlprune.models.hollow import Span
from mlprune.models.structures import Units
from mlprune.planning.memory import Chunks
from mlprune.shards.decoding import Ended, Step, grouped, waves
from mlprune.shards.features import SharedDrops
from mlprune.shards.masking import MaskRecipe, MaskSummary
from mlprune.shards.worker import ShardWorker

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
H = TypeVar("H")  # hidden states: what one shard returns and the next one takes

Progress = Callable[[int, int], None]  # done, total

SEQUENTIAL_LAYERS = 4  # layers pruned by one call; calls of other trials run in between


@dataclass(frozen=True)
class MaskOutcome:
    """Totals of a variant's masks over the whole model."""

    dropped: int
    weights: int
    digest: str  # over the bits of every mask; the same for any number of shards
    unseen: tuple[str, ...]  # expert matrices that no calibration token reached: scored by |W| alone
    layers: tuple[float, ...]  # the sparsity of each layer
    forecast: Mapping[str, float]  # language -> mean over matrices of the share of energy dropped on its text

    @property
    def sparsity(self) -> float:
        return self.dropped / self.weights


@dataclass(frozen=True)
class Future(Generic[R_co]):
    """The result of a call on one shard, which may still be running. Only its pipeline reads the fields."""

    first: object  # the first rank's value, or Ray's reference to it
    others: object = None  # over Ray: the reference to a list of references to the other ranks' values


class Pipeline(ABC):
    """A model in shards, and how its passes are cut into chunks."""

    def __init__(self, spans: Sequence[Span], chunks: Chunks) -> None:
        self.spans = tuple(spans)
        self._chunks = chunks
        self._last = len(self.spans) - 1

    @abstractmethod
    def call(
        self,
        shard: int,
        method: Callable[Concatenate[ShardWorker, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[R]:
        """Call a worker method on every rank of a shard. The arguments are values, never futures."""

    @abstractmethod
    def call_with_hidden(
        self,
        shard: int,
        method: Callable[Concatenate[ShardWorker, H | None, P], R],
        hidden: Future[H] | None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[R]:
        """Call a worker method whose first argument is what the shard before returned; None on the first shard.

        Each rank gets the hidden states of the same rank of the shard before.
        """

    @abstractmethod
    def get(self, future: Future[R]) -> list[R]:
        """Wait for the value of each rank. Raises what a worker raised."""

    @abstractmethod
    def close(self) -> None:
        """Release the workers."""

    def call_all(
        self, method: Callable[Concatenate[ShardWorker, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """Call a method on every shard at the same time; return the first rank's value of each, in shard order."""
        futures = [self.call(shard, method, *args, **kwargs) for shard in range(len(self.spans))]
        return [self.get(future)[0] for future in futures]

    # moments

    def restore(self, key: str) -> tuple[bool, tuple[str, ...]]:
        """Load a calibration set's moments from the store.

        Returns whether the store had all of them, and which of its files were corrupt.
        """
        futures = [self.call(shard, ShardWorker.restore_moments, key) for shard in range(len(self.spans))]
        stored = [of_rank for future in futures for of_rank in self.get(future)]
        corrupt = dict.fromkeys(file for of_rank in stored for file in of_rank.corrupt)
        return all(of_rank.complete for of_rank in stored), tuple(corrupt)

    def gather(self, sets: Sequence[CalibrationSet], progress: Progress | None = None) -> None:
        """Pass calibration sets through the dense model together; keep their moments in workers and on disk."""
        pass_id = uuid4().hex
        batches = [batch for calibration in sets for batch in calibration.batches]
        keys = [calibration.key for calibration in sets for _ in calibration.batches]
        ends = dict(zip(accumulate(len(calibration.batches) for calibration in sets), sets, strict=True))

        def send(start: int, chunk: Sequence[Batch]) -> Future[list[Tensor]]:
            chunk_keys = keys[start : start + len(chunk)]
            hidden = self._send_to_last(chunk, None, chunk_keys, pass_id)
            return self.call_with_hidden(self._last, ShardWorker.forward, hidden, chunk, None, chunk_keys, pass_id)

        saved = 0
        try:
            for done, _ in self._pass(send, batches, progress):
                for number in range(saved + 1, done + 1):
                    if number in ends:  # this set is complete: it stays even if a later set fails
                        self.call_all(ShardWorker.save_moments, ends[number].key, pass_id)
                saved = done
        except BaseException:
            with contextlib.suppress(WorkerLostError):  # a lost shard may be the reason
                self.call_all(ShardWorker.discard_pass, pass_id)
            raise

    def gather_features(
        self, sets: Sequence[CalibrationSet], width: int, progress: Progress | None = None
    ) -> list[Tensor]:
        """Gather moments and, in the same pass, measure the hidden states' channels; `width` is the hidden width.

        Returns for each set the L2 norm of every channel over a prompt's tokens, summed over the prompts: float64
        [1 + layers, H], first of the embedding's output, then of each layer's.
        """
        by_key = {calibration.key: calibration for calibration in sets}
        self.call_all(ShardWorker.start_features, list(by_key), width)
        self.gather(list(by_key.values()), progress)
        parts = self.call_all(ShardWorker.take_features)
        return [torch.cat([part[calibration.key] for part in parts]) for calibration in sets]

    # masks

    def prune(self, recipe: MaskRecipe) -> MaskOutcome:
        """Make a variant's masks from gathered moments, in all shards at the same time."""
        return _mask_outcome(self.call_all(ShardWorker.mask, recipe))

    def signals(self, recipe: MaskRecipe) -> list[float]:
        """Return the signal of each layer for the recipe's allocation, from gathered moments or weights alone."""
        return [signal for part in self.call_all(ShardWorker.signals, recipe) for signal in part]

    def shared_drops(self, recipes: Sequence[MaskRecipe]) -> list[SharedDrops]:
        """Return for each layer how much of their masks the variants share; the moments are gathered."""
        return [layer for part in self.call_all(ShardWorker.shared_drops, recipes) for layer in part]

    def prune_sequentially(
        self, recipe: MaskRecipe, sets: Sequence[CalibrationSet], progress: Progress | None = None
    ) -> MaskOutcome:
        """Make a variant's masks layer by layer, each from inputs computed by the pruned layers before it.

        `sets` are the calibration sets of `recipe.keys`, in that order.
        """
        batches = [calibration.batches for calibration in sets]
        hidden: Future[list[list[Tensor]]] | None = None
        for shard, span in enumerate(self.spans):
            for start in range(span.first, span.end, SEQUENTIAL_LAYERS):
                layers = range(start, min(start + SEQUENTIAL_LAYERS, span.end))
                hidden = self.call_with_hidden(shard, ShardWorker.prune_through, hidden, recipe, batches, layers)
                if progress:
                    self.get(self.call(shard, ShardWorker.ready))  # returns when the layers before are done
                    progress(layers.stop, span.count)
        assert hidden is not None
        self.get(hidden)
        return _mask_outcome(self.call_all(ShardWorker.summary, recipe.variant.key))

    def reuse(self, variant: str) -> MaskOutcome | None:
        """Take masks into use again that every shard has kept; None if one has not, then they must be made."""
        futures = [self.call(shard, ShardWorker.reuse, variant) for shard in range(len(self.spans))]
        of_ranks = [self.get(future) for future in futures]
        if any(summary is None for ranks in of_ranks for summary in ranks):
            self.release(variant)
            return None
        return _mask_outcome([ranks[0] or [] for ranks in of_ranks])

    def release(self, variant: str, keep: bool = False) -> None:
        """Release a variant's masks; with `keep`, `reuse` may take them into use again."""
        with contextlib.suppress(WorkerLostError):  # then the masks are gone already
            self.call_all(ShardWorker.release, variant, keep)

    # evaluation

    def likelihood(
        self, rows: RowSet, variant: str | None = None, progress: Progress | None = None
    ) -> list[float]:
        """Return the negative log-likelihood of each row's scored tokens, in nats.

        `variant` None is the dense model.
        """
        return [nll for (nll,) in self._row_values(rows, variant, False, progress)]

    def likelihood_and_greedy(
        self, rows: RowSet, variant: str | None = None, progress: Progress | None = None
    ) -> list[tuple[float, bool]]:
        """Return the same, and whether greedy decoding would have produced exactly these tokens."""
        return [(nll, bool(greedy)) for nll, greedy in self._row_values(rows, variant, True, progress)]

    def _row_values(
        self, rows: RowSet, variant: str | None, greedy: bool, progress: Progress | None
    ) -> list[list[float]]:
        """Return for each row its likelihood, and with `greedy` 1 or 0 beside it."""

        def send(_: int, chunk: Sequence[Batch]) -> Future[list[Tensor]]:
            hidden = self._send_to_last(chunk, variant)
            return self.call_with_hidden(self._last, ShardWorker.likelihood, hidden, chunk, variant, greedy)

        by_row: list[list[float]] = [[] for _ in range(rows.count)]
        chunks = self._pass(send, rows.batches, progress, masked=variant is not None)
        values = (value for _, chunk in chunks for value in chunk)
        for batch, value in zip(rows.batches, values, strict=True):
            for row, numbers in zip(batch.rows, value.reshape(len(batch.rows), -1).tolist(), strict=True):
                by_row[row] = numbers
        return by_row

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        ended: Ended,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Return the greedy continuation of each prompt, at most `max_new` tokens each.

        A row ends with the token after which `ended(row, its new tokens)` is true. No prompt may be longer than
        the model's positions less `max_new`.
        """
        groups = grouped(prompts, max_new)
        for wave in waves(groups):
            session = f"{variant} {uuid4().hex}"
            try:
                while steps := [group.step() for group in wave if group.open]:
                    tokens = self._step(session, steps, variant)
                    for group in wave:
                        if group.open:
                            group.take(tokens[group.number], ended)
                    if progress:
                        progress(len(prompts) - sum(group.open for group in groups), len(prompts))
            finally:
                with contextlib.suppress(WorkerLostError):  # then the session is gone already
                    self.call_all(ShardWorker.close_session, session)
        by_row = {row: tokens for group in groups for row, tokens in group.written.items()}
        return [by_row[row] for row in range(len(prompts))]

    def _step(self, session: str, steps: Sequence[Step], variant: str | None) -> dict[int, list[int]]:
        """Decode one more token for each group. The last shard returns token ids only."""
        hidden: Future[list[Tensor]] | None = None
        for shard in range(self._last):
            hidden = self.call_with_hidden(shard, ShardWorker.decode, hidden, session, steps, variant)
        tokens = self.call_with_hidden(self._last, ShardWorker.next_tokens, hidden, session, steps, variant)
        return {group: newest for of_rank in self.get(tokens) for group, newest in of_rank.items()}

    # memory and weights

    def peak_bytes(self) -> list[int]:
        """Return for each shard the most memory that one of its ranks has held."""
        futures = [self.call(shard, ShardWorker.peak_bytes) for shard in range(len(self.spans))]
        return [max(self.get(future)) for future in futures]

    def weights(self, variant: str | None, cut: Units | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield all weights of the model, masked by `variant`: those outside the layers, then each layer's.

        `cut`: without those of these units that the variant removes.
        """
        for shard, span in enumerate(self.spans):
            if span.is_first or span.is_last:
                yield self.get(self.call(shard, ShardWorker.other_weights))[0]
        for shard, span in enumerate(self.spans):
            for index in span.layers:
                yield self.get(self.call(shard, ShardWorker.layer_weights, index, variant, cut))[0]

    # how a pass is sent

    def _pass(
        self,
        send: Callable[[int, Sequence[Batch]], Future[list[Tensor]]],
        batches: Sequence[Batch],
        progress: Progress | None = None,
        masked: bool = False,
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Send a pass in chunks: the next chunk enters a shard while another shard works on the one before.

        `send(start, chunk)` sends the chunk that begins with batch number `start` through all shards. Yields for
        each chunk how many batches are done and what the last shard returned. At most two chunks a shard are
        pending, because waiting hidden states take memory.
        """
        pending: list[tuple[Future[list[Tensor]], int]] = []
        sent = 0

        def take() -> tuple[int, list[Tensor]]:
            future, done = pending.pop(0)
            values = in_order(self.get(future))
            if progress:
                progress(done, len(batches))
            return done, values

        for chunk in self._chunks.split(batches, len(self.spans), masked=masked):
            if len(pending) >= 2 * len(self.spans):
                yield take()
            future = send(sent, chunk)
            sent += len(chunk)
            pending.append((future, sent))
        while pending:
            yield take()

    def _send_to_last(
        self, chunk: Sequence[Batch], variant: str | None, keys: Sequence[str] = (), pass_id: str = ""
    ) -> Future[list[Tensor]] | None:
        """Send a chunk through all shards but the last; return the hidden states for the last, if any."""
        hidden: Future[list[Tensor]] | None = None
        for shard in range(self._last):
            hidden = self.call_with_hidden(shard, ShardWorker.forward, hidden, chunk, variant, keys, pass_id)
        return hidden


def in_order(shares: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return values that were dealt out to ranks in turn, in their order before."""
    return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]


def _mask_outcome(parts: Sequence[Sequence[MaskSummary]]) -> MaskOutcome:
    """Add up the summaries of all layers, given shard by shard."""
    layers = [layer for part in parts for layer in part]
    return MaskOutcome(
        dropped=sum(layer.dropped for layer in layers),
        weights=sum(layer.weights for layer in layers),
        digest=hashlib.sha256("".join(layer.digest for layer in layers).encode()).hexdigest()[:32],
        unseen=tuple(name for layer in layers for name in layer.unseen),
        layers=tuple(layer.dropped / layer.weights for layer in layers),
        forecast={
            language: fmean(share for layer in layers for share in layer.energy[language])
            for language in layers[0].energy
        },
    )


class LocalPipeline(Pipeline):
    """All shards in this process, one rank each. A call returns when the work is done."""

    def __init__(self, workers: Sequence[ShardWorker], chunks: Chunks) -> None:
        super().__init__([worker.span for worker in workers], chunks)
        self._workers = list(workers)

    def call(
        self,
        shard: int,
        method: Callable[Concatenate[ShardWorker, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[R]:
        return Future(method(self._workers[shard], *args, **kwargs))

    def call_with_hidden(
        self,
        shard: int,
        method: Callable[Concatenate[ShardWorker, H | None, P], R],
        hidden: Future[H] | None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[R]:
        value = None if hidden is None else cast(H, hidden.first)
        return Future(method(self._workers[shard], value, *args, **kwargs))

    def get(self, future: Future[R]) -> list[R]:
        return [cast(R, future.first)]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()
