"""Estimates how long each phase of a sweep takes, from sizes and rates alone, and what limits it.

A pass of C chunks through S shards takes C + S - 1 turns. A turn is one shard's work on one chunk: the time of its
floating-point operations or, where weights are moved, the time of their transfer, whichever is longer, because the
next layer is transferred while one computes. Rates that are assumed, not measured, are constants here; `mlprune
plan` says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlprune.planning.machine import Machine
from mlprune.planning.model_size import ModelSize
from mlprune.planning.planner import Plan
from mlprune.planning.work import Work
from mlprune.pruning.sensitivity import REFERENCES

EFFICIENCY = {"gpu": 0.4, "cpu": 0.5}  # share of peak FLOP/s that passes of some thousand tokens reach
MASKED_PER_SECOND = {"gpu": 5e9, "cpu": 200e6}  # weights scored, sorted and packed by one GPU or one node's cores
DISK_BYTES_PER_SECOND = 2e9  # per node


@dataclass(frozen=True)
class Phase:
    """One phase of a sweep: its time, what limits it, and the bytes that move meanwhile."""

    name: str
    seconds: float
    bound: str  # compute, weights from host memory, weights from disk
    weights_moved: int = 0  # bytes into each worker
    hidden_moved: int = 0  # bytes from each shard to the next


@dataclass(frozen=True)
class _Turn:
    """One shard's work on one chunk."""

    seconds: float
    bound: str
    weights_moved: int


def forecast(model: ModelSize, work: Work, plan: Plan, machine: Machine) -> list[Phase]:
    """Return the phases of a sweep in order."""
    estimator = _Estimator(model, work, plan, machine)
    phases = [Phase("loading the model", model.total / machine.nodes / DISK_BYTES_PER_SECOND, "disk")]
    if work.calibration:
        phases.append(estimator.passes("calibration", sum(work.calibration), 1, masked=False))
    if work.measuring:
        count = 1 + len(REFERENCES) * len(model.layers)
        phases.append(estimator.passes("evaluation of single pruned layers", work.measuring, count, masked=True))
    if work.sequential:
        phases.append(estimator.sequential())
    phases.append(estimator.masks())
    if work.evaluation:
        phases.append(estimator.passes("evaluation of the dense model", work.evaluation, 1, masked=False))
        phases.append(estimator.passes("evaluation of the variants", work.evaluation, work.variants, masked=True))
    return phases


class _Estimator:
    """Times of single phases on one plan."""

    def __init__(self, model: ModelSize, work: Work, plan: Plan, machine: Machine) -> None:
        self._model, self._work, self._plan, self._machine = model, work, plan, machine
        self._shards = len(plan.spans)
        self._kind = "gpu" if machine.gpus else "cpu"
        workers = self._shards * plan.residency.ranks
        self._workers_per_device = max(1.0, workers / (machine.all_gpus or machine.nodes))

    def passes(self, name: str, tokens: int, count: int, masked: bool) -> Phase:
        """Return the phase of `count` passes; the passes follow each other without a gap."""
        size = self._plan.chunks.size(tokens, self._shards, masked)
        chunks = math.ceil(tokens / max(1.0, size))
        return self._phase(name, self._turn(size), chunks, count, count * tokens)

    def sequential(self) -> Phase:
        """Return the phase of sequential pruning: two forwards per trial; other trials use the idle shards."""
        tokens, count = self._work.sequential_tokens, self._work.sequential
        return self._phase("sequential pruning", self._turn(2 * tokens), 1, count, count * tokens)

    def _phase(self, name: str, turn: _Turn, chunks: int, count: int, tokens: int) -> Phase:
        """Return the phase of `count` passes of `chunks` each. Too few chunks in progress leave shards idle."""
        idle = max(1.0, self._shards / (chunks * min(count, self._plan.trials)))
        return Phase(
            name,
            (chunks * count * idle + (self._shards - 1) * (idle == 1)) * turn.seconds,
            turn.bound,
            chunks * count * turn.weights_moved,
            tokens * self._model.token_bytes * (self._shards > 1),
        )

    def masks(self) -> Phase:
        """Return the phase of making masks: all shards at the same time; offloaded weights are read once more."""
        largest = max(sum(self._model.pruned[index] for index in span.layers) for span in self._plan.spans)
        transfer = self._turn(0)
        trials = self._work.variants + self._work.forecast
        count = trials - self._work.sequential
        compute = trials * largest / (MASKED_PER_SECOND[self._kind] / self._workers_per_device)
        bound = transfer.bound if count * transfer.seconds > compute else "compute"
        return Phase("masks", max(compute, count * transfer.seconds), bound, count * transfer.weights_moved)

    def _turn(self, tokens: float) -> _Turn:
        model, plan, machine = self._model, self._plan, self._machine
        layers = max(span.end - span.first for span in plan.spans)
        attention = 2 * self._work.longest * model.hidden * len(model.layers)  # half of the context, on average
        flops = 2 * tokens * (model.active + attention) * layers / len(model.layers)
        rate = machine.flops * EFFICIENCY[self._kind] / self._workers_per_device
        compute = flops / plan.residency.ranks / rate
        weights = max(sum(model.layers[index] for index in span.layers) for span in plan.spans)
        if plan.residency.offload == "cpu" and machine.gpus:
            rate, bound = machine.host_to_device / self._workers_per_device, "weights from host memory"
        elif plan.residency.offload == "nvme":
            rate = DISK_BYTES_PER_SECOND * machine.nodes / (self._shards * plan.residency.ranks)
            bound = "weights from disk"
        else:
            return _Turn(compute, "compute", 0)
        moved = weights // plan.residency.ranks
        return _Turn(max(compute, moved / rate), bound if moved / rate > compute else "compute", moved)
