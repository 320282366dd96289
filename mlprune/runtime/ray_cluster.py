"""Connects to the Ray cluster that runs, or starts a private Ray on this machine; and reports its nodes.

Actors and placement groups are not here, but in `actors` and `placement`.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import ray
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.utils import read_ray_address
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlprune.console import size_text
from mlprune.errors import SpecError
from mlprune.planning.machine import Machine, local_machine, visible_gpus
from mlprune.runtime.worker_logging import LEVEL_VARIABLE, worker_log_level
from mlprune.storage.scratch import scratch_folder

logger = logging.getLogger(__name__)

QUIET_SECONDS = 2  # a shorter wait is not logged
LOG_SECONDS = 30  # between two messages about the same wait
CONNECT_SECONDS = 10
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
DEFAULT_MAX_NODES = 64  # where the autoscaler does not tell its maximum


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    resources: Mapping[str, float]  # GPU, CPU, memory, ...


def worker_environment() -> dict[str, str]:
    """Return the environment variables that every worker process needs."""
    return {
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
        # every shard uses all cores (see ShardWorker); waiting threads must not spin on them
        "OMP_WAIT_POLICY": "PASSIVE",
        LEVEL_VARIABLE: worker_log_level(),
    }


def cluster_address() -> str | None:
    """Return the address of the cluster to use, if any: RAY_ADDRESS, or what `ray start` left on this machine."""
    left = Path(get_ray_address_file(None))
    address = os.environ.get("RAY_ADDRESS")
    if not address and left.exists():
        if left.stat().st_uid not in (0, os.getuid()):  # in a folder that everybody may write to
            logger.warning("the Ray cluster of another user (%s) is not used; to use it, set RAY_ADDRESS", left)
            return None
        address = read_ray_address()
    return None if address in (None, "", "local") else address


def cluster_is_running() -> bool:
    """Whether a cluster runs that this process is connected to, or would connect to."""
    return cluster_address() is not None


def connect() -> bool:
    """Connect to the cluster that runs, for the life of this process; return False if none runs.

    Raises SpecError when RAY_ADDRESS names a cluster that does not answer.
    """
    address = cluster_address()
    if address is None:
        return False
    if ray.is_initialized():
        return True
    environment = worker_environment()
    os.environ.update(environment)
    try:
        _check_listens(address)
        with _own_sigterm():
            ray.init(
                address=address,
                runtime_env={"env_vars": environment},
                log_to_driver=False,
                logging_level="ERROR",
            )
    except AuthenticationError:
        remedy = "it requires a token: set RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token"
        raise SpecError("RAY_ADDRESS", address, remedy) from None
    except (OSError, RayError, RuntimeError, ValueError) as error:
        if os.environ.get("RAY_ADDRESS"):
            remedy = f"no Ray cluster answers at this address: {' '.join(str(error).split())[:160]}"
            raise SpecError("RAY_ADDRESS", address, remedy) from None
        logger.warning(
            "the Ray cluster at %s, started here by `ray start`, does not answer: a private Ray is used", address
        )
        os.environ["RAY_ADDRESS"] = "local"
        return False
    _silence_ray()
    return True


def _check_listens(address: str) -> None:
    """Raise OSError when nothing listens at `host:port`: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


@contextmanager
def ray_session(memory: int) -> Iterator[None]:
    """Keep Ray running while the block runs: the one that this process is connected to, or else a private one.

    A private Ray offers `memory` bytes to its workers, as planned on this machine.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(worker_environment())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _private_ray_folder() as folder:
        with _own_sigterm():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _memory=memory,
                _temp_dir=folder,
            )
        _silence_ray()
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _private_ray_folder() -> Iterator[str]:
    """Prepare a Ray that only this user can reach: loopback ports, a new token, a private folder (yielded).

    Ray binds to loopback where its address is a loopback address; on Linux it uses such an address only if it is
    configured not to form clusters. It opens its own folder, with its sockets, to everybody: only the folder
    around it is private.
    """
    token, clusters = os.environ.get("RAY_AUTH_TOKEN"), ray_constants.ENABLE_RAY_CLUSTER
    short = os.environ.get("RAY_TMPDIR", "/tmp")  # the path of a socket has 107 bytes at most
    with scratch_folder("mlprune-ray-", Path(short), _kill_processes_of) as folder:
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


def _kill_processes_of(folder: Path) -> None:
    """Kill what a killed process left of its Ray: some parts of it live for minutes."""
    running = psutil.process_iter(["cmdline"])
    own = [process for process in running if any(f"{folder}/" in word for word in process.info["cmdline"] or ())]
    for process in own:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(own, timeout=5)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray's prints a C++ stack and aborts."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # no other thread may set it; a handler that Python did not install is None
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _silence_ray() -> None:
    # tensors from the object store are read-only, and are only read
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
    # Ray prints each death of a worker to standard output, where results go, at every log level; we log it instead
    ray_worker.print_to_stdstream = lambda *_, **__: None


# nodes


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
