"""Opens the model of a prepared job: its workers in this process, or as Ray actors in replicas of a pipeline.

What is run on the opened pipelines is not here: masks are in `masks`, trials in `trial` and `tune_runner`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from mlprune.console import step
from mlprune.models.zero import Offload, compile_disk_access
from mlprune.runtime.connection import cluster_is_running, ray_session
from mlprune.runtime.replicas import ReplicaGroup, host_memory_per_worker, worker_count
from mlprune.shards.pipeline import LocalPipeline, Pipeline
from mlprune.shards.worker import Setup, ShardWorker
from mlprune.sweep.prepare import Prepared

T = TypeVar("T")


def worker_setup(prepared: Prepared) -> Setup:
    """Return what every worker needs to load its layers.

    Where weights are offloaded to a disk of this machine, DeepSpeed's disk access is compiled first.
    """
    spec, device, offload = prepared.spec, prepared.machine.device, None
    if target := prepared.plan.residency.offload:
        offload = Offload(target, spec.offload_folder, prepared.model_size.packed)
        if target == "nvme" and not cluster_is_running():  # a cluster's nodes each compile it when they load
            with step("making DeepSpeed's disk access ready (compiled once, which takes minutes)"):
                compile_disk_access(device)
    return Setup(
        prepared.source, spec.model.dtype, device.type, prepared.moment_store(), offload, prepared.plan.kept_masks
    )


@contextmanager
def open_replicas(prepared: Prepared, replicas: int | None = None) -> Iterator[ReplicaGroup]:
    """Hold the model in Ray actors while the block runs, `replicas` times (default: as often as was planned)."""
    setup, plan = worker_setup(prepared), prepared.plan
    plan = plan if replicas is None else replace(plan, replicas=replicas)
    with contextlib.ExitStack() as stack:
        with step("connecting to Ray"):
            memory = host_memory_per_worker(plan, prepared.machine) * worker_count(plan)
            stack.enter_context(ray_session(memory))
        group = ReplicaGroup(setup, plan, prepared.machine, prepared.spec.pipeline.wait_minutes)
        stack.callback(group.close)
        ranks = f", {plan.residency.ranks} ranks each" if plan.residency.ranks > 1 else ""
        times = f" {plan.replicas} times" if plan.replicas > 1 else ""
        with step(f"loading the model{times} into {len(plan.spans)} shard(s){ranks}"):
            group.repair()
        yield group


@contextmanager
def open_local(prepared: Prepared) -> Iterator[LocalPipeline]:
    """Hold all shards of the model in this process while the block runs."""
    setup = worker_setup(prepared)
    with step("loading the model"):
        pipeline = LocalPipeline([ShardWorker(setup, span) for span in prepared.spans], prepared.plan.chunks)
    try:
        yield pipeline
    finally:
        pipeline.close()


def run_on_model(prepared: Prepared, what: str, work: Callable[[Pipeline], T]) -> T:
    """Open the model, call `work` with its pipeline and return the result.

    A single shard is loaded into this process, several become Ray actors. On a running cluster even a single
    shard goes to the nodes, because this machine may be a small head node. Over Ray, `work` is called again when
    a worker dies while it runs; `what` names it in messages.
    """
    if cluster_is_running() or len(prepared.spans) * prepared.plan.residency.ranks > 1:
        with open_replicas(prepared, replicas=1) as group:
            return group.run_with_retries(what, work)
    with open_local(prepared) as pipeline:
        return work(pipeline)
