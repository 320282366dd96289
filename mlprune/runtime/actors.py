"""The pipeline over Ray: one actor for each rank of a shard, and the slots by which trials share a replica.

Where actors are placed is in `placement`, how they are started and replaced in `replicas`, what Ray's errors mean
in `worker_errors`.

Hidden states pass from actor to actor as Ray objects, in shared memory on one node. Tensors that arrive that way
are read-only; a layer never writes to its input (tests/test_replay.py checks that for every model family).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, cast

import ray
from ray.exceptions import RayError

from mlprune.errors import MlpruneError, WorkerLostError
from mlprune.models.hollow import Span
from mlprune.models.residency import Ranks
from mlprune.models.zero import open_rendezvous
from mlprune.planning.memory import Chunks
from mlprune.runtime.placement import Placement
from mlprune.runtime.worker_errors import worker_errors
from mlprune.runtime.worker_logging import configure_worker_logging
from mlprune.shards.pipeline import Future, Pipeline
from mlprune.shards.worker import Setup, ShardWorker

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

P = ParamSpec("P")
R = TypeVar("R")
H = TypeVar("H")

CLOSING_SECONDS = 10
SLOT_POLL_SECONDS = 0.2  # between two attempts of a trial to get a slot
STATUS_GROUP = "status"  # the concurrency group that answers while the worker computes


@dataclass(frozen=True)
class ShardUsage:
    """What a shard's first rank has done since it was started, and where it runs."""

    node: str  # its address
    at: float  # seconds, by its own clock
    busy: float  # seconds that it worked
    tokens: int  # that passed its layers


class RankActor:
    """One rank of a shard, as an actor. The first rank starts the others; the pipeline calls only the first.

    It forwards each call before it works itself, so that all ranks make the same calls in the same order:
    otherwise one rank would wait in a collective operation that the others never enter.
    """

    def __init__(self) -> None:
        configure_worker_logging()
        self._others: list[ActorHandle] = []
        self._busy, self._since, self._trials = 0.0, 0.0, set[str]()
        self._lock, self._failed = threading.Lock(), False
        self._worker: ShardWorker | None = None

    def load(
        self, setup: Setup, span: Span, size: int, options: Mapping[str, object], ranks: Ranks | None
    ) -> None:
        """Load the layers; on the first rank (`ranks` None), start the others.

        Not in the constructor: Ray hides the errors of constructors.
        """
        started = []
        if ranks is None:
            address = ""
            if size > 1:
                self._store, address = open_rendezvous("127.0.0.1", size)
            self._others = [rank_actor(options) for _ in range(1, size)]
            started = [
                actor.load.remote(setup, span, size, options, Ranks(rank, size, address))
                for rank, actor in enumerate(self._others, start=1)
            ]
            ranks = Ranks(0, size, address)
        self._worker = ShardWorker(setup, span, ranks)
        ray.get(started)

    @ray.method(concurrency_group=STATUS_GROUP)  # type: ignore[untyped-decorator]
    def usage(self) -> ShardUsage:
        """Return the usage at once, even while the worker computes. Raises WorkerLostError when a rank failed."""
        if self._failed:
            raise WorkerLostError("a rank of the shard failed")
        with self._lock:
            now = time.monotonic()
            busy = self._busy + (now - self._since if self._since else 0.0)
        tokens = self._worker.tokens if self._worker else 0
        return ShardUsage(ray.util.get_node_ip_address(), now, busy, tokens)

    @ray.method(concurrency_group=STATUS_GROUP)  # type: ignore[untyped-decorator]
    def acquire_slot(self, trial: str, slots: int) -> bool:
        """Return whether the trial may use the pipeline, `slots` trials at once. Called on the first shard."""
        if len(self._trials - {trial}) < slots:
            self._trials.add(trial)
        return trial in self._trials

    @ray.method(concurrency_group=STATUS_GROUP)  # type: ignore[untyped-decorator]
    def release_slot(self, trial: str) -> None:
        self._trials.discard(trial)

    def run(
        self, name: str, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> tuple[object, list[ObjectRef]]:
        """Call the worker's method `name` on every rank.

        Returns this rank's value, and references to the values of the other ranks.
        """
        others = [actor.run.options(num_returns=2).remote(name, args, kwargs)[0] for actor in self._others]
        return self._run(name, args, kwargs), others

    def run_with_hidden(
        self,
        name: str,
        hidden: object,
        others_hidden: Sequence[ObjectRef] | None,
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> tuple[object, list[ObjectRef]]:
        """Call a method whose first argument is hidden states, each rank with those of its own.

        `hidden` are this rank's, `others_hidden` references to those of the other ranks; both None on the first
        shard. Ray resolves references only where they are arguments of their own, hence not in `args`.
        """
        others = []
        for number, actor in enumerate(self._others):
            own = None if others_hidden is None else others_hidden[number]
            run = actor.run_with_hidden.options(num_returns=2)
            others.append(run.remote(name, own, None, args, kwargs)[0])
        return self._run(name, (hidden, *args), kwargs), others

    def _run(self, name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        assert self._worker is not None, "not loaded"
        with self._lock:
            self._since = time.monotonic()
        try:
            return getattr(self._worker, name)(*args, **kwargs)
        except MlpruneError:
            raise  # every rank raises the same
        except Exception as error:
            if self._worker.ranks.size == 1:
                raise
            self._end_ranks()
            raise WorkerLostError(f"a rank of the shard failed: {type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                self._busy += time.monotonic() - self._since
                self._since = 0.0

    def _end_ranks(self) -> None:
        """End all ranks: after an error here the others would wait for this one for ever. The shard is lost."""
        self._failed = True
        for actor in self._others:
            ray.kill(actor)
        assert self._worker is not None
        if not self._worker.ranks.is_first:
            traceback.print_exc()
            os._exit(1)


class RayPipeline(Pipeline):
    """All shards as actors. It may be pickled to a trial, which then calls the same actors.

    An actor that died stays dead for every holder of this pipeline: the moments and masks that it held are gone,
    and a new actor must not be taken for it. `ReplicaGroup.pipelines` gives a new pipeline after a repair.
    """

    def __init__(self, actors: Sequence[ActorHandle], spans: Sequence[Span], chunks: Chunks, slots: int) -> None:
        super().__init__(spans, chunks)
        self.actors = list(actors)
        self._slots = slots

    def call(
        self,
        shard: int,
        method: Callable[Concatenate[ShardWorker, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[R]:
        run = self.actors[shard].run.options(num_returns=2)
        return Future(*run.remote(method.__name__, args, kwargs))

    def call_with_hidden(
        self,
        shard: int,
        method: Callable[Concatenate[ShardWorker, H | None, P], R],
        hidden: Future[H] | None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[R]:
        first, others = (None, None) if hidden is None else (hidden.first, hidden.others)
        run = self.actors[shard].run_with_hidden.options(num_returns=2)
        return Future(*run.remote(method.__name__, first, others, args, kwargs))

    def get(self, future: Future[R]) -> list[R]:
        with worker_errors(self.actors):
            first, others = ray.get([future.first, future.others])
            return cast(list[R], [first, *ray.get(others)])

    def usage(self, seconds: float) -> list[ShardUsage | None]:
        """Return each shard's usage; None for a shard that is dead or does not answer within `seconds`."""
        references = [actor.usage.remote() for actor in self.actors]
        answered, _ = ray.wait(references, num_returns=len(references), timeout=seconds)
        usages: list[ShardUsage | None] = []
        for reference in references:
            usages.append(None)
            if reference in answered:
                with contextlib.suppress(RayError):
                    usages[-1] = ray.get(reference)
        return usages

    def acquire_slot(self, trial: str) -> bool:
        """Return whether the trial got a slot. Raises WorkerLostError when a shard is dead."""
        with worker_errors(self.actors):
            ray.get([actor.usage.remote() for actor in self.actors])
            return bool(ray.get(self.actors[0].acquire_slot.remote(trial, self._slots)))

    def release_slot(self, trial: str, variant: str | None = None) -> None:
        """Free the slot of a trial; if it failed, discard what it left of `variant`. Does not wait."""
        self.actors[0].release_slot.remote(trial)
        if variant is not None:
            for shard in range(len(self.actors)):
                self.call(shard, ShardWorker.discard_variant, variant)

    def close(self) -> None:
        """Have the workers remove their files, if they still can, and end them."""
        for future in [self.call(shard, ShardWorker.close) for shard in range(len(self.actors))]:
            with contextlib.suppress(RayError):  # dead, or busy: then the next worker on that disk removes them
                _, others = ray.get([future.first, future.others], timeout=CLOSING_SECONDS)
                ray.get(others, timeout=CLOSING_SECONDS)
        for actor in self.actors:
            ray.kill(actor)
        self.actors.clear()


def rank_actor(options: Mapping[str, object]) -> ActorHandle:
    return ray.remote(concurrency_groups={STATUS_GROUP: 1})(RankActor).options(**options).remote()


def start_shard(
    setup: Setup, span: Span, ranks: int, placement: Placement, bundle: int
) -> tuple[ActorHandle, ObjectRef]:
    """Start an actor in its bundle; return it, and a reference that resolves when all ranks have loaded `span`."""
    share = {kind: amount / ranks for kind, amount in placement.bundle.items()}
    options = {
        "num_cpus": share.get("CPU", 0),
        "num_gpus": share.get("GPU", 0),
        "scheduling_strategy": placement.strategy(bundle),
    }
    actor = rank_actor(options)
    return actor, actor.load.remote(setup, span, ranks, options, None)


def await_shards(loading: Sequence[ObjectRef]) -> None:
    """Wait for the references of `start_shard`. Raises what is wrong with the model, or WorkerLostError."""
    with worker_errors():
        ray.get(list(loading))


@contextmanager
def pipeline_slot(pipelines: Sequence[RayPipeline], trial: str) -> Iterator[RayPipeline]:
    """Yield one of the replicas with a slot for the trial; wait until one has a free slot.

    Raises WorkerLostError with `not_started` when a replica is broken: no trial starts until it is repaired.
    """
    chosen = None
    try:
        while chosen is None:
            chosen = next((pipeline for pipeline in pipelines if pipeline.acquire_slot(trial)), None)
            if chosen is None:
                time.sleep(SLOT_POLL_SECONDS)
    except WorkerLostError as lost:
        raise WorkerLostError(lost.cause, not_started=True) from lost
    try:
        yield chosen
    finally:
        chosen.release_slot(trial)
