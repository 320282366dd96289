"""How a sweep stands: plain data that its driver gathers each second, and a file by which other programs see it.

The file is there for as long as the driver lives. It is named by process and host, because a home folder may be
shared by machines that know nothing of each other's processes.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from mlprune.console import warn

FOLDER_VARIABLE = "MLPRUNE_STATE_DIR"  # instead of the user's state folder
CLOCK_SLACK = 2.0  # seconds by which two looks at a process's start may differ: the system's boot time is rounded
BUSY = 0.8  # a shard that works for this share of the time works most of it
ALIKE = 0.15  # shares of the time that differ by less say nothing


@dataclass(frozen=True)
class TrialState:
    """A trial under way, in its present phase."""

    label: str
    phase: str  # "masking" or "evaluating"
    seconds: float  # since the phase began


@dataclass(frozen=True)
class ShardState:
    """A shard of one replica of the pipeline, since the last look."""

    replica: int
    shard: int
    layers: tuple[int, int]  # first and last
    node: str  # its address
    busy: float  # share of the time that it worked, 0..1
    tokens: float  # a second
    alive: bool


@dataclass(frozen=True)
class Standing:
    """A sweep at the time `now`. Trials and shards are shown in the order given."""

    name: str
    phase: str
    started: float  # seconds since the epoch, as is `now`
    now: float
    finished: int  # trials that have a result
    total: int
    failed: int  # trials that ended without one; they are not among the finished
    trials: tuple[TrialState, ...]  # under way
    shards: tuple[ShardState, ...]
    seconds_left: float | None  # None: not known
    notes: tuple[str, ...]  # what a person should know: what does not answer, what is waited for


@dataclass(frozen=True)
class Running:
    """A sweep that runs on this machine."""

    pid: int  # of its driver
    standing: Standing


def seconds_left(
    finished: int, total: int, durations: Sequence[float], at_once: int, under_way: Sequence[float]
) -> float | None:
    """When the last trial will end, from the durations of those that have; None until one has,
    and while none can run.

    `finished`: how many of `total` are over, failed ones too. `durations`: of trials that ran, in seconds.
    `under_way`: seconds that each trial under way has taken so far; it is taken to end as those did that took
    longer than that, and at once if none did. The rest take the mean, `at_once` at a time.
    """
    if not durations or not at_once:
        return None
    ends = sorted(_rest(durations, taken) for taken in under_way)
    free = ends[-at_once:] + [0.0] * (at_once - len(ends))
    heapq.heapify(free)
    mean = sum(durations) / len(durations)
    for _ in range(total - finished - len(under_way)):
        ends.append(free[0] + mean)
        heapq.heapreplace(free, ends[-1])
    return max(ends, default=0.0)


def _rest(durations: Sequence[float], taken: float) -> float:
    longer = [duration for duration in durations if duration > taken]
    return sum(longer) / len(longer) - taken if longer else 0.0


def bounded_by(busy: Sequence[float], at_once: int, shards: int, layers: Sequence[tuple[int, int]] = ()) -> str:
    """One sentence on what bounded the pipeline while trials ran, as far as occupancy tells.

    `busy`: the share of that time that each shard worked, 0..1, replica after replica; replicas are averaged.
    `shards`: of one replica. `at_once`: trials that could run at once. `layers`: first and last of each shard.
    """
    assert busy
    assert len(busy) % shards == 0, f"{len(busy)} shares of {shards} shards"
    means = [sum(busy[shard::shards]) * shards / len(busy) for shard in range(shards)]
    most = max(means)
    busiest = [shard for shard in range(shards) if means[shard] > most - ALIKE]
    more = f"more trials at once than {at_once} (each takes memory for its masks)"
    if most >= BUSY and len(busiest) < shards:
        rest = [mean for shard, mean in enumerate(means) if shard not in busiest]
        return (
            f"{_named(busiest, layers)} the most to do, or the slowest device: {most:.0%} of the time at work, "
            f"the other shards {sum(rest) / len(rest):.0%}, which wait for it"
        )
    share = _range(means) + (" on average over replicas" if len(busy) > shards else "")
    if most >= BUSY:
        who = "every shard works" if shards > 1 else "the shard works"
        return f"{who} most of the time ({share}): more or faster devices would help"
    if shards > 1:
        return f"no shard works most of the time ({share}): they wait for each other or trials; {more} may help"
    outside = "the driver, the start of trials, evaluation outside the shard"
    return f"the shard works part of the time ({share}), the rest goes by in {outside}; {more} may fill it"


def _named(busiest: Sequence[int], layers: Sequence[tuple[int, int]]) -> str:
    if len(busiest) > 3:
        return f"{len(busiest)} shards have"
    spans = [" (layers {}-{})".format(*layers[shard]) if layers else "" for shard in busiest]
    names = " and ".join(f"{shard}{span}" for shard, span in zip(busiest, spans, strict=True))
    return f"shards {names} have" if len(busiest) > 1 else f"shard {names} has"


def _range(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return high if low == high else f"{low} to {high}"


def publish(standing: Standing) -> None:
    """Let `mlprune status` see how the sweep of this process stands. To be called each second: it costs little.

    A sweep that cannot be seen goes on, after one warning.
    """
    born = psutil.Process().create_time()  # told anew each time: it moves with the system's clock
    file = _file(os.getpid())
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.write_text(json.dumps({"born": born, "standing": asdict(standing)}), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        _warn_once(f"mlprune status will not show this sweep: {error}")


@functools.cache
def _warn_once(text: str) -> None:
    warn(text)


def retract() -> None:
    """The sweep of this process has ended."""
    with contextlib.suppress(OSError):  # what stays is removed when it is next seen
        _file(os.getpid()).unlink()


def running() -> list[Running]:
    """The sweeps that run on this machine, of this user, the oldest first. Files of dead processes are removed."""
    found = []
    for file in _folder().glob(f"*@{socket.gethostname()}.json"):
        pid = int(file.name.partition("@")[0])
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:  # it ended just now
            continue
        if not _lives(pid, told["born"]):
            file.unlink(missing_ok=True)
            file.with_suffix(".part").unlink(missing_ok=True)
            continue
        try:
            found.append(Running(pid, _standing(told["standing"])))
        except (KeyError, TypeError):
            warn(f"process {pid} runs a sweep with another version of mlprune, which is not shown")
    return sorted(found, key=lambda one: one.standing.started)


def _lives(pid: int, born: float) -> bool:
    """Whether it is still the process that wrote `born`, not another that was given its number later."""
    try:
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE
        return not dead and abs(process.create_time() - born) <= CLOCK_SLACK
    except psutil.NoSuchProcess:
        return False


def _standing(values: dict[str, Any]) -> Standing:
    trials = tuple(TrialState(**trial) for trial in values["trials"])
    shards = tuple(ShardState(**{**shard, "layers": tuple(shard["layers"])}) for shard in values["shards"])
    return Standing(**{**values, "trials": trials, "shards": shards, "notes": tuple(values["notes"])})


def silence(standing: Standing) -> float:
    """Seconds since the driver told how it stands; it tells each second, unless something holds it up."""
    return time.time() - standing.now


def _folder() -> Path:
    asked = os.environ.get(FOLDER_VARIABLE)
    return Path(asked or platformdirs.user_state_dir("mlprune")) / "running"


def _file(pid: int) -> Path:
    return _folder() / f"{pid}@{socket.gethostname()}.json"
