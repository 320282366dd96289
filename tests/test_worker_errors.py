"""Errors of Ray in the user's words: how a lost worker is named, and when its node's state is waited for."""

import os
import time
from collections.abc import Callable

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from mlprune.errors import ModelError, WorkerLostError
from mlprune.runtime.actors import rank_actor
from mlprune.runtime.worker_errors import (
    WorkerState,
    cause_of_death,
    cause_of_unavailability,
    worker_errors,
    worker_state,
)

UNAVAILABLE = ActorUnavailableError("RpcError: Socket closed", bytes(16))
UNDECIDED = WorkerState("10.0.0.7")


def sequence(*states: WorkerState) -> Callable[[str], WorkerState]:
    """A look-up that returns the states in turn, and then the last one again and again."""
    remaining = list(states)

    def look_up(actor_id: str) -> WorkerState:
        assert actor_id == "00" * 16
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    return look_up


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (WorkerState("10.0.0.7", node_alive=False), "a shard's worker on 10.0.0.7 is gone with its node"),
        (WorkerState("10.0.0.7", alive=False), "a shard's worker on 10.0.0.7 died; if nobody killed it"),
        (
            WorkerState("10.0.0.7", answers=True),
            "the connection to a shard's worker on 10.0.0.7 broke: The actor 00000000",
        ),
    ],
)
def test_the_state_of_an_unavailable_worker_is_waited_for(end: WorkerState, cause: str) -> None:
    look_up = sequence(WorkerState(), UNDECIDED, UNDECIDED, end)
    assert cause_of_unavailability(UNAVAILABLE, look_up, seconds=60, poll=0).startswith(cause)


def test_the_wait_is_bounded() -> None:
    started = time.monotonic()
    cause = cause_of_unavailability(UNAVAILABLE, sequence(UNDECIDED), seconds=0.1, poll=0.01)
    assert time.monotonic() - started < 5
    assert cause.startswith("the connection to a shard's worker on 10.0.0.7 broke: The actor")
    assert "Socket closed" in cause
    assert "\n" not in cause


def test_a_known_state_is_not_waited_for() -> None:
    gone = WorkerState("10.0.0.7", node_alive=False, alive=False)
    started = time.monotonic()
    cause_of_unavailability(UNAVAILABLE, sequence(gone), seconds=60, poll=60)
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("ray_cluster")
def test_ray_knows_whether_a_worker_is_alive() -> None:
    actor = rank_actor({"num_cpus": 0})
    pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    actor_id = actor._actor_id.hex()
    assert worker_state(actor_id, [actor]) == WorkerState(ray.util.get_node_ip_address(), answers=True)
    assert not worker_state(actor_id, []).settled, "only a caller that has the actor can call it"
    os.kill(pid, 9)
    deadline = time.monotonic() + 30
    while (state := worker_state(actor_id, [actor])).alive and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (state.alive, state.node_alive) == (False, True)
    assert worker_state("00" * 16, []).settled, "a worker that Ray does not know is dead"


@pytest.mark.usefixtures("ray_cluster")
def test_a_dead_worker_is_reported_at_once() -> None:
    actor = rank_actor({"num_cpus": 0})
    pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, 9)
    started = time.monotonic()
    with (
        pytest.raises(WorkerLostError, match=r"a shard's worker.* died; if nobody killed it"),
        worker_errors([actor]),
    ):
        ray.get(actor.usage.remote())
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("ray_cluster")
def test_a_mistake_of_the_user_is_raised_as_it_is() -> None:
    def fail() -> None:
        raise ModelError("model.path", "gone", "put it back")

    with pytest.raises(ModelError, match=r"^model.path: gone: put it back$"), worker_errors():
        ray.get(ray.remote(fail).options(num_cpus=0).remote())


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ray.exceptions.ObjectStoreFullError("no room"), "Ray's object store is full"),
        (ray.exceptions.OutOfDiskError("no room"), "the disk to which Ray's object store spills is full"),
        (ray.exceptions.OutOfMemoryError("killed"), "was killed because its node ran low on memory"),
        (
            RuntimeError("ip: 10.0.0.7 The actor died because its node has died. Node Id: 1f"),
            "a shard's worker on 10.0.0.7 is gone with its node",
        ),
        (
            RuntimeError("ip: 10.0.0.7 worker process has died. (1) killed by the OOM killer due to high memory"),
            "a shard's worker on 10.0.0.7 died; if nobody killed it",
        ),
    ],
)
def test_causes_are_named_in_one_line(error: Exception, cause: str) -> None:
    assert cause in cause_of_death(error)
    assert "\n" not in cause_of_death(error)
