"""Replicas of a pipeline over Ray: each on places of its own, and mended when a worker dies.

It lives in the driver. A trial is handed the pipelines; when one breaks, the trials that use it end, no other
begins, and the driver, which then is alone with the workers, has the broken ones mended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from mlprune.console import step, warn
from mlprune.errors import MlpruneError, SweepError, WorkerLostError
from mlprune.models.hollow import Span
from mlprune.planning.machine import Machine
from mlprune.planning.planner import Plan
from mlprune.runtime.actors import RayPipeline, await_shards, start_shard
from mlprune.runtime.placement import Place, bundle_for
from mlprune.runtime.ray_cluster import ray_for
from mlprune.shards.worker import Setup

T = TypeVar("T")
MOST_DEATHS = 3  # at the same place, before it is given up


class Replica:
    """One pipeline, its places, and what it takes to start a shard of it again."""

    def __init__(self, setup: Setup, plan: Plan, place: Place) -> None:
        self._setup, self._plan, self._place = setup, plan, place
        self._order: list[int] = []  # the bundle of each shard
        self._actors: list[Any] = [None] * len(plan.spans)

    @property
    def pipeline(self) -> RayPipeline:
        return RayPipeline(self._actors, self._plan.spans, self._plan.chunks, self._plan.trials)

    def start(self, wait_minutes: float | None) -> list[Any]:
        """Start the shards that are not there: promises that they have loaded, to be awaited."""
        self._place.wait(wait_minutes)
        self._order = self._order or self._place.order()
        loading = []
        for shard, bundle in enumerate(self._order):
            if not _alive(self._actors[shard]):
                if self._actors[shard] is not None:
                    ray.kill(self._actors[shard])  # it may live, with ranks that do not, and hold its bundle
                span, ranks = self._plan.spans[shard], self._plan.residency.ranks
                self._actors[shard], loaded = start_shard(self._setup, span, ranks, self._place, bundle)
                loading.append(loaded)
        return loading

    def whole(self) -> bool:
        return all(map(_alive, self._actors))

    def close(self) -> None:
        """End the workers and give their places back."""
        if any(self._actors):
            with contextlib.suppress(MlpruneError):
                self.pipeline.close()
        self._place.remove()


def _alive(actor: Any) -> bool:
    if actor is None:
        return False
    try:
        ray.get(actor.usage.remote())
    except RayError:
        return False
    return True


def _memory(plan: Plan, machine: Machine) -> int:
    """Bytes that the largest worker takes of its node's memory."""
    return max(need.host if machine.gpus else need.total for need in plan.memory)


class Fleet:
    """All replicas."""

    def __init__(self, setup: Setup, plan: Plan, machine: Machine, wait_minutes: float | None) -> None:
        workers = len(plan.spans) * plan.residency.ranks * plan.replicas
        bundle = bundle_for(machine, workers, plan.residency.ranks, _memory(plan, machine))
        self._plan, self._wait_minutes = plan, wait_minutes
        # all are asked for at once, so that an autoscaler sees all that is wanted
        self._replicas = [Replica(setup, plan, Place.ask(len(plan.spans), bundle)) for _ in range(plan.replicas)]

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._plan.spans

    @property
    def pipelines(self) -> list[RayPipeline]:
        return [replica.pipeline for replica in self._replicas]

    def mend(self) -> None:
        """Start the shards that are not there, and have all forget what trials left. No trial may be under way.

        Raises SweepError when workers die again and again while they load.
        """
        for deaths in range(1, MOST_DEATHS + 1):
            try:
                broken = [replica for replica in self._replicas if not replica.whole()]
                await_shards([loading for one in broken for loading in one.start(self._wait_minutes)])
                for replica in self._replicas:
                    replica.pipeline.everywhere("forget_trials")
                return
            except WorkerLostError as lost:
                if deaths == MOST_DEATHS:
                    raise SweepError(f"workers died {deaths} times while they loaded: {lost}") from lost
                warn(f"while loading: {lost}")

    def steadily(self, what: str, work: Callable[[RayPipeline], T], replica: int = 0) -> T:
        """What `work` makes of a pipeline; done again on a mended one when a worker died under it.

        Raises SweepError with the cause when that happens too often.
        """
        for deaths in range(1, MOST_DEATHS + 1):
            try:
                return work(self._replicas[replica].pipeline)
            except WorkerLostError as lost:
                if deaths == MOST_DEATHS:
                    raise SweepError(f"{what}: a worker died {deaths} times: {lost}") from lost
                warn(f"{what}: {lost}; once more")
                self.mend()
        raise AssertionError

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()


@contextmanager
def fleet_on_ray(setup: Setup, plan: Plan, machine: Machine, wait_minutes: float | None) -> Iterator[Fleet]:
    """The model as Ray actors, for as long as the block runs; Ray is started where none runs."""
    ranks, replicas = plan.residency.ranks, plan.replicas
    with contextlib.ExitStack() as stack:
        with step("finding Ray"):
            stack.enter_context(ray_for(_memory(plan, machine) * ranks * replicas * len(plan.spans)))
        fleet = Fleet(setup, plan, machine, wait_minutes)
        stack.callback(fleet.close)
        each = f", {ranks} ranks each" if ranks > 1 else ""
        times = f" {replicas} times" if replicas > 1 else ""
        with step(f"loading the model{times} into {len(plan.spans)} shard(s){each}"):
            fleet.mend()
        yield fleet
