"""What goes on in a sweep, looked at each second: for the screen, for `mlprune status`, for MLflow."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlprune.console import say
from mlprune.runtime.actors import ShardUsage
from mlprune.runtime.replicas import ReplicaGroup
from mlprune.sweep.status import ShardState, Standing, TrialState, bounded_by, publish, retract, seconds_left
from mlprune.sweep.tune_runner import Trials
from mlprune.tracking.tracker import SweepTracker

LOOK_SECONDS = 1.0
WINDOW_SECONDS = 30.0  # over which rates are averaged: tokens are counted when a chunk begins
LOG_SECONDS = 15.0  # between two points of a metric in MLflow
TRIALS = "pruning and evaluating"

Show = Callable[[Standing], None]


@dataclass
class _Shard:
    """What was seen of a shard: lately, and since the trials began."""

    seen: deque[ShardUsage] = field(default_factory=deque)  # the looks of the last WINDOW_SECONDS
    alive: bool = True
    worked: float = 0.0  # seconds since the trials began

    def add(self, usage: ShardUsage | None) -> float:
        """Take in a look, None where nobody answered; the seconds that it worked since the last one."""
        self.alive = usage is not None
        last = self.seen[-1] if self.seen else None
        if usage is None or (last and (usage.at <= last.at or usage.busy < last.busy or usage.node != last.node)):
            self.seen.clear()  # not there, or another worker than at the last look
            last = None
        if usage is None:
            return 0.0
        self.seen.append(usage)
        while usage.at - self.seen[0].at > WINDOW_SECONDS:
            self.seen.popleft()
        return usage.busy - last.busy if last else 0.0

    def rates(self) -> tuple[float, float]:
        """Over the window: the share of the time that it worked, and tokens a second."""
        if len(self.seen) < 2:
            return 0.0, 0.0
        first, last = self.seen[0], self.seen[-1]
        passed = last.at - first.at
        return min(1.0, (last.busy - first.busy) / passed), (last.tokens - first.tokens) / passed


class Watch:
    """Looks at the replicas while its block runs, and shows how the sweep stands once its trials have begun."""

    def __init__(
        self, name: str, replicas: ReplicaGroup, trials: Trials, at_once: int, tracker: SweepTracker, show: Show
    ):
        self._name, self._replicas, self._trials, self._at_once = name, replicas, trials, at_once
        self._tracker, self._show = tracker, show
        self._phase, self._started = "starting", time.time()
        self._trials_began: float | None = None
        self._shards: dict[tuple[int, int], _Shard] = {}
        self._over = threading.Event()
        self._logged, self._points = 0.0, 0

    def enter(self, phase: str) -> None:
        """From now on the sweep is in this phase."""
        self._phase = phase
        if phase == TRIALS:
            self._trials_began = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()
            retract()

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._look()
            standing = self.standing()
            publish(standing)
            if self._phase == TRIALS:
                self._show(standing)
                self._log()

    def _look(self) -> None:
        for replica, pipeline in enumerate(self._replicas.pipelines):
            for number, usage in enumerate(pipeline.usage(LOOK_SECONDS)):
                worked = self._shards.setdefault((replica, number), _Shard()).add(usage)
                if self._phase == TRIALS:
                    self._shards[replica, number].worked += worked

    def standing(self) -> Standing:
        now = time.monotonic()
        trials, spans = self._trials, self._replicas.spans
        under_way = list(trials.under_way.values())
        notes = []
        if self._tracker.last_error:
            notes.append(f"{self._tracker.pending} updates queued for MLflow: {self._tracker.last_error}")
        shards = tuple(
            ShardState(
                replica,
                number,
                (spans[number].first, spans[number].end - 1),
                shard.seen[-1].node if shard.seen else "?",
                *shard.rates(),
                shard.alive,
            )
            for (replica, number), shard in sorted(self._shards.items())
        )
        if not all(shard.alive for shard in shards):
            notes.append("a worker does not answer")
        ran = [now - trial.began for trial in under_way]
        return Standing(
            name=self._name,
            phase=self._phase,
            started=self._started,
            now=time.time(),
            finished=len(trials.results),
            total=trials.total,
            failed=len(trials.failed),
            trials=tuple(TrialState(t.label, t.phase, now - t.since) for t in under_way),
            shards=shards,
            seconds_left=seconds_left(trials.over, trials.total, trials.seconds, self._at_once, ran),
            notes=tuple(notes),
        )

    def _log(self) -> None:
        now = time.monotonic()
        if now - self._logged < LOG_SECONDS or not self._shards:
            return
        self._logged = now
        self._points += 1
        self._tracker.log_sweep_metrics(self._figures(), self._points)

    def _figures(self) -> dict[str, float]:
        seen = list(self._shards.values())
        last = max(number for _, number in self._shards)  # every token passes all shards: one counts them
        return {
            "live.tokens_per_second": sum(s.rates()[1] for (_, n), s in self._shards.items() if n == last),
            "live.shards_busy": sum(shard.rates()[0] for shard in seen) / len(seen),
            "live.trials_finished": float(len(self._trials.results)),
        }

    def report(self) -> dict[str, float]:
        """Say how much of the trials' time each shard worked, and what bounded the whole; the same as metrics."""
        if self._trials_began is None or not self._shards:
            return {}
        seconds = time.monotonic() - self._trials_began
        shares = [min(1.0, shard.worked / seconds) for _, shard in sorted(self._shards.items())]
        spans = self._replicas.spans
        layers = [(span.first, span.end - 1) for span in spans]
        say(f"  {bounded_by(shares, self._at_once, len(spans), layers)}")
        return {f"occupancy.shard_{n}": share for n, share in enumerate(shares)}
