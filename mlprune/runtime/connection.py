"""Connects this process to the Ray cluster that runs, or starts a private Ray on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.utils import read_ray_address
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError

from mlprune.errors import SpecError
from mlprune.runtime.restarts import check_deaths, watch_cluster, watch_processes
from mlprune.runtime.worker_logging import LEVEL_VARIABLE, worker_log_level
from mlprune.storage.scratch import scratch_folder

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
RAY_PROCESSES = ("gcs_server", "raylet")  # Ray's driver cannot go on without either of them


def worker_environment() -> dict[str, str]:
    """Return the environment variables that every worker process needs."""
    return {
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
        # every shard uses all cores (see ShardWorker); waiting threads must not spin on them
        "OMP_WAIT_POLICY": "PASSIVE",
        # glibc keeps freed memory for the next tensors: else the kernel maps and clears every large one again
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
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
    watch_cluster(ray.get_runtime_context().gcs_address)
    return True


def _check_listens(address: str) -> None:
    """Raise OSError when nothing listens at `host:port`: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


@contextmanager
def ray_session(memory: int) -> Iterator[None]:
    """Keep Ray running while the block runs: the one that this process is connected to, or else a private one.

    A private Ray offers `memory` bytes to its workers, as planned on this machine. Raises RayLostError if Ray
    has died too often under this command.
    """
    if ray.is_initialized():
        yield
        return
    check_deaths()
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
        own = [process for process in _processes_of(Path(folder)) if process.name() in RAY_PROCESSES]
        try:
            with watch_processes(own):
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


def _processes_of(folder: Path) -> list[psutil.Process]:
    running = psutil.process_iter(["cmdline"])
    return [process for process in running if any(f"{folder}/" in word for word in process.info["cmdline"] or ())]


def _kill_processes_of(folder: Path) -> None:
    """Kill what a killed process left of its Ray: some parts of it live for minutes."""
    own = _processes_of(folder)
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
