"""The pipeline over Ray: one actor a rank of a shard. The only door to Ray core.

Hidden states go from actor to actor as Ray objects, in shared memory on one node. What arrives that way is
read-only; a layer never writes to its input (tests/test_replay.py holds every family to that).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from mlprune.errors import MlpruneError, WorkerLostError
from mlprune.models.hollow import Span
from mlprune.models.residency import Ranks
from mlprune.models.zero import meeting_place
from mlprune.shards.cluster import Place
from mlprune.shards.memory import Chunks
from mlprune.shards.pipeline import Pipeline
from mlprune.shards.worker import Setup, ShardWorker

CLOSING_SECONDS = 10
ADMITTED_SECONDS = 0.2  # between two questions of a trial for a free replica
WATCH = "watch"  # the concurrency group that answers while the worker works


@dataclass(frozen=True)
class Usage:
    """What a shard's first rank has done since it was started, and where it is."""

    node: str  # its address
    at: float  # its own clock, seconds
    busy: float  # seconds that it worked
    tokens: int  # that passed its layers


class RankActor:
    """One rank of a shard, as an actor. The first rank starts the others and is the one that is called.

    It hands each call on before it works itself, so that all ranks do the same things in the same order: what one
    of them waits for, in a collective, the others are doing.
    """

    def __init__(self, setup: Setup, span: Span, size: int, options: dict[str, Any], ranks: Ranks | None) -> None:
        self._others: list[Any] = []
        if ranks is None:
            address = ""
            if size > 1:
                self._store, address = meeting_place(ray.util.get_node_ip_address(), size)
            rank_actor = ray.remote(RankActor).options(**options)
            self._others = [
                rank_actor.remote(setup, span, size, options, Ranks(rank, size, address))
                for rank in range(1, size)
            ]
            ranks = Ranks(0, size, address)
        self._busy, self._since, self._trials = 0.0, 0.0, set[str]()
        self._lock = threading.Lock()
        self._worker = ShardWorker(setup, span, ranks)

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def usage(self) -> Usage:
        with self._lock:
            now = time.monotonic()
            busy = self._busy + (now - self._since if self._since else 0.0)
        return Usage(ray.util.get_node_ip_address(), now, busy, self._worker.tokens)

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def admit(self, trial: str, most: int) -> bool:
        """Whether the trial may use the pipeline, `most` at once. Asked of the first shard."""
        if len(self._trials - {trial}) < most:
            self._trials.add(trial)
        return trial in self._trials

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def dismiss(self, trial: str) -> None:
        self._trials.discard(trial)

    def run(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Call the worker's method on every rank: this one's value, and references to the others'.

        `args` are this rank's arguments, and then for each of them the others' (a list of references) or None.
        """
        with self._lock:
            self._since = time.monotonic()
        try:
            return self._run(method, *args, **kwargs)
        finally:
            with self._lock:
                self._busy += time.monotonic() - self._since
                self._since = 0.0

    def _run(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        own, others = args[: len(args) // 2], args[len(args) // 2 :]
        values = []
        for number, actor in enumerate(self._others):
            given = [mine if theirs is None else theirs[number] for mine, theirs in zip(own, others, strict=True)]
            values.append(
                actor.run.options(num_returns=2).remote(method, *given, *[None] * len(given), **kwargs)[0]
            )
        try:
            return getattr(self._worker, method)(*own, **kwargs), values
        except MlpruneError:
            raise  # every rank finds the same mistake
        except Exception as error:
            if self._worker.ranks.size == 1:
                raise
            self._break_off()
            raise WorkerLostError(f"a rank of the shard broke off: {type(error).__name__}: {error}") from error

    def _break_off(self) -> None:
        """What went wrong here leaves the other ranks waiting for it: none of them stays."""
        for actor in self._others:
            ray.kill(actor)
        if not self._worker.ranks.leads:
            traceback.print_exc()
            os._exit(1)


@dataclass(frozen=True)
class Promise:
    """What a call will return: the first rank's value, and a list of references to the other ranks'."""

    own: Any
    others: Any


class RayPipeline(Pipeline):
    """All shards as actors. May be pickled to a trial, which then talks to the same actors.

    An actor that died stays dead to whoever holds this: what it had summed or masked is gone, and a new one must
    not be taken for it. `renew` gives another pipeline.
    """

    def __init__(self, actors: Sequence[Any], spans: Sequence[Span], chunks: Chunks, trials: int) -> None:
        super().__init__(spans, chunks)
        self.actors = list(actors)
        self._trials = trials

    def call(self, shard: int, method: str, *args: Any, **kwargs: Any) -> Promise:
        own = [arg.own if isinstance(arg, Promise) else arg for arg in args]
        others = [arg.others if isinstance(arg, Promise) else None for arg in args]
        run = self.actors[shard].run.options(num_returns=2)
        return Promise(*run.remote(method, *own, *others, **kwargs))

    def get(self, promise: Promise) -> list[Any]:
        with _told_plainly():
            own, others = ray.get([promise.own, promise.others])
            return [own, *ray.get(others)]

    def look(self, seconds: float) -> list[Usage | None]:
        """What each shard has done, whatever it is at; None of one that is dead, or does not answer in time."""
        asked = [actor.usage.remote() for actor in self.actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=seconds)
        found: list[Usage | None] = []
        for answer in asked:
            found.append(None)
            if answer in answered:
                with contextlib.suppress(RayError):
                    found[-1] = ray.get(answer)
        return found

    def admit(self, trial: str) -> bool:
        """Whether there is room for the trial. Raises WorkerLostError when a shard is dead."""
        with _told_plainly():
            ray.get([actor.usage.remote() for actor in self.actors])
            return bool(ray.get(self.actors[0].admit.remote(trial, self._trials)))

    def dismiss(self, trial: str, variant: str | None = None) -> None:
        """The trial has ended; if it broke off, what it left of its `variant` is let go of. Waits for nothing."""
        self.actors[0].dismiss.remote(trial)
        if variant is not None:
            for shard in range(len(self.actors)):
                self.call(shard, "abandon", variant)

    def close(self) -> None:
        """Let the workers put away what they have on disk, if they still can, and end them."""
        for promise in [self.call(shard, "close") for shard in range(len(self.actors))]:
            with contextlib.suppress(RayError):  # dead, or busy: then the next that comes puts it away
                _, others = ray.get([promise.own, promise.others], timeout=CLOSING_SECONDS)
                ray.get(others, timeout=CLOSING_SECONDS)
        for actor in self.actors:
            ray.kill(actor)
        self.actors.clear()


def start_shard(setup: Setup, span: Span, ranks: int, place: Place, bundle: int) -> Any:
    """An actor that loads the layers of `span`, in its bundle; the other ranks of the shard in the same."""
    share = {kind: amount / ranks for kind, amount in place.bundle.items()}
    options = {
        "num_cpus": share.get("CPU", 0),
        "num_gpus": share.get("GPU", 0),
        "scheduling_strategy": place.strategy(bundle),
    }
    worker = ray.remote(concurrency_groups={WATCH: 1})(RankActor).options(**options)
    return worker.remote(setup, span, ranks, options, None)


@contextmanager
def admitted(pipelines: Sequence[RayPipeline], trial: str) -> Iterator[RayPipeline]:
    """One of the replicas, for as long as the block runs; waits until one has room.

    Raises WorkerLostError, with `drained` set, when a replica is broken: nothing new begins until it is mended.
    """
    chosen = None
    try:
        while chosen is None:
            chosen = next((pipeline for pipeline in pipelines if pipeline.admit(trial)), None)
            if chosen is None:
                time.sleep(ADMITTED_SECONDS)
    except WorkerLostError as lost:
        raise WorkerLostError(lost.cause, drained=True) from lost
    try:
        yield chosen
    finally:
        chosen.dismiss(trial)


@contextmanager
def _told_plainly() -> Iterator[None]:
    """Of what Ray raises, the user's mistakes as they are, and the death of a worker as WorkerLostError."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, MlpruneError):
            raise cause from None  # without the worker's traceback around it
        if isinstance(cause, RayError):
            raise WorkerLostError(cause_of_death(cause)) from error
        raise
    except RayError as error:
        raise WorkerLostError(cause_of_death(error)) from error


def cause_of_death(error: BaseException) -> str:
    """One line on why a worker, or what it had sent, is gone."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if isinstance(error, ObjectStoreFullError):
        return f"Ray's object store is full: start Ray with a larger one (--object-store-memory). {text[:200]}"
    if isinstance(error, OutOfDiskError):
        return f"the disk that Ray spills to is full: {text[:200]}"
    if "memory monitor" in lower or "out of memory" in lower or "out-of-memory" in lower or "oom" in lower:
        return f"killed for memory: plan less a worker (mlprune plan), or take larger nodes. {text[:300]}"
    if "node" in lower and ("died" in lower or "dead" in lower or "terminated" in lower):
        return f"its node is gone: {text[:300]}"
    return f"a shard's worker died: {text[:300]}"
