"""The status of a running sweep: plain data, and the file through which other programs read it.

`monitor` collects the data; `mlprune.report.live` displays it. The file exists as long as the driver lives. Its
name holds process id and host, because machines may share a home folder but not their processes.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil
from pydantic import TypeAdapter

from mlprune.storage.files import DAMAGED_JSON, write_whole

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "MLPRUNE_STATE_DIR"  # replaces the user's state folder
CLOCK_SLACK = 2.0  # seconds by which a process's start time may vary: the system's boot time is rounded
BUSY = 0.8  # a shard with at least this share of busy time is busy most of the time
TOLERANCE = 0.15  # smaller differences between busy shares are not significant


@dataclass(frozen=True)
class TrialStatus:
    """A running trial in its current phase."""

    label: str
    phase: str  # "masking" or "evaluating"
    seconds: float  # since the phase began


@dataclass(frozen=True)
class ShardStatus:
    """A shard of one replica of the pipeline, averaged over the last samples."""

    replica: int
    shard: int
    layers: tuple[int, int]  # first and last
    node: str  # its address
    busy: float  # share of the time that it worked, 0..1
    tokens: float  # per second
    alive: bool


@dataclass(frozen=True)
class SweepStatus:
    """A sweep at the time `now`. Trials and shards are displayed in the order given."""

    name: str
    phase: str
    started: float  # seconds since the epoch, as is `now`
    now: float
    finished: int  # trials that have a result
    total: int
    failed: int  # trials that ended without a result; not among the finished
    trials: tuple[TrialStatus, ...]  # running
    shards: tuple[ShardStatus, ...]
    seconds_left: float | None  # None: unknown
    notes: tuple[str, ...]  # what a person should know: what does not answer, what the sweep waits for


@dataclass(frozen=True)
class RunningSweep:
    """A sweep that runs on this machine."""

    pid: int  # of its driver
    status: SweepStatus


# estimates


def seconds_left(
    ended: int, total: int, durations: Sequence[float], at_once: int, running: Sequence[float]
) -> float | None:
    """Estimate the seconds until the last trial ends, from the durations of finished trials.

    Returns None until one has finished, and while none can run.

    `ended`: how many of `total` trials have ended, failed ones included. `durations`: seconds of finished trials.
    `running`: seconds that each running trial has taken so far. It is expected to take the mean of the durations
    that are longer than that, and to end at once if none is longer. Every other trial takes the mean duration,
    `at_once` at a time.
    """
    if not durations or not at_once:
        return None
    ends = sorted(_remaining(durations, elapsed) for elapsed in running)
    free = ends[-at_once:] + [0.0] * (at_once - len(ends))
    heapq.heapify(free)
    mean = sum(durations) / len(durations)
    for _ in range(total - ended - len(running)):
        ends.append(free[0] + mean)
        heapq.heapreplace(free, ends[-1])
    return max(ends, default=0.0)


def _remaining(durations: Sequence[float], elapsed: float) -> float:
    longer = [duration for duration in durations if duration > elapsed]
    return sum(longer) / len(longer) - elapsed if longer else 0.0


def describe_bottleneck(
    busy: Sequence[float], at_once: int, shards: int, layers: Sequence[tuple[int, int]] = ()
) -> str:
    """Return one sentence on what limited the pipeline while trials ran, as far as the busy shares show it.

    `busy`: the share of that time that each shard worked, 0..1, replica after replica; replicas are averaged.
    `shards`: of one replica. `at_once`: trials that could run at once. `layers`: first and last of each shard.
    """
    assert busy
    assert len(busy) % shards == 0, f"{len(busy)} shares of {shards} shards"
    means = [sum(busy[shard::shards]) * shards / len(busy) for shard in range(shards)]
    most = max(means)
    busiest = [shard for shard in range(shards) if means[shard] > most - TOLERANCE]
    more_trials = f"more trials at once than {at_once} (each takes memory for its masks)"
    if most >= BUSY and len(busiest) < shards:
        rest = [mean for shard, mean in enumerate(means) if shard not in busiest]
        return (
            f"{_shards_have(busiest, layers)} the most work, or the slowest device: busy {most:.0%} of the time, "
            f"the other shards {sum(rest) / len(rest):.0%}, because they wait for it"
        )
    shares = _range_text(means) + (" on average over replicas" if len(busy) > shards else "")
    if most >= BUSY:
        subject = "all shards are" if shards > 1 else "the shard is"
        return f"{subject} busy most of the time ({shares}): more or faster devices would help"
    if shards > 1:
        return (
            f"no shard is busy most of the time ({shares}): shards wait for each other or for trials; "
            f"{more_trials} may help"
        )
    elsewhere = "the driver, the start of trials and evaluation outside the shard"
    return f"the shard is busy part of the time ({shares}), the rest to {elsewhere}; {more_trials} may fill it"


def _shards_have(busiest: Sequence[int], layers: Sequence[tuple[int, int]]) -> str:
    if len(busiest) > 3:
        return f"{len(busiest)} shards have"
    spans = [" (layers {}-{})".format(*layers[shard]) if layers else "" for shard in busiest]
    names = " and ".join(f"{shard}{span}" for shard, span in zip(busiest, spans, strict=True))
    return f"shards {names} have" if len(busiest) > 1 else f"shard {names} has"


def _range_text(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return high if low == high else f"{low} to {high}"


# the file


def write_status(status: SweepStatus) -> None:
    """Publish the status of this process's sweep for `mlprune status`. Called once a second; it costs little.

    If the file cannot be written, the sweep continues after one warning.
    """
    born = psutil.Process().create_time()  # read again each time: it moves with the system's clock
    content = json.dumps({"born": born, "status": asdict(status)}).encode()
    file = _file(os.getpid())
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(file, content)
    except OSError as error:
        _warn_once(f"mlprune status will not show this sweep: {error}")


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def remove_status() -> None:
    """Remove the file of this process's sweep, which has ended."""
    with contextlib.suppress(OSError):  # a file that stays is removed by the next reader
        _file(os.getpid()).unlink()


def running_sweeps() -> list[RunningSweep]:
    """Return this user's running sweeps on this machine, the oldest first; remove the files of dead processes."""
    sweeps = []
    for file in _folder().glob(f"[0-9]*@{socket.gethostname()}.json"):
        try:
            pid = int(file.name.partition("@")[0])
            values = json.loads(file.read_bytes())
            alive = _is_alive(pid, float(values["born"]))
        except FileNotFoundError:  # the sweep ended just now
            continue
        except (OSError, OverflowError, *DAMAGED_JSON):  # by a power cut, say; a sweep that lives writes it again
            logger.warning("%s is damaged: removed", file)
            alive = False
        if not alive:
            _remove(file)
            continue
        try:
            sweeps.append(RunningSweep(pid, _from_json(values["status"])))
        except DAMAGED_JSON:
            logger.warning("process %d runs a sweep with another version of mlprune, which is not shown", pid)
    return sorted(sweeps, key=lambda sweep: sweep.status.started)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
        for partial in file.parent.glob(f".{file.name}.*"):  # of `write_whole`, in a process that was killed
            partial.unlink(missing_ok=True)


def _is_alive(pid: int, born: float) -> bool:
    """Whether this is the process that wrote `born`, and not a later one with the same id."""
    try:
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE
        return not dead and abs(process.create_time() - born) <= CLOCK_SLACK
    except psutil.NoSuchProcess:
        return False


def _from_json(values: Mapping[str, Any]) -> SweepStatus:
    """Return the status of its plain values. Raises KeyError, TypeError or ValueError for anything else."""
    trials = tuple(TrialStatus(**trial) for trial in values["trials"])
    shards = tuple(ShardStatus(**{**shard, "layers": tuple(shard["layers"])}) for shard in values["shards"])
    status = SweepStatus(**{**values, "trials": trials, "shards": shards, "notes": tuple(values["notes"])})
    return TypeAdapter(SweepStatus).validate_python(asdict(status))


def seconds_since_update(status: SweepStatus) -> float:
    """Return the age of the status. The driver writes one every second, unless something blocks it."""
    return time.time() - status.now


def _folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or platformdirs.user_state_dir("mlprune")) / "running"


def _file(pid: int) -> Path:
    return _folder() / f"{pid}@{socket.gethostname()}.json"
