"""Cuts a model into shards by bytes and chooses where weights are held: the first way that fits in memory.

No weight is read for this. The memory of one worker is computed in `memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mlprune.console import size_text
from mlprune.errors import ModelError, SpecError
from mlprune.models.hollow import Span
from mlprune.planning.machine import Machine, replica_share
from mlprune.planning.memory import (
    CHUNK_BYTES,
    Chunks,
    ResidencyPlan,
    WorkerMemory,
    copies_of_hidden,
    worker_memory,
)
from mlprune.planning.model_size import ModelSize
from mlprune.planning.work import Work
from mlprune.spec.schema import PipelineSpec

# Share of a machine's memory for hidden states between shards under ZeRO (Ray's object store has 30%).
HIDDEN_SHARE = 0.2
KEPT_SHARE = 0.1  # share of a worker's host memory for masks that later stages use again, at most
GPU_USABLE = 0.95  # the rest is lost to fragmentation in torch's allocator


@dataclass(frozen=True)
class Plan:
    """Which shard holds which layers, where their weights are held, and the memory that this needs."""

    spans: tuple[Span, ...]
    residency: ResidencyPlan
    chunks: Chunks
    replicas: int  # copies of the whole pipeline
    trials: int  # at the same time on a replica: one per shard, or fewer if their masks do not fit
    memory: tuple[WorkerMemory, ...]  # for one rank of each shard
    reason: str  # why this residency was chosen, in one line; empty if it was the first choice
    kept_masks: int = 0  # bytes of host memory of each worker for masks that a later stage may use again


def make_plan(model: ModelSize, work: Work, machine: Machine, options: PipelineSpec, name: str) -> Plan:
    """Return the first plan that fits: resident, offloaded to host memory, or offloaded to disk.

    `options` may require one of these, or a number of shards, ranks and replicas.

    Raises ModelError if nothing fits and SpecError if the options are impossible on this machine.
    """
    machine = _replica_machine(machine, options.replicas)
    if machine.elastic and options.shards == "auto":
        return _plan_fewest_shards(model, work, machine, options, name)
    spans = cut(model, _shards(model, machine, options))
    _check_ranks(len(spans), machine, options)
    reasons: list[str] = []
    for residency in _candidates(options, machine):
        for trials in range(max(1, min(len(spans), -(-work.variants // options.replicas))), 0, -1):
            plan = _plan(model, spans, work, machine, residency, options, trials)
            short = shortage(plan, machine, options)
            if short is None:
                plan = _keep_masks(plan, work, machine, options)
                return replace(plan, reason=f"{', '.join(reasons)}, so {residency}" if reasons else "")
        reasons.append(f"{residency} needs {short}")
    if options.residency != "auto":
        remedy = "take auto" if options.residency == "resident" else "take more shards or fewer calibration tokens"
        raise ModelError(
            "pipeline.residency", options.residency, f"{name!r} does not fit: {'; '.join(reasons)}; {remedy}"
        )
    remedies = ["more shards"] * (machine.all_gpus > len(spans)) + ["bfloat16"] * (model.dtype.itemsize == 4)
    remedy = " or ".join(remedies or ["larger machines, or more of them"])
    raise ModelError("model.path", repr(name), f"does not fit: {'; '.join(reasons)}; take {remedy}")


def _replica_machine(machine: Machine, replicas: int) -> Machine:
    share = replica_share(machine, replicas)
    if machine.gpus and not share.gpus:
        raise SpecError("pipeline.replicas", replicas, f"each needs a GPU, and there are {machine.all_gpus}")
    return share


def _plan_fewest_shards(model: ModelSize, work: Work, machine: Machine, options: PipelineSpec, name: str) -> Plan:
    """Return the plan with the fewest shards that keep weights resident, for nodes that start on demand.

    Every such node costs money. If not even the largest number of shards is resident, that number is offloaded.
    """
    most = min(
        max(machine.all_gpus // options.ranks_per_shard, 1 if machine.gpus else machine.nodes), len(model.layers)
    )
    fixed = replace(machine, elastic=False)
    wanted = "auto" if options.residency == "zero" else "resident"
    for shards in range(1, most + 1):
        on_nodes = replace(fixed, nodes=min(machine.nodes, -(-shards // max(1, machine.gpus))))
        attempt = options.model_copy(update={"shards": shards, "replicas": 1, "residency": wanted})
        try:
            return replace(make_plan(model, work, on_nodes, attempt, name), replicas=options.replicas)
        except ModelError:
            continue
    largest = options.model_copy(update={"shards": most, "replicas": 1})
    return replace(make_plan(model, work, fixed, largest, name), replicas=options.replicas)


def _check_ranks(shards: int, machine: Machine, options: PipelineSpec) -> None:
    """Raise SpecError unless each rank gets its own GPU: ranks wait for each other, so none may wait for a GPU."""
    ranks = options.ranks_per_shard
    if machine.gpus and ranks > 1 and shards * ranks > machine.all_gpus:
        remedy = f"{shards} shards of {ranks} ranks need {shards * ranks} GPUs, there are {machine.all_gpus}"
        raise SpecError("pipeline.ranks_per_shard", ranks, f"{remedy}: take fewer of either")


def _shards(model: ModelSize, machine: Machine, options: PipelineSpec) -> int:
    """Return the number of shards: as many as there are GPUs for; one without GPUs."""
    if options.shards != "auto":
        return options.shards
    return min(max(1, machine.all_gpus // options.ranks_per_shard), len(model.layers))


def _candidates(options: PipelineSpec, machine: Machine) -> list[ResidencyPlan]:
    """Return the residencies to try, best first. Without a GPU, offloading to host memory saves nothing."""
    ranks = options.ranks_per_shard
    resident = [ResidencyPlan("resident")] if options.residency != "zero" and ranks == 1 else []
    if options.residency == "resident":
        return resident
    places: list[Literal["cpu", "nvme"]] = ["cpu", "nvme"]
    if options.offload:
        places = [options.offload]
    elif resident and not machine.gpus:
        places = ["nvme"]
    return resident + [ResidencyPlan("zero", place, ranks) for place in places]


def _plan(
    model: ModelSize,
    spans: tuple[Span, ...],
    work: Work,
    machine: Machine,
    residency: ResidencyPlan,
    options: PipelineSpec,
    trials: int,
) -> Plan:
    def memory(chunks: Chunks) -> tuple[WorkerMemory, ...]:
        on_gpu = machine.gpus > 0
        return tuple(
            worker_memory(model, span, len(spans), work, residency, chunks, on_gpu, trials) for span in spans
        )

    chunks = Chunks(CHUNK_BYTES // model.token_bytes, few=False)
    if residency.offload:  # a whole pass in one chunk, or as much as fits
        minimum = memory(Chunks(work.micro_batch, few=True))
        free = device_bytes(machine, len(spans) * residency.ranks, options) - max(part.total for part in minimum)
        free_host = machine.host_memory - largest_node_sum(
            [part.host for part in minimum], machine, residency.ranks
        )
        limit = work.micro_batch + free * residency.ranks // (
            model.token_bytes * copies_of_hidden(len(spans), machine.gpus > 0)
        )
        if len(spans) > 1:  # up to two chunks per shard are in transit
            in_transit = min(int(machine.host_memory * HIDDEN_SHARE), free_host) // (2 * len(spans))
            limit = min(limit, in_transit // model.token_bytes)
        longest = max(sum(work.calibration), work.evaluation)
        chunks = Chunks(max(work.micro_batch, min(longest, limit)), few=True)
    return Plan(spans, residency, chunks, options.replicas, trials, memory(chunks), "")


def _keep_masks(plan: Plan, work: Work, machine: Machine, options: PipelineSpec) -> Plan:
    """Return the plan with host memory for the masks that later stages use again: all of them, as far as they fit.

    They get a tenth of a worker's share of host memory at most, and never more than is free.
    """
    workers = -(-len(plan.spans) * plan.residency.ranks // machine.nodes)
    share = machine.host_memory // workers
    if not machine.gpus and options.worker_memory is not None:
        share = min(share, int(options.worker_memory))
    used = max(part.host if machine.gpus else part.total for part in plan.memory)
    wanted = work.returning * max(part.masks for part in plan.memory) // plan.trials
    kept = max(0, min(wanted, int(share * KEPT_SHARE), share - used))
    memory = [
        replace(part, host=part.host + kept) if machine.gpus else replace(part, masks=part.masks + kept)
        for part in plan.memory
    ]
    return replace(plan, kept_masks=kept, memory=tuple(memory))


def device_bytes(machine: Machine, workers: int, options: PipelineSpec) -> int:
    """Return the bytes that one worker may use: its share of a GPU, or of its node's memory."""
    if machine.gpus:
        share = int(machine.gpu_memory * GPU_USABLE) // -(-workers // machine.all_gpus)
    else:
        share = machine.host_memory // -(-workers // machine.nodes)
    return share if options.worker_memory is None else min(share, int(options.worker_memory))


def largest_node_sum(parts: Sequence[int], machine: Machine, ranks: int) -> int:
    """Return the largest sum over the workers of one node; `parts` holds the value of one rank of each shard."""
    workers = [part for part in parts for _ in range(ranks)]
    per_node = -(-len(workers) // machine.nodes)
    return max(sum(workers[first : first + per_node]) for first in range(0, len(workers), per_node))


def shortage(plan: Plan, machine: Machine, options: PipelineSpec) -> str | None:
    """Return what the plan lacks, e.g. `31 GiB of 24 GiB per worker`; None if it fits."""
    ranks, memory = plan.residency.ranks, plan.memory
    limit = None if options.worker_memory is None else int(options.worker_memory)
    if machine.gpus:
        limit = device_bytes(machine, len(plan.spans) * ranks, options)
    most = max(part.total for part in memory)
    if limit is not None and most > limit:
        return f"{size_text(most)} of {size_text(limit)} per worker"
    host = largest_node_sum([part.host if machine.gpus else part.total for part in memory], machine, ranks)
    if host > machine.host_memory:
        return f"{size_text(host)} of {size_text(machine.host_memory)} {'host' if machine.gpus else 'free'} memory"
    disk = largest_node_sum([part.disk for part in memory], machine, ranks)
    if machine.disk is not None and disk > machine.disk:
        return f"{size_text(disk)} of {size_text(machine.disk)} disk"
    return None


def cut(model: ModelSize, shards: int) -> tuple[Span, ...]:
    """Return contiguous spans, at least one layer each, whose largest is as small as possible in bytes."""
    count = len(model.layers)
    if not 1 <= shards <= count:
        raise SpecError("pipeline.shards", shards, f"the model has {count} layers; write 1 to {count}")
    sizes = list(model.layers)
    if shards > 1:  # with one shard the ends change nothing
        sizes[0] += model.ends[0]
        sizes[-1] += model.ends[1]
    starts = _starts(sizes, shards)
    return tuple(Span(a, b, count) for a, b in zip(starts, [*starts[1:], count], strict=True))


def _starts(sizes: Sequence[int], shards: int) -> list[int]:
    """Return where each part starts, for the smallest size limit that `shards` parts can keep (bisection)."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(sizes, middle, 1)) <= shards:
            high = middle
        else:
            low = middle + 1
    return _fill(sizes, low, shards)


def _fill(sizes: Sequence[int], limit: int, at_least: int) -> list[int]:
    """Return the starts of at least `at_least` parts, each filled up to `limit` in order."""
    starts, held = [0], 0
    for index, size in enumerate(sizes):
        must_open = len(sizes) - index == at_least - len(starts)  # one layer for each shard that is still empty
        if index and (held + size > limit or must_open):
            starts.append(index)
            held = 0
        held += size
    return starts
