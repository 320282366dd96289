"""How long a sweep will take, phase by phase, from sizes and rates alone; and what bounds each phase.

A pass of C chunks through S shards takes C + S - 1 turns of one shard's work on one chunk: its floating-point
operations, or the transfer of its weights where they move, whichever is longer, because the next layer is on its
way while one works. Rates that are assumed, not measured, are constants here, and the plan says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlprune.planning.machine import Machine
from mlprune.planning.memory import Work
from mlprune.planning.model_size import ModelSize
from mlprune.planning.planner import Plan

EFFICIENCY = {"gpu": 0.4, "cpu": 0.5}  # of the peak, in passes of some thousand tokens
MASKED_PER_SECOND = {"gpu": 5e9, "cpu": 200e6}  # weights scored, sorted and packed; of a GPU, of a node's cores
DISK_BYTES_PER_SECOND = 2e9  # of a node


@dataclass(frozen=True)
class Phase:
    """One phase of a sweep: how long, what it waits for, and the bytes that move meanwhile."""

    name: str
    seconds: float
    bound: str  # compute, weights from host memory, weights from disk
    weights_moved: int = 0  # into each worker
    hidden_moved: int = 0  # from each shard to the next


@dataclass(frozen=True)
class _Turn:
    """One shard's work on one chunk."""

    seconds: float
    bound: str
    weights_moved: int


def forecast(size: ModelSize, work: Work, plan: Plan, machine: Machine) -> list[Phase]:
    """The phases of a sweep, in order."""
    clock = _Clock(size, work, plan, machine)
    phases = [Phase("loading the model", size.total / machine.nodes / DISK_BYTES_PER_SECOND, "disk")]
    if work.calibration and work.variants > work.sequential:
        phases.append(clock.passes("calibration", sum(work.calibration), 1, masked=False))
    if work.sequential:
        phases.append(clock.sequential())
    phases.append(clock.masks())
    if work.evaluation:
        phases.append(clock.passes("evaluation of the dense model", work.evaluation, 1, masked=False))
        phases.append(clock.passes("evaluation of the variants", work.evaluation, work.variants, masked=True))
    return phases


class _Clock:
    def __init__(self, size: ModelSize, work: Work, plan: Plan, machine: Machine) -> None:
        self._model, self._work, self._plan, self._machine = size, work, plan, machine
        self._shards = len(plan.spans)
        self._kind = "gpu" if machine.gpus else "cpu"
        self._crowd = max(1.0, self._shards * plan.residency.ranks / (machine.all_gpus or machine.nodes))

    def passes(self, name: str, tokens: int, count: int, masked: bool) -> Phase:
        """`count` passes, of trials that follow each other without a gap."""
        size = self._plan.chunks.size(tokens, self._shards, masked)
        chunks = math.ceil(tokens / max(1.0, size))
        return self._phase(name, self._turn(size), chunks, count, count * tokens)

    def sequential(self) -> Phase:
        """Two forwards a variant, of which other trials fill the gaps."""
        tokens, count = self._work.sequential_tokens, self._work.sequential
        return self._phase("sequential pruning", self._turn(2 * tokens), 1, count, count * tokens)

    def _phase(self, name: str, turn: _Turn, chunks: int, count: int, tokens: int) -> Phase:
        """`count` passes of `chunks` each. Too few chunks under way at once leave shards idle."""
        idle = max(1.0, self._shards / (chunks * min(count, self._plan.trials)))
        return Phase(
            name,
            (chunks * count * idle + (self._shards - 1) * (idle == 1)) * turn.seconds,
            turn.bound,
            chunks * count * turn.weights_moved,
            tokens * self._model.token_bytes * (self._shards > 1),
        )

    def masks(self) -> Phase:
        """Every shard its own, at the same time. Weights that move do so once more for this."""
        span = max(self._plan.spans, key=lambda span: sum(self._model.pruned[index] for index in span.layers))
        largest = sum(self._model.pruned[index] for index in span.layers)
        move = self._turn(0)
        count = self._work.variants - self._work.sequential
        compute = self._work.variants * largest / (MASKED_PER_SECOND[self._kind] / self._crowd)
        bound = move.bound if count * move.seconds > compute else "compute"
        return Phase("masks", max(compute, count * move.seconds), bound, count * move.weights_moved)

    def _turn(self, tokens: float) -> _Turn:
        size, plan, machine = self._model, self._plan, self._machine
        layers = max(span.end - span.first for span in plan.spans)
        attention = 2 * self._work.longest * size.hidden * len(size.layers)  # half of the context, on average
        flops = 2 * tokens * (size.active + attention) * layers / len(size.layers)
        compute = flops / plan.residency.ranks / (machine.flops * EFFICIENCY[self._kind] / self._crowd)
        held = max(sum(size.layers[index] for index in span.layers) for span in plan.spans)
        if plan.residency.offload == "cpu" and machine.gpus:
            rate, bound = machine.host_to_device / self._crowd, "weights from host memory"
        elif plan.residency.offload == "nvme":
            rate = DISK_BYTES_PER_SECOND * machine.nodes / (self._shards * plan.residency.ranks)
            bound = "weights from disk"
        else:
            return _Turn(compute, "compute", 0)
        moved = held // plan.residency.ranks
        return _Turn(max(compute, moved / rate), bound if moved / rate > compute else "compute", moved)
