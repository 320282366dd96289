"""Observes a running sweep once a second: for the live table, for `mlprune status` and for MLflow.

The state itself is plain data in `status` and `trial_progress`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlprune.runtime.actors import ShardUsage
from mlprune.runtime.replicas import ReplicaGroup
from mlprune.sweep.status import (
    ShardStatus,
    SweepStatus,
    TrialStatus,
    describe_bottleneck,
    remove_status,
    seconds_left,
    write_status,
)
from mlprune.sweep.trial_progress import TrialProgress
from mlprune.tracking.tracker import SweepTracker

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
WINDOW_SECONDS = 30.0  # over which rates are averaged: tokens are counted when a chunk begins
METRIC_SECONDS = 15.0  # between two points of a metric in MLflow

Show = Callable[[SweepStatus], None]


@dataclass
class _ShardHistory:
    """The usage of one shard, in the last WINDOW_SECONDS and while trials ran."""

    samples: deque[ShardUsage] = field(default_factory=deque)
    alive: bool = True
    worked: float = 0.0  # seconds in phases with trials

    def add(self, usage: ShardUsage | None) -> float:
        """Add a sample, None if the shard did not answer; return the seconds that it worked since the last one."""
        self.alive = usage is not None
        last = self.samples[-1] if self.samples else None
        if usage is None or (last and (usage.at <= last.at or usage.busy < last.busy or usage.node != last.node)):
            self.samples.clear()  # the worker is gone, or it is another one than in the last sample
            last = None
        if usage is None:
            return 0.0
        self.samples.append(usage)
        while usage.at - self.samples[0].at > WINDOW_SECONDS:
            self.samples.popleft()
        return usage.busy - last.busy if last else 0.0

    def rates(self) -> tuple[float, float]:
        """Return the share of the window's time that the shard worked, and its tokens per second."""
        if len(self.samples) < 2:
            return 0.0, 0.0
        first, last = self.samples[0], self.samples[-1]
        seconds = last.at - first.at
        return min(1.0, (last.busy - first.busy) / seconds), (last.tokens - first.tokens) / seconds


class SweepMonitor:
    """Polls the replicas while its block runs; publishes the status, and shows it once the trials have begun."""

    def __init__(
        self,
        name: str,
        replicas: ReplicaGroup,
        at_once: int,
        tracker: SweepTracker,
        show: Show,
    ) -> None:
        self._name, self._replicas, self._at_once = name, replicas, at_once
        self._tracker, self._show = tracker, show
        self._phase, self._started = "starting", time.time()
        self._progress = TrialProgress(0)
        self._runs_trials = False
        self._phase_started = time.monotonic()
        self._trial_seconds = 0.0  # in past phases with trials
        self._shards: dict[tuple[int, int], _ShardHistory] = {}  # by replica and shard
        self._stopped = threading.Event()
        self._logged, self._points = 0.0, 0

    def enter(self, phase: str, trials: TrialProgress | None = None) -> None:
        """Record that the sweep enters this phase; `trials` are those that run in it."""
        now = time.monotonic()
        if self._runs_trials:
            self._trial_seconds += now - self._phase_started
        self._phase, self._phase_started = phase, now
        self._progress, self._runs_trials = trials or TrialProgress(0), trials is not None

    @contextmanager
    def running(self) -> Iterator[SweepMonitor]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stopped.set()
            thread.join()
            remove_status()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self._poll()
            status = self.status()
            write_status(status)
            if self._runs_trials:
                self._show(status)
                self._log_metrics()

    def _poll(self) -> None:
        for replica, pipeline in enumerate(self._replicas.pipelines):
            for number, usage in enumerate(pipeline.usage(POLL_SECONDS)):
                history = self._shards.setdefault((replica, number), _ShardHistory())
                worked = history.add(usage)
                if self._runs_trials:
                    history.worked += worked

    def status(self) -> SweepStatus:
        now = time.monotonic()
        progress = self._progress
        active = list(progress.active.values())
        shards = self._shard_statuses()
        return SweepStatus(
            name=self._name,
            phase=self._phase,
            started=self._started,
            now=time.time(),
            finished=len(progress.results),
            total=progress.total,
            failed=len(progress.failed),
            trials=tuple(TrialStatus(t.label, t.phase, now - t.phase_started) for t in active),
            shards=shards,
            seconds_left=seconds_left(
                progress.ended,
                progress.total,
                progress.durations,
                self._at_once,
                [now - trial.started for trial in active],
            ),
            notes=self._notes(shards),
        )

    def _shard_statuses(self) -> tuple[ShardStatus, ...]:
        spans = self._replicas.spans
        return tuple(
            ShardStatus(
                replica,
                number,
                (spans[number].first, spans[number].end - 1),
                shard.samples[-1].node if shard.samples else "?",
                *shard.rates(),
                shard.alive,
            )
            for (replica, number), shard in sorted(self._shards.items())
        )

    def _notes(self, shards: tuple[ShardStatus, ...]) -> tuple[str, ...]:
        notes = []
        if self._tracker.last_error:
            notes.append(f"{self._tracker.pending} updates queued for MLflow: {self._tracker.last_error}")
        if not all(shard.alive for shard in shards):
            notes.append("a worker does not answer")
        return tuple(notes)

    def _log_metrics(self) -> None:
        now = time.monotonic()
        if now - self._logged < METRIC_SECONDS or not self._shards:
            return
        self._logged = now
        self._points += 1
        self._tracker.log_sweep_metrics(self._metrics(), self._points)

    def _metrics(self) -> dict[str, float]:
        shards = list(self._shards.values())
        last = max(number for _, number in self._shards)  # every token passes all shards, so one of them counts
        return {
            "live.tokens_per_second": sum(s.rates()[1] for (_, n), s in self._shards.items() if n == last),
            "live.shards_busy": sum(shard.rates()[0] for shard in shards) / len(shards),
            "live.trials_finished": float(len(self._progress.results)),
        }

    def report(self) -> dict[str, float]:
        """Log what limited the trials, and return as metrics the share of their time that each shard worked."""
        self.enter("ranking")
        if not self._trial_seconds or not self._shards:
            return {}
        shares = [min(1.0, shard.worked / self._trial_seconds) for _, shard in sorted(self._shards.items())]
        spans = self._replicas.spans
        layers = [(span.first, span.end - 1) for span in spans]
        logger.info("  %s", describe_bottleneck(shares, self._at_once, len(spans), layers))
        return {f"occupancy.shard_{n}": share for n, share in enumerate(shares)}
