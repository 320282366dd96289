"""The pipeline over Ray: one actor a rank of a shard. The only door to Ray core.

Hidden states go from actor to actor as Ray objects, in shared memory on one node. What arrives that way is
read-only; a layer never writes to its input (tests/test_replay.py holds every family to that).
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayError, RayTaskError

from mlprune.errors import MlpruneError, WorkerLostError
from mlprune.models.hollow import Span
from mlprune.models.residency import Ranks
from mlprune.models.zero import open_rendezvous
from mlprune.planning.memory import Chunks
from mlprune.runtime.placement import Place
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

    def __init__(self) -> None:
        self._others: list[Any] = []
        self._busy, self._since, self._trials = 0.0, 0.0, set[str]()
        self._lock, self._broken = threading.Lock(), False
        self._worker: ShardWorker | None = None

    def load(self, setup: Setup, span: Span, size: int, options: dict[str, Any], ranks: Ranks | None) -> None:
        """Load the layers; on the first rank, start the others. Ray buries a constructor's errors."""
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

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def usage(self) -> Usage:
        """Answers at once, whatever the worker is at; WorkerLostError when its ranks broke off."""
        if self._broken:
            raise WorkerLostError("a rank of the shard broke off")
        with self._lock:
            now = time.monotonic()
            busy = self._busy + (now - self._since if self._since else 0.0)
        tokens = self._worker.tokens if self._worker else 0
        return Usage(ray.util.get_node_ip_address(), now, busy, tokens)

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
        assert self._worker is not None, "not loaded"
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
        """What went wrong here leaves the other ranks waiting for it: none stays, and the shard is lost."""
        self._broken = True
        for actor in self._others:
            ray.kill(actor)
        assert self._worker is not None
        if not self._worker.ranks.is_first:
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


def rank_actor(options: dict[str, Any]) -> Any:
    return ray.remote(concurrency_groups={WATCH: 1})(RankActor).options(**options).remote()


def start_shard(setup: Setup, span: Span, ranks: int, place: Place, bundle: int) -> tuple[Any, Any]:
    """An actor in its bundle, and the promise that it and the other ranks have loaded the layers of `span`."""
    share = {kind: amount / ranks for kind, amount in place.bundle.items()}
    options = {
        "num_cpus": share.get("CPU", 0),
        "num_gpus": share.get("GPU", 0),
        "scheduling_strategy": place.strategy(bundle),
    }
    actor = rank_actor(options)
    return actor, actor.load.remote(setup, span, ranks, options, None)


def await_shards(loading: Sequence[Any]) -> None:
    """Wait for what `start_shard` promised. Raises what is wrong with the model, or WorkerLostError."""
    with _told_plainly():
        ray.get(list(loading))


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
    who = "a shard's worker" + "".join(f" on {ip}" for ip in re.findall(r"\bip: ([\w.:]+)", text)[:1])
    if isinstance(error, ObjectStoreFullError):
        return f"Ray's object store is full: start Ray with a larger one (--object-store-memory). {text[:200]}"
    if isinstance(error, OutOfDiskError):
        return f"the disk to which Ray's object store spills is full: {text[:200]}"
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return f"{who} was killed because its node ran low on memory: take larger nodes, or more shards"
    if re.search(r"node (has )?(died|dead|was terminated)|node .{0,80}(died|terminated|removed|dead)", text):
        return f"{who} is gone with its node"
    if "SIGKILL" in text or "worker process has died" in text:
        return f"{who} died; if nobody killed it, it crashed, or its machine's memory ran out (dmesg tells)"
    return f"{who} or what it sent is gone: {text[:300]}"
