"""The Ray that shards run on: the cluster that runs here, or one of our own; and its nodes."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.utils import read_ray_address
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlprune.console import say, size_text, step, warn
from mlprune.errors import SpecError
from mlprune.planning.machine import Machine, gpus_here, machine_with

# what every worker's process is to have in its environment
ENVIRONMENT = {
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    # every shard uses all cores (see ShardWorker); threads that wait must not spin on them
    "OMP_WAIT_POLICY": "PASSIVE",
}
QUIET_SECONDS = 2  # of a wait, before it is spoken of
SAY_SECONDS = 30  # between two lines on the same wait, where no terminal shows it
KNOCK_SECONDS = 10
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
MOST_NODES = 64  # where nobody says how many there may be


def cluster_address() -> str | None:
    """The address of the cluster to use: RAY_ADDRESS, or what `ray start` left on this machine; None for none."""
    left = Path(get_ray_address_file(None))
    address = os.environ.get("RAY_ADDRESS")
    if not address and left.exists():
        if left.stat().st_uid not in (0, os.getuid()):  # in a folder that everybody may write to
            warn(f"the Ray cluster of another user ({left}) is not used; to use it, set RAY_ADDRESS")
            return None
        address = read_ray_address()
    return None if address in (None, "", "local") else address


def cluster_is_running() -> bool:
    """Whether this process is connected to a cluster that runs, or would be."""
    return cluster_address() is not None


def connect() -> bool:
    """Be a driver of the cluster that runs, for as long as this process lives; False if none runs.

    Raises SpecError when RAY_ADDRESS names one that does not answer.
    """
    address = cluster_address()
    if address is None:
        return False
    if ray.is_initialized():
        return True
    os.environ.update(ENVIRONMENT)
    try:
        _knock(address)
        ray.init(
            address=address,
            runtime_env={"env_vars": ENVIRONMENT},
            log_to_driver=False,
            logging_level="ERROR",
        )
    except AuthenticationError:
        remedy = "it asks for a token: set RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token"
        raise SpecError("RAY_ADDRESS", address, remedy) from None
    except (OSError, RayError, RuntimeError, ValueError) as error:
        if os.environ.get("RAY_ADDRESS"):
            remedy = f"no Ray cluster answers there: {' '.join(str(error).split())[:160]}"
            raise SpecError("RAY_ADDRESS", address, remedy) from None
        warn(f"the Ray cluster at {address}, which `ray start` made here, does not answer: Ray is started anew")
        os.environ["RAY_ADDRESS"] = "local"
        return False
    _quieten()
    return True


def _knock(address: str) -> None:
    """Raise OSError when nobody listens at `host:port`: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


@contextmanager
def ray_session(memory: int) -> Iterator[None]:
    """Ray, for as long as the block runs: the one that this process is connected to, or else one of its own.

    Its own has `memory` bytes to give: what was planned on this machine.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _closed_to_others() as folder:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _memory=memory,
            _temp_dir=folder,
        )
        _quieten()
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _closed_to_others() -> Iterator[str]:
    """For a Ray of our own: ports on loopback alone, a fresh token, and a folder that no one else may enter.

    Ray binds to loopback where its address is loopback, and on Linux takes that for one only if it is told that
    it makes no clusters. It opens its own folder, with its sockets, to everybody: the one around it is ours.
    """
    token, clusters = os.environ.get("RAY_AUTH_TOKEN"), ray_constants.ENABLE_RAY_CLUSTER
    short = os.environ.get("RAY_TMPDIR", "/tmp")  # a socket's path has 107 bytes at most
    with tempfile.TemporaryDirectory(prefix="mlprune-ray-", dir=short, ignore_cleanup_errors=True) as folder:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        AuthenticationTokenLoader.instance().reset_cache()
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield f"{folder}/ray"
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = clusters
            del os.environ["RAY_AUTH_TOKEN"]
            if token is not None:
                os.environ["RAY_AUTH_TOKEN"] = token
            AuthenticationTokenLoader.instance().reset_cache()


def _quieten() -> None:
    # what comes out of the object store is read-only, and is only read
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
    # Ray prints each death of a worker to standard output, where results go, whatever it was told; we tell of it
    ray_worker.print_to_stdstream = lambda *_, **__: None


# nodes


def usable_nodes() -> list[dict[str, Any]]:
    """The nodes that can hold shards: those with GPUs, or if there are none, those with CPUs."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    for kind in ("GPU", "CPU"):
        if found := [node for node in alive if node["Resources"].get(kind, 0) > 0]:
            return found
    return []


def cluster_machine(wait_minutes: float | None = None, launch: bool = True) -> Machine | None:
    """The nodes of the Ray cluster that runs, as their own tools report them; None if none runs.

    Of nodes that differ, the least of each. Where an autoscaler may launch nodes and none is there yet, one is
    asked for and waited for, because what a node has is known when it is there; unless `launch` is False, when
    SpecError asks for the machine's description.
    """
    if not connect():
        return None
    launchable, wanted = _launchable()
    if wanted and not _has(usable_nodes(), wanted):
        if not launch:
            remedy = "the cluster launches its nodes when a sweep wants them: say how many, and what one has"
            raise SpecError("--nodes", None, remedy)
        _first_node(wanted, wait_minutes)
    told = "waiting for a node of the cluster that has GPUs or CPUs"
    wait_until(lambda: bool(usable_nodes()), lambda: told, wait_minutes)
    nodes = usable_nodes()
    machine = _least([_seen(node) for node in nodes])
    if wanted and launchable > len(nodes):
        return replace(machine, nodes=launchable, elastic=True)
    return machine


def _seen(node: Mapping[str, Any]) -> Machine:
    """A node as its own tools report it, with no more memory than its Ray gives away."""
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    looked: Machine = ray.get(ray.remote(_look).options(num_cpus=0, scheduling_strategy=there).remote())
    given = node["Resources"]
    return replace(
        looked,
        gpus=min(looked.gpus, int(given.get("GPU", 0))),
        host_memory=min(looked.host_memory, int(given.get("memory", looked.host_memory))),
    )


def _look() -> Machine:
    """A node as it sees itself. A task that asks for no GPU is shown none by Ray; the driver's tool shows all."""
    return machine_with(gpus_here())


def _least(seen: Sequence[Machine]) -> Machine:
    nodes = [node for node in seen if node.gpus] or seen
    return Machine(
        nodes=len(nodes),
        gpus=min(node.gpus for node in nodes),
        gpu_memory=min(node.gpu_memory for node in nodes),
        host_memory=min(node.host_memory for node in nodes),
        host_to_device=min(node.host_to_device for node in nodes),
        flops=min(node.flops for node in nodes),
    )


def _launchable() -> tuple[int, dict[str, float]]:
    """How many nodes an autoscaler may have at most of the kind that suits shards, and a node's GPUs or CPUs.

    Ray itself does not tell. `ray up` leaves its file on the head; of an autoscaler that works by another, as on
    Kubernetes, all that is known is that it is there.
    """
    import yaml  # not at the top: workers import this module, and each would hold it

    from mlprune.spec.loading import read_yaml

    try:
        made_by = read_yaml(BOOTSTRAP.expanduser().read_text())
    except (OSError, yaml.YAMLError):
        return (MOST_NODES, {"CPU": 1.0}) if _autoscales() else (0, {})
    if made_by["provider"]["type"] == "local":  # all of its nodes are there, or on their way
        return 0, {}
    kinds = made_by["available_node_types"].values()
    for kind in ("GPU", "CPU"):
        counts = [node.get("max_workers", 0) for node in kinds if node.get("resources", {}).get(kind, 0) > 0]
        if sum(counts):
            return min(sum(counts), made_by["max_workers"]), {kind: 1.0}
    return 0, {}


def _autoscales() -> bool:
    """Whether an autoscaler has told the cluster of itself (Ray's second one does)."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return status.stats.autoscaler_version not in (None, "0")


def _has(nodes: Sequence[Mapping[str, Any]], wanted: Mapping[str, float]) -> bool:
    return any(all(node["Resources"].get(k, 0) >= v for k, v in wanted.items()) for node in nodes)


def _first_node(wanted: dict[str, float], wait_minutes: float | None) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[wanted])
    try:
        told = f"waiting for a first node with {resources_text(wanted)}"
        wait_until(lambda: _has(usable_nodes(), wanted), lambda: told, wait_minutes)
    finally:
        request_resources(bundles=[])


def wait_until(done: Callable[[], bool], told: Callable[[], str], minutes: float | None) -> None:
    """Wait until `done`, telling what for. Raises SpecError after `minutes` (None: as long as it takes)."""
    started = said = time.monotonic()
    while not done() and time.monotonic() - started < min(QUIET_SECONDS, 60 * (minutes or QUIET_SECONDS)):
        time.sleep(0.05)  # mostly it is a matter of moments
    if done():
        return
    say(f"  {told()}")
    with step(told()):
        while not done():
            now = time.monotonic()
            if minutes is not None and now - started >= 60 * minutes:
                raise SpecError("pipeline.wait_minutes", minutes, f"{told()}: add nodes, or wait longer")
            if now - said >= SAY_SECONDS:
                said = now
                say(f"  {told()}, {(now - started) / 60:.0f} min so far")
            time.sleep(0.5)


def resources_text(resources: Mapping[str, float]) -> str:
    """As a person reads it: `2 GPU, 1 CPU, 12 GiB`."""
    parts = [f"{amount:.4g} {kind}" for kind, amount in resources.items() if kind != "memory" and amount]
    return ", ".join([*parts, *([size_text(resources["memory"])] if resources.get("memory") else [])])
