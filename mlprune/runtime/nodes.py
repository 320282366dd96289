"""The nodes of the Ray cluster that runs: which can hold shards, what each offers, and waiting for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlprune.console import size_text
from mlprune.errors import SpecError
from mlprune.planning.machine import Machine, local_machine, visible_gpus
from mlprune.runtime.connection import connect

logger = logging.getLogger(__name__)

QUIET_SECONDS = 2  # a shorter wait is not logged
LOG_SECONDS = 30  # between two messages about the same wait
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
DEFAULT_MAX_NODES = 64  # where the autoscaler does not tell its maximum


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    resources: Mapping[str, float]  # GPU, CPU, memory, ...


def usable_nodes() -> list[Node]:
    """Return the nodes that can hold shards: those with GPUs, or if there are none, those with CPUs."""
    nodes = [Node(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    for kind in ("GPU", "CPU"):
        if usable := [node for node in nodes if node.resources.get(kind, 0) > 0]:
            return usable
    return []


def cluster_machine(wait_minutes: float | None = None, launch: bool = True) -> Machine | None:
    """Return the nodes of the running Ray cluster, as measured on them; None if none runs.

    Where nodes differ, the smallest value of each quantity counts. Where an autoscaler may launch nodes and none
    runs yet, one is requested and waited for, because only a running node can be measured. With `launch` False,
    SpecError asks for a description of the machine instead.
    """
    if not connect():
        return None
    launchable, demand = _launchable()
    if demand and not _has(usable_nodes(), demand):
        if not launch:
            remedy = "the cluster launches its nodes when a sweep needs them: describe how many, and one node"
            raise SpecError("--nodes", "nothing", remedy)
        _launch_first_node(demand, wait_minutes)
    message = "waiting for a node of the cluster that has GPUs or CPUs"
    wait_until(lambda: bool(usable_nodes()), lambda: message, wait_minutes)
    nodes = usable_nodes()
    machine = _smallest([_measure(node) for node in nodes])
    if demand and launchable > len(nodes):
        return replace(machine, nodes=launchable, elastic=True)
    return machine


def _measure(node: Node) -> Machine:
    """Measure a node on the node itself, with no more GPUs and memory than its Ray offers."""
    on_node = NodeAffinitySchedulingStrategy(node.id, soft=False)
    measured: Machine = ray.get(ray.remote(_this_node).options(num_cpus=0, scheduling_strategy=on_node).remote())
    return replace(
        measured,
        gpus=min(measured.gpus, int(node.resources.get("GPU", 0))),
        host_memory=min(measured.host_memory, int(node.resources.get("memory", measured.host_memory))),
    )


def _this_node() -> Machine:
    """Measure this node. Ray hides GPUs from a task that requests none; the driver's tool lists them all."""
    return local_machine(visible_gpus())


def _smallest(machines: Sequence[Machine]) -> Machine:
    nodes = [node for node in machines if node.gpus] or machines
    return Machine(
        nodes=len(nodes),
        gpus=min(node.gpus for node in nodes),
        gpu_memory=min(node.gpu_memory for node in nodes),
        host_memory=min(node.host_memory for node in nodes),
        host_to_device=min(node.host_to_device for node in nodes),
        flops=min(node.flops for node in nodes),
    )


def _launchable() -> tuple[int, dict[str, float]]:
    """Return the most nodes that an autoscaler may launch of the kind for shards, and the GPU or CPU of a node.

    Ray has no interface for it. `ray up` leaves its configuration on the head node; any other autoscaler, e.g. on
    Kubernetes, is only known to exist.
    """
    import yaml  # not at the top: every worker imports this module and would hold it in memory

    from mlprune.spec.loading import read_yaml

    try:
        config = read_yaml(BOOTSTRAP.expanduser().read_text())
    except (OSError, yaml.YAMLError):
        return (DEFAULT_MAX_NODES, {"CPU": 1.0}) if _has_autoscaler() else (0, {})
    if config["provider"]["type"] == "local":  # all of its nodes run already, or are starting
        return 0, {}
    node_types = config["available_node_types"].values()
    for kind in ("GPU", "CPU"):
        counts = [node.get("max_workers", 0) for node in node_types if node.get("resources", {}).get(kind, 0) > 0]
        if sum(counts):
            return min(sum(counts), config["max_workers"]), {kind: 1.0}
    return 0, {}


def _has_autoscaler() -> bool:
    """Whether an autoscaler has registered with the cluster (Ray's second version does)."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return status.stats.autoscaler_version not in (None, "0")


def _has(nodes: Sequence[Node], demand: Mapping[str, float]) -> bool:
    return any(all(node.resources.get(kind, 0) >= amount for kind, amount in demand.items()) for node in nodes)


def _launch_first_node(demand: dict[str, float], wait_minutes: float | None) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[demand])
    try:
        message = f"waiting for a first node with {resources_text(demand)}"
        wait_until(lambda: _has(usable_nodes(), demand), lambda: message, wait_minutes)
    finally:
        request_resources(bundles=[])


def wait_until(done: Callable[[], bool], message: Callable[[], str], minutes: float | None) -> None:
    """Wait until `done`, and log the message after 2 s and then every 30 s.

    Raises SpecError after `minutes`; None means no limit.
    """
    started = time.monotonic()
    limit = float("inf") if minutes is None else 60 * minutes
    next_log: float = QUIET_SECONDS
    while not done():
        waited = time.monotonic() - started
        if waited >= next_log:
            next_log += LOG_SECONDS
            logger.info("  %s%s", message(), f", {waited / 60:.0f} min so far" if waited >= LOG_SECONDS else "")
        if waited >= limit:
            raise SpecError("pipeline.wait_minutes", minutes, f"{message()}: add nodes, or wait longer")
        time.sleep(0.05 if waited < QUIET_SECONDS else 0.5)  # most waits are short


def resources_text(resources: Mapping[str, float]) -> str:
    """Return resources in readable form: `2 GPU, 1 CPU, 12 GiB`."""
    parts = [f"{amount:.4g} {kind}" for kind, amount in resources.items() if kind != "memory" and amount]
    return ", ".join([*parts, *([size_text(resources["memory"])] if resources.get("memory") else [])])
