"""Starts a command again when the Ray under it has died, in the same process and with the same arguments.

Without its raylet or its GCS, Ray's C++ core ends the process, at the latest after a minute. What follows is the
same as after a kill -9: the command resumes from the results in its storage.

Only a process that is a command line and nothing else may be replaced, so `allow_restarts` must be called first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import psutil

from mlprune.errors import RayLostError

logger = logging.getLogger(__name__)

RESTARTS = 3
COUNT_VARIABLE = "MLPRUNE_RAY_DEATHS"  # how often Ray has died under this command
GRACE_SECONDS = 5  # SIGTERM to all processes of a group ends Ray's before this one has handled it
CLUSTER_POLL_SECONDS, CLUSTER_LOST_SECONDS = 5, 45  # Ray aborts after 60

_environment: dict[str, str] | None = None  # of the command as it was started; None: no restarts


def allow_restarts() -> None:
    """Let this process be replaced. To be called by the command line before anything changes the environment."""
    global _environment
    _environment = dict(os.environ)


def forbid_restarts() -> None:
    """Let the process end as it is about to, whatever happens to its Ray."""
    global _environment
    _environment = None


def check_deaths() -> None:
    """Raise RayLostError if Ray has died more often than the command is to be started again."""
    deaths = int(os.environ.get(COUNT_VARIABLE, "0"))
    if deaths > RESTARTS:
        raise RayLostError(
            f"Ray's own processes died {deaths} times; find out what kills them (too little memory?), "
            f"and run the same command to resume"
        )


@contextlib.contextmanager
def watch_processes(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Start the command again when one of these processes of a private Ray dies while the block runs.

    At once: Ray ends this process, without a word, at the first use of a store of objects whose raylet is dead.
    """
    stopped = threading.Event()

    def watch(process: psutil.Process, name: str) -> None:
        code = process.wait()
        if not stopped.wait(GRACE_SECONDS if code in (0, -signal.SIGTERM) else 0):
            _restart(name)

    for process in processes if _environment is not None else ():
        threading.Thread(target=watch, args=(process, process.name()), daemon=True).start()
    try:
        yield
    finally:
        stopped.set()


def _restart(dead: str) -> None:
    if _environment is None:
        return
    deaths = int(os.environ.get(COUNT_VARIABLE, "0")) + 1
    if deaths <= RESTARTS:
        logger.warning(
            "Ray's %s died; the command is started again and resumes (%d of %d)", dead, deaths, RESTARTS
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, {**_environment, COUNT_VARIABLE: str(deaths)})


def watch_cluster(address: str) -> None:
    """End the process with one line when the GCS at `host:port`, which is not ours to start, no longer answers."""
    host, _, port = address.rpartition(":")

    def watch() -> None:
        answered = time.monotonic()
        while time.monotonic() - answered < CLUSTER_LOST_SECONDS:
            time.sleep(CLUSTER_POLL_SECONDS)
            with contextlib.suppress(OSError):
                socket.create_connection((host, int(port)), timeout=CLUSTER_POLL_SECONDS).close()
                answered = time.monotonic()
        if _environment is not None:
            logger.error(
                "the Ray cluster at %s has not answered for %d s; run the same command to resume when it is up",
                address,
                CLUSTER_LOST_SECONDS,
            )
            os._exit(1)  # Ray would abort this process with a C++ stack

    if _environment is not None:
        threading.Thread(target=watch, daemon=True).start()
