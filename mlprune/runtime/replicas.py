"""Replicas of a pipeline over Ray, each with its own placement, and the repair of replicas that lost workers.

Only the driver uses this module. A trial receives pipelines; when one loses a worker, the trials on it end, no
other trial starts, and the driver, which is then the only user of the workers, repairs the broken replicas. Which
trials run again is decided in `sweep.failure_policy`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import ray
from ray.exceptions import RayError

from mlprune.errors import MlpruneError, SweepError, WorkerLostError
from mlprune.models.hollow import Span
from mlprune.planning.machine import Machine
from mlprune.planning.planner import Plan
from mlprune.runtime.actors import RayPipeline, await_shards, start_shard
from mlprune.runtime.placement import Placement, bundle_for
from mlprune.shards.worker import Setup, ShardWorker

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_WORKER_LOSSES = 3  # of one step of work, or of one trial, before it fails


class Replica:
    """One pipeline, its placement, and what is needed to start a shard of it again."""

    def __init__(self, setup: Setup, plan: Plan, placement: Placement) -> None:
        self._setup, self._plan, self._placement = setup, plan, placement
        self._order: list[int] = []  # the bundle of each shard
        self._actors: list[ActorHandle | None] = [None] * len(plan.spans)

    @property
    def pipeline(self) -> RayPipeline:
        return RayPipeline(self._actors, self._plan.spans, self._plan.chunks, self._plan.trials)

    def start(self, wait_minutes: float | None) -> list[ObjectRef]:
        """Start the shards that are not running; return references that resolve when they have loaded."""
        self._placement.wait(wait_minutes)
        self._order = self._order or self._placement.order()
        loading = []
        for shard, bundle in enumerate(self._order):
            actor = self._actors[shard]
            if not _is_alive(actor):
                if actor is not None:
                    # it may be alive while other ranks of its shard are not, and then still occupies its bundle
                    ray.kill(actor)
                span, ranks = self._plan.spans[shard], self._plan.residency.ranks
                self._actors[shard], loaded = start_shard(self._setup, span, ranks, self._placement, bundle)
                loading.append(loaded)
        return loading

    def is_complete(self) -> bool:
        return all(map(_is_alive, self._actors))

    def close(self) -> None:
        """End the workers and release the placement."""
        if any(self._actors):
            with contextlib.suppress(MlpruneError):
                self.pipeline.close()
        self._placement.remove()


def _is_alive(actor: ActorHandle | None) -> bool:
    if actor is None:
        return False
    try:
        ray.get(actor.usage.remote())
    except RayError:
        return False
    return True


def host_memory_per_worker(plan: Plan, machine: Machine) -> int:
    """Return the host memory of the largest worker, in bytes."""
    return max(need.host if machine.gpus else need.total for need in plan.memory)


def worker_count(plan: Plan) -> int:
    """Return the number of worker processes of all replicas."""
    return len(plan.spans) * plan.residency.ranks * plan.replicas


class ReplicaGroup:
    """All replicas. They start at the first `repair`."""

    def __init__(self, setup: Setup, plan: Plan, machine: Machine, wait_minutes: float | None) -> None:
        ranks = plan.residency.ranks
        bundle = bundle_for(machine, worker_count(plan), ranks, host_memory_per_worker(plan, machine))
        self._plan, self._wait_minutes = plan, wait_minutes
        # all are requested at once, so that an autoscaler sees the whole demand
        placements = [Placement.request(len(plan.spans), bundle) for _ in range(plan.replicas)]
        self._replicas = [Replica(setup, plan, placement) for placement in placements]

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._plan.spans

    @property
    def pipelines(self) -> list[RayPipeline]:
        return [replica.pipeline for replica in self._replicas]

    def repair(self) -> None:
        """Start the shards that are not running, and reset what trials left in the others. No trial may run.

        Raises SweepError when workers die repeatedly while they load.
        """
        for losses in range(1, MAX_WORKER_LOSSES + 1):
            try:
                broken = [replica for replica in self._replicas if not replica.is_complete()]
                await_shards([loading for replica in broken for loading in replica.start(self._wait_minutes)])
                for pipeline in self.pipelines:
                    pipeline.call_all(ShardWorker.reset_trials)
                return
            except WorkerLostError as lost:
                if losses == MAX_WORKER_LOSSES:
                    raise SweepError(f"workers died {losses} times while they loaded: {lost}") from lost
                logger.warning("a worker died while it loaded: %s; starting it again", lost)

    def run_with_retries(self, what: str, work: Callable[[RayPipeline], T], replica: int = 0) -> T:
        """Call `work` with a replica's pipeline and return its result; repeat it on a repaired one after a loss.

        `what` names the work in messages. Raises SweepError with the cause after MAX_WORKER_LOSSES losses.
        """
        for losses in range(1, MAX_WORKER_LOSSES + 1):
            try:
                return work(self._replicas[replica].pipeline)
            except WorkerLostError as lost:
                if losses == MAX_WORKER_LOSSES:
                    raise SweepError(f"{what}: a worker died {losses} times: {lost}") from lost
                logger.warning("%s: %s; trying again", what, lost)
                self.repair()
        raise AssertionError

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()
