"""Translates Ray's errors: a user's mistake as it was raised in the worker, a lost worker as WorkerLostError.

It names the cause of a loss in one line. What follows from a loss is decided in `replicas` and
`sweep.failure_policy`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray._private import state as ray_state
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from mlprune.errors import MlpruneError, WorkerLostError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

# with Ray's default health checks a killed node is noticed after 14.5 s, a cut link after 63 s; with those of our
# clusters after 3 to 6 s
NODE_STATE_SECONDS = 75.0
POLL_SECONDS = 0.25
ANSWER_SECONDS = 2.0  # for a worker that may be alive after all


@dataclass(frozen=True)
class WorkerState:
    """What Ray knows of a worker that did not answer, and whether it answers now."""

    ip: str = ""  # of its node; empty when Ray does not know the worker
    node_alive: bool = True
    alive: bool = True
    answers: bool = False

    @property
    def settled(self) -> bool:
        return self.answers or not self.alive or not self.node_alive


@contextmanager
def worker_errors(actors: Sequence[ActorHandle] = ()) -> Iterator[None]:
    """Raise a worker's MlpruneError as it is, and a RayError as WorkerLostError. `actors`: the workers called."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, MlpruneError):
            raise cause from None  # without the worker's traceback around it
        if isinstance(cause, RayError):
            raise WorkerLostError(_cause(cause, actors)) from error
        raise
    except RayError as error:
        raise WorkerLostError(_cause(error, actors)) from error


def _cause(error: RayError, actors: Sequence[ActorHandle]) -> str:
    """Return the cause in one line, once Ray knows the state of an unavailable worker's node."""
    if isinstance(error, ActorUnavailableError):
        return cause_of_unavailability(error, lambda actor_id: worker_state(actor_id, actors))
    return cause_of_death(error)


def cause_of_unavailability(
    error: ActorUnavailableError,
    look_up: Callable[[str], WorkerState],
    seconds: float = NODE_STATE_SECONDS,
    poll: float = POLL_SECONDS,
) -> str:
    """Return why a worker is unavailable; wait up to `seconds` until Ray knows.

    Ray raises this error as soon as a connection breaks, seconds before it knows that the node is dead.
    """
    actor_id = str(error.actor_id)
    deadline = time.monotonic() + seconds
    while not (state := look_up(actor_id)).settled and time.monotonic() < deadline:
        time.sleep(poll)
    logger.debug("worker %s is unavailable: %s: %s", actor_id, state, error)
    worker = "a shard's worker" + (f" on {state.ip}" if state.ip else "")
    if not state.node_alive:
        return f"{worker} is gone with its node"
    if not state.alive:
        return _died(worker)
    return f"the connection to {worker} broke: {_one_line(error)[:300]}"


def worker_state(actor_id: str, actors: Sequence[ActorHandle]) -> WorkerState:
    """Look up a worker and its node; call the worker, if it is one of `actors` and may be alive."""
    try:
        actor = ray_state.actors(actor_id)  # the public look-up needs the dashboard, which a local Ray has not
        nodes = {node["NodeID"]: node for node in ray.nodes()}
    except Exception as error:  # the cluster's head is unreachable too
        logger.debug("the state of worker %s is unknown: %s", actor_id, error)
        return WorkerState()
    if not actor:
        return WorkerState(alive=False)
    address = actor["Address"]
    node_alive = bool(nodes.get(address["NodeID"], {}).get("Alive", False))
    alive = actor["State"] != "DEAD"
    answers = alive and node_alive and any(_answers(a) for a in actors if a._actor_id.hex() == actor_id)
    return WorkerState(address["IPAddress"], node_alive, alive, answers)


def _answers(actor: ActorHandle) -> bool:
    try:
        ray.get(actor.usage.remote(), timeout=ANSWER_SECONDS)
    except (RayError, GetTimeoutError, MlpruneError):
        return False
    return True


def cause_of_death(error: BaseException) -> str:
    """Return in one line why a worker, or an object that it had sent, is gone."""
    text = _one_line(error)
    worker = "a shard's worker" + "".join(f" on {ip}" for ip in re.findall(r"\bip: ([\w.:]+)", text)[:1])
    if isinstance(error, ObjectStoreFullError):
        return f"Ray's object store is full: start Ray with a larger one (--object-store-memory). {text[:200]}"
    if isinstance(error, OutOfDiskError):
        return f"the disk to which Ray's object store spills is full: {text[:200]}"
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return f"{worker} was killed because its node ran low on memory: take larger nodes, or more shards"
    if re.search(r"node (has )?(died|dead|was terminated)|node .{0,80}(died|terminated|removed|dead)", text):
        return f"{worker} is gone with its node"
    if "SIGKILL" in text or "worker process has died" in text:
        return _died(worker)
    return f"{worker} or what it sent is gone: {text[:300]}"


def _died(worker: str) -> str:
    return f"{worker} died; if nobody killed it, it crashed, or its machine's memory ran out (dmesg tells)"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
