"""The pipeline over Ray: one actor a rank of a shard. The only door to Ray core.

Hidden states go from actor to actor as Ray objects, in shared memory on one node. What arrives that way is
read-only; a layer never writes to its input (tests/test_replay.py holds every family to that).
"""

from __future__ import annotations

import contextlib
import math
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlprune.errors import MlpruneError
from mlprune.models.hollow import Span
from mlprune.models.residency import Ranks
from mlprune.models.zero import meeting_place
from mlprune.shards.machine import Machine, gpus_here, machine_with
from mlprune.shards.memory import Chunks
from mlprune.shards.pipeline import Pipeline
from mlprune.shards.worker import Setup, ShardWorker

TRIAL_SLOT = "trial_slot"  # trials take no CPU of their own: this many talk to the pipeline at once
CLOSING_SECONDS = 10


@contextmanager
def local_ray(trial_slots: int) -> Iterator[None]:
    """Ray on this machine, for as long as the block runs; a Ray that already runs in this process is used."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # every shard uses all cores (see ShardWorker); threads that wait must not spin on them
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ray.init(
        address="local",
        resources={TRIAL_SLOT: trial_slots},
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    # what comes out of the object store is read-only, and is only read
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_machine() -> Machine | None:
    """The nodes of the Ray cluster that runs, as their own tools report them; None if none runs.

    Of nodes that differ, the least of each; if any has GPUs, only those that do.
    """
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        except ConnectionError:
            return None
    try:
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        here = [NodeAffinitySchedulingStrategy(node, soft=False) for node in alive]
        look = ray.remote(_look)
        seen = ray.get([look.options(num_cpus=0, scheduling_strategy=place).remote() for place in here])
    finally:
        if ours:
            ray.shutdown()
    nodes = [node for node in seen if node.gpus] or seen
    return Machine(
        nodes=len(nodes),
        gpus=min(node.gpus for node in nodes),
        gpu_memory=min(node.gpu_memory for node in nodes),
        host_memory=min(node.host_memory for node in nodes),
        host_to_device=min(node.host_to_device for node in nodes),
        flops=min(node.flops for node in nodes),
    )


def _look() -> Machine:
    """A node as it sees itself. A task that asks for no GPU is shown none by Ray; the driver's tool shows all."""
    return machine_with(gpus_here())


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
        self._worker = ShardWorker(setup, span, ranks)

    def run(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Call the worker's method on every rank: this one's value, and references to the others'.

        `args` are this rank's arguments, and then for each of them the others' (a list of references) or None.
        """
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
        except Exception:
            self._break_off()
            raise

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
    """All shards as actors. May be pickled to a trial, which then talks to the same actors."""

    def __init__(self, actors: Sequence[Any], spans: Sequence[Span], chunks: Chunks) -> None:
        super().__init__(spans, chunks)
        self._actors = list(actors)

    @classmethod
    def launch(cls, setup: Setup, spans: Sequence[Span], chunks: Chunks, ranks: int = 1) -> RayPipeline:
        """Start `ranks` actors a span and wait until all have loaded; if one cannot, none stays."""
        workers = len(spans) * ranks
        gpus = torch.cuda.device_count()
        cpus = ray.cluster_resources().get("CPU", 1)
        a_gpu = math.ceil(workers / gpus) if gpus else 0  # workers that share one
        options = {"num_cpus": min(1, cpus / workers), "num_gpus": 1 / a_gpu if gpus else 0}
        worker = ray.remote(RankActor).options(**options)
        actors = [worker.remote(setup, span, ranks, options, None) for span in spans]
        pipeline = cls(actors, spans, chunks)
        try:
            pipeline.everywhere("ready")
        except BaseException:
            pipeline.close()
            raise
        return pipeline

    def call(self, shard: int, method: str, *args: Any, **kwargs: Any) -> Promise:
        own = [arg.own if isinstance(arg, Promise) else arg for arg in args]
        others = [arg.others if isinstance(arg, Promise) else None for arg in args]
        run = self._actors[shard].run.options(num_returns=2)
        return Promise(*run.remote(method, *own, *others, **kwargs))

    def get(self, promise: Promise) -> list[Any]:
        try:
            own, others = ray.get([promise.own, promise.others])
            return [own, *ray.get(others)]
        except RayTaskError as error:
            if isinstance(error.cause, MlpruneError):
                raise error.cause from None  # the user's mistake, without the worker's traceback around it
            raise

    def close(self) -> None:
        """Let the workers put away what they have on disk, if they still can, and end them."""
        for promise in [self.call(shard, "close") for shard in range(len(self._actors))]:
            with contextlib.suppress(RayError):  # dead, or busy: then the next that comes puts it away
                _, others = ray.get([promise.own, promise.others], timeout=CLOSING_SECONDS)
                ray.get(others, timeout=CLOSING_SECONDS)
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
