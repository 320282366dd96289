"""How long a sweep will take, phase by phase, from sizes and rates alone; and what bounds each phase.

A pass of C chunks through S shards takes C + S - 1 turns of one shard's work on one chunk: its floating-point
operations, or the transfer of its weights where they move, whichever is longer, because the next layer is on its
way while one works. Rates that are assumed, not measured, are constants here, and the plan says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlprune.shards.machine import Machine
from mlprune.shards.planner import Plan, Work
from mlprune.shards.shape import ModelShape

EFFICIENCY = {"gpu": 0.4, "cpu": 0.5}  # of the peak, in passes of some thousand tokens
MASKED_PER_SECOND = {"gpu": 5e9, "cpu": 200e6}  # weights scored, sorted and packed; of a GPU, of a node's cores
DISK_BYTES_PER_SECOND = 2e9  # of a node


@dataclass(frozen=True)
class Phase:
    """One phase of a sweep: how long, and what it waits for."""

    name: str
    seconds: float
    bound: str  # compute, weights from host memory, weights from disk


def forecast(shape: ModelShape, work: Work, plan: Plan, machine: Machine) -> list[Phase]:
    """The phases of a sweep, in order."""
    clock = _Clock(shape, work, plan, machine)
    phases = [Phase("loading the model", shape.total / machine.nodes / DISK_BYTES_PER_SECOND, "disk")]
    if work.calibration and work.variants > work.sequential:
        phases.append(clock.passes("calibration", [sum(work.calibration)], masked=False))
    if work.sequential:
        phases.append(clock.sequential())
    phases.append(clock.masks())
    if work.evaluation:
        trials = clock.passes("", [work.evaluation] * work.variants, masked=True, together=True)
        dense_model = clock.passes("", [work.evaluation], masked=False)
        phases.append(Phase("evaluation", trials.seconds + dense_model.seconds, trials.bound))
    return phases


class _Clock:
    def __init__(self, shape: ModelShape, work: Work, plan: Plan, machine: Machine) -> None:
        self._shape, self._work, self._plan, self._machine = shape, work, plan, machine
        self._shards = len(plan.spans)
        self._kind = "gpu" if machine.gpus else "cpu"
        workers = self._shards * plan.holding.ranks
        devices = machine.all_gpus or machine.nodes
        self._crowd = max(1.0, workers / devices)  # workers that share a device

    def passes(self, name: str, tokens: list[int], masked: bool, together: bool = False) -> Phase:
        """Passes one after another; `together`: of trials, whose chunks follow each other without a gap."""
        seconds, bound = 0.0, ""
        turns = 0.0
        for each in tokens:
            size = self._plan.chunks.size(each, self._shards, masked)
            chunks = -(-each // max(1, int(size)))
            turn, bound = self._turn(size)
            turns += chunks if together else chunks + self._shards - 1
            seconds = turns * turn
        if together and tokens:
            seconds += (self._shards - 1) * turn
        return Phase(name, seconds, bound)

    def sequential(self) -> Phase:
        """Two forwards a variant, of which other trials fill the gaps."""
        turn, bound = self._turn(2 * self._work.sequential_tokens)
        trials = self._work.sequential + self._shards - 1
        return Phase("sequential pruning", trials * turn, bound)

    def masks(self) -> Phase:
        """Every shard its own, at the same time."""
        largest = max(sum(self._shape.pruned[index] for index in span.layers) for span in self._plan.spans)
        rate = MASKED_PER_SECOND[self._kind] / self._crowd
        return Phase("masks", self._work.variants * largest / rate, "compute")

    def _turn(self, tokens: float) -> tuple[float, str]:
        """Seconds of one shard's work on one chunk, and what bounds it."""
        shape, plan, machine = self._shape, self._plan, self._machine
        layers = max(span.end - span.first for span in plan.spans)
        attention = 2 * self._work.longest * shape.hidden * len(shape.layers)  # half of the context, on average
        flops = 2 * tokens * (shape.active + attention) * layers / len(shape.layers)
        compute = flops / plan.holding.ranks / (machine.flops * EFFICIENCY[self._kind] / self._crowd)
        moved = max(sum(shape.layers[index] for index in span.layers) for span in plan.spans)
        bound, transfer = "compute", 0.0
        if plan.holding.offload == "cpu" and machine.gpus:
            bound = "weights from host memory"
            transfer = moved / plan.holding.ranks / (machine.host_to_device / self._crowd)
        elif plan.holding.offload == "nvme":
            bound = "weights from disk"
            transfer = moved / (DISK_BYTES_PER_SECOND * machine.nodes / self._shards)
        return max(compute, transfer), bound if transfer > compute else "compute"
