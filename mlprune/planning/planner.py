"""Layers to shards, by bytes, and where the weights live: the first way that fits, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mlprune.console import size_text
from mlprune.errors import ModelError, SpecError
from mlprune.models.hollow import Span
from mlprune.planning.machine import Machine, share_of
from mlprune.planning.memory import (
    CHUNK_BYTES,
    Chunks,
    ResidencyPlan,
    Work,
    WorkerMemory,
    copies_of_hidden,
    worker_memory,
)
from mlprune.planning.model_size import ModelSize
from mlprune.spec.schema import PipelineSpec

# Of a machine's memory, what hidden states on their way may take under ZeRO (Ray's object store has 30%).
HIDDEN_SHARE = 0.2
GPU_USABLE = 0.95  # the rest is lost between blocks of torch's allocator


@dataclass(frozen=True)
class Plan:
    """Which layers go where, how they are held, and what that takes."""

    spans: tuple[Span, ...]
    residency: ResidencyPlan
    chunks: Chunks
    replicas: int  # of the whole pipeline
    trials: int  # at once on a replica: one a shard, or as many as there is room for the masks of
    memory: tuple[WorkerMemory, ...]  # of one rank of each shard
    reason: str  # of the residency, in one line


def make_plan(size: ModelSize, work: Work, machine: Machine, asked: PipelineSpec, name: str) -> Plan:
    """The plan that fits: resident if that does, else offloaded to host memory, else to disk; or what is asked.

    Raises ModelError when nothing fits, SpecError when what is asked cannot be.
    """
    machine = _share(machine, asked.replicas)
    if machine.elastic and asked.shards == "auto":
        return _fewest(size, work, machine, asked, name)
    spans = cut(size, _shards(size, machine, asked))
    _check_ranks(len(spans), machine, asked)
    reasons: list[str] = []
    for residency in _candidates(asked, machine):
        for trials in range(max(1, min(len(spans), -(-work.variants // asked.replicas))), 0, -1):
            plan = _plan(size, spans, work, machine, residency, asked, trials)
            short = shortage(plan, machine, asked)
            if short is None:
                return replace(plan, reason=f"{', '.join(reasons)}, so {residency}" if reasons else "")
        reasons.append(f"{residency} needs {short}")
    if asked.residency != "auto":
        other = "take auto" if asked.residency == "resident" else "take more shards or fewer calibration tokens"
        raise ModelError(
            "pipeline.residency", asked.residency, f"{name!r} does not fit: {'; '.join(reasons)}; {other}"
        )
    helps = ["more shards"] * (machine.all_gpus > len(spans)) + ["bfloat16"] * (size.dtype.itemsize == 4)
    other = " or ".join(helps or ["larger machines, or more of them"])
    raise ModelError("model.path", repr(name), f"does not fit: {'; '.join(reasons)}; take {other}")


def _share(machine: Machine, replicas: int) -> Machine:
    share = share_of(machine, replicas)
    if machine.gpus and not share.gpus:
        raise SpecError("pipeline.replicas", replicas, f"each needs a GPU, and there are {machine.all_gpus}")
    return share


def _fewest(size: ModelSize, work: Work, machine: Machine, asked: PipelineSpec, name: str) -> Plan:
    """Where nodes are launched, and paid, as they are asked for: the fewest shards that are resident.

    If even the most cannot be, weights move, over as many shards as there may be.
    """
    most = min(
        max(machine.all_gpus // asked.ranks_per_shard, 1 if machine.gpus else machine.nodes), len(size.layers)
    )
    fixed = replace(machine, elastic=False)
    wanted = "auto" if asked.residency == "zero" else "resident"
    for shards in range(1, most + 1):
        on_nodes = replace(fixed, nodes=min(machine.nodes, -(-shards // max(1, machine.gpus))))
        one = asked.model_copy(update={"shards": shards, "replicas": 1, "residency": wanted})
        try:
            return replace(make_plan(size, work, on_nodes, one, name), replicas=asked.replicas)
        except ModelError:
            continue
    all_of_them = asked.model_copy(update={"shards": most, "replicas": 1})
    return replace(make_plan(size, work, fixed, all_of_them, name), replicas=asked.replicas)


def _check_ranks(shards: int, machine: Machine, asked: PipelineSpec) -> None:
    """Ranks of a shard take a GPU each: they wait for each other, so none may wait for a GPU."""
    ranks = asked.ranks_per_shard
    if machine.gpus and ranks > 1 and shards * ranks > machine.all_gpus:
        remedy = f"{shards} shards of {ranks} ranks need {shards * ranks} GPUs, there are {machine.all_gpus}"
        raise SpecError("pipeline.ranks_per_shard", ranks, f"{remedy}: take fewer of either")


def _shards(size: ModelSize, machine: Machine, asked: PipelineSpec) -> int:
    """As many shards as there are GPUs for; one shard where there is none."""
    if asked.shards != "auto":
        return asked.shards
    return min(max(1, machine.all_gpus // asked.ranks_per_shard), len(size.layers))


def _candidates(asked: PipelineSpec, machine: Machine) -> list[ResidencyPlan]:
    """What may be taken, best first. Without a GPU, offloading to host memory saves nothing."""
    ranks = asked.ranks_per_shard
    resident = [ResidencyPlan("resident")] if asked.residency != "zero" and ranks == 1 else []
    if asked.residency == "resident":
        return resident
    places: list[Literal["cpu", "nvme"]] = ["cpu", "nvme"]
    if asked.offload:
        places = [asked.offload]
    elif resident and not machine.gpus:
        places = ["nvme"]
    return resident + [ResidencyPlan("zero", place, ranks) for place in places]


def _plan(
    size: ModelSize,
    spans: tuple[Span, ...],
    work: Work,
    machine: Machine,
    residency: ResidencyPlan,
    asked: PipelineSpec,
    trials: int,
) -> Plan:
    def memory(chunks: Chunks) -> tuple[WorkerMemory, ...]:
        on_gpu = machine.gpus > 0
        return tuple(
            worker_memory(size, span, len(spans), work, residency, chunks, on_gpu, trials) for span in spans
        )

    chunks = Chunks(CHUNK_BYTES // size.token_bytes, few=False)
    if residency.offload:  # a whole pass in one chunk, or what there is room for
        bare = memory(Chunks(work.micro_batch, few=True))
        room = device_bytes(machine, len(spans) * residency.ranks, asked) - max(part.total for part in bare)
        beside = machine.host_memory - of_a_node([part.host for part in bare], machine, residency.ranks)
        limit = work.micro_batch + room * residency.ranks // (
            size.token_bytes * copies_of_hidden(len(spans), machine.gpus > 0)
        )
        if len(spans) > 1:  # a chunk a shard is on its way at once
            on_the_way = min(int(machine.host_memory * HIDDEN_SHARE), beside) // (2 * len(spans))
            limit = min(limit, on_the_way // size.token_bytes)
        longest = max(sum(work.calibration), work.evaluation)
        chunks = Chunks(max(work.micro_batch, min(longest, limit)), few=True)
    return Plan(spans, residency, chunks, asked.replicas, trials, memory(chunks), "")


def device_bytes(machine: Machine, workers: int, asked: PipelineSpec) -> int:
    """What one worker may hold: its part of a GPU, or of the memory of the machine it is on."""
    if machine.gpus:
        have = int(machine.gpu_memory * GPU_USABLE) // -(-workers // machine.all_gpus)
    else:
        have = machine.host_memory // -(-workers // machine.nodes)
    return have if asked.worker_memory is None else min(have, int(asked.worker_memory))


def of_a_node(parts: Sequence[int], machine: Machine, ranks: int) -> int:
    """The largest sum over the workers of one node, `parts` being of one rank of each shard."""
    workers = [part for part in parts for _ in range(ranks)]
    a_node = -(-len(workers) // machine.nodes)
    return max(sum(workers[first : first + a_node]) for first in range(0, len(workers), a_node))


def shortage(plan: Plan, machine: Machine, asked: PipelineSpec) -> str | None:
    """What the plan lacks, as `31 GiB of 24 GiB a worker`; None if it fits."""
    ranks, memory = plan.residency.ranks, plan.memory
    limit = None if asked.worker_memory is None else int(asked.worker_memory)
    if machine.gpus:
        limit = device_bytes(machine, len(plan.spans) * ranks, asked)
    most = max(part.total for part in memory)
    if limit is not None and most > limit:
        return f"{size_text(most)} of {size_text(limit)} a worker"
    host = of_a_node([part.host if machine.gpus else part.total for part in memory], machine, ranks)
    if host > machine.host_memory:
        return f"{size_text(host)} of {size_text(machine.host_memory)} {'host' if machine.gpus else 'free'} memory"
    disk = of_a_node([part.disk for part in memory], machine, ranks)
    if machine.disk is not None and disk > machine.disk:
        return f"{size_text(disk)} of {size_text(machine.disk)} disk"
    return None


def cut(size: ModelSize, shards: int) -> tuple[Span, ...]:
    """Contiguous spans whose largest is as small as can be, in bytes; every shard gets a layer."""
    count = len(size.layers)
    if not 1 <= shards <= count:
        raise SpecError("pipeline.shards", shards, f"the model has {count} layers; write 1 to {count}")
    sizes = list(size.layers)
    if shards > 1:  # one shard holds all, in whatever way
        sizes[0] += size.ends[0]
        sizes[-1] += size.ends[1]
    starts = _starts(sizes, shards)
    return tuple(Span(a, b, count) for a, b in zip(starts, [*starts[1:], count], strict=True))


def _starts(sizes: Sequence[int], shards: int) -> list[int]:
    """Where each part starts, by the smallest limit that `shards` parts can keep to (bisection)."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(sizes, middle, 1)) <= shards:
            high = middle
        else:
            low = middle + 1
    return _fill(sizes, low, shards)


def _fill(sizes: Sequence[int], limit: int, at_least: int) -> list[int]:
    """Starts of parts filled up to `limit` in order, in at least `at_least` parts."""
    starts, held = [0], 0
    for index, size in enumerate(sizes):
        must_open = len(sizes) - index == at_least - len(starts)  # one layer each for the shards still empty
        if index and (held + size > limit or must_open):
            starts.append(index)
            held = 0
        held += size
    return starts
