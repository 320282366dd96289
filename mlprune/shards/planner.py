"""Layers to shards, by bytes; where the weights live; and the memory that this takes, before any weight is read.

Sizes are bytes, where not said otherwise. What a worker holds is told by kind (`WorkerMemory`), each kind by a
formula of its own, and tests hold the sum to the peak of real workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mlprune.config import PipelineSpec
from mlprune.console import size_text
from mlprune.data.calibration import MICRO_BATCH_TOKENS, Batch
from mlprune.errors import ModelError, SpecError
from mlprune.models.hollow import Span
from mlprune.models.zero import BORROWED
from mlprune.shards.machine import Machine
from mlprune.shards.shape import ModelShape
from mlprune.shards.worker import LOGIT_TOKENS

# hidden states on their way between two shards: as much as fits a modest object store many times over
CHUNK_BYTES = 256 * 2**20
# Chunks a shard of a pass: more keep more shards busy, but each makes the masked layers anew.
DENSE_CHUNKS, MASKED_CHUNKS = 4, 2
# Of a machine's memory, what hidden states on their way may take under ZeRO (Ray's object store has 30%).
HIDDEN_SHARE = 0.2
# Measured: an interpreter with torch, transformers and Ray; DeepSpeed beside them. Not measured: a CUDA context.
PROCESS_BYTES, DEEPSPEED_BYTES = 470 * 2**20, 90 * 2**20
GPU_PROCESS_BYTES = 2**30
GPU_USABLE = 0.95  # the rest is lost between blocks of torch's allocator


@dataclass(frozen=True)
class Chunks:
    """How a pass's micro-batches are cut: into chunks that follow each other through the shards."""

    limit: int  # tokens of a chunk at most, pads included; a micro-batch is never cut
    few: bool  # each chunk brings every weight anew: as few as `limit` allows

    def size(self, tokens: int, shards: int, masked: bool) -> float:
        """Tokens of a chunk of a pass of `tokens`."""
        wanted = MASKED_CHUNKS if masked else DENSE_CHUNKS
        one = self.few or (masked and shards == 1)
        return min(tokens / (1 if one else wanted * shards), self.limit)

    def of(self, batches: Sequence[Batch], shards: int, masked: bool) -> Iterator[Sequence[Batch]]:
        """Consecutive micro-batches, in chunks of at most `size` tokens or of one micro-batch."""
        limit = self.size(sum(batch.input_ids.numel() for batch in batches), shards, masked)
        chunk: list[Batch] = []
        size = 0
        for batch in batches:
            if chunk and size + batch.input_ids.numel() > limit:
                yield chunk
                chunk, size = [], 0
            chunk.append(batch)
            size += batch.input_ids.numel()
        if chunk:
            yield chunk


@dataclass(frozen=True)
class Work:
    """What will be asked of the model. Tokens count pads."""

    calibration: tuple[int, ...]  # tokens of each calibration set
    evaluation: int  # tokens of the evaluation set
    longest: int  # tokens of the longest row
    variants: int  # trials in all
    sequential: int = 0  # of them, those pruned layer by layer
    sequential_tokens: int = 0  # of the largest such variant's calibration sets together

    @property
    def micro_batch(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(MICRO_BATCH_TOKENS, self.longest)


@dataclass(frozen=True)
class Holding:
    """How a shard's weights are held: on the device, or offloaded and partitioned over `ranks`."""

    residency: Literal["resident", "zero"]
    offload: Literal["cpu", "nvme"] | None = None
    ranks: int = 1

    def __str__(self) -> str:
        return f"zero/{self.offload}" if self.offload else "resident"


@dataclass(frozen=True)
class WorkerMemory:
    """The most bytes that one rank of one shard needs on its device, by kind; and beside the device."""

    process: int  # interpreter and libraries; on a GPU its context
    weights: int  # what stays: with ZeRO only embedding and head
    working: int  # borrowed layers, a masked copy of one, scores while masks are made
    hidden: int  # hidden states of a chunk
    activations: int  # within a layer, of a micro-batch
    moments: int
    masks: int
    logits: int
    host: int = 0  # in the machine's memory, where the device is a GPU
    disk: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return int(sum(vars(self).values())) - self.host - self.disk


def worker_memory(
    shape: ModelShape, span: Span, shards: int, work: Work, holding: Holding, chunks: Chunks, on_gpu: bool
) -> WorkerMemory:
    """The memory of one rank of the shard that holds `span`, one of `shards`."""
    ends = shape.ends[0] * span.is_first + shape.ends[1] * span.is_last
    if shape.tied and span.is_first and span.is_last:
        ends = shape.ends[0]
    layers = sum(shape.layers[index] for index in span.layers)
    away = layers // holding.ranks if holding.offload else 0
    here = away if holding.offload == "cpu" and not on_gpu else 0  # "offloaded" to where it is used
    item, zero = shape.dtype.itemsize, holding.offload is not None
    widths = sum(shape.layer_widths[index] for index in span.layers)
    gathering = max(shape.layer_widths[index] for index in span.layers)
    pruned = sum(shape.pruned[index] for index in span.layers)
    logits = min(LOGIT_TOKENS, shape.positions or LOGIT_TOKENS) * shape.vocabulary * (8 if item == 4 else item + 8)
    process = PROCESS_BYTES + DEEPSPEED_BYTES * zero
    return WorkerMemory(
        process=GPU_PROCESS_BYTES if on_gpu else process,
        weights=ends + (here if zero else layers),
        working=_borrowed(shape, holding, on_gpu) + _working(shape, max(shape.pruned[i] for i in span.layers)),
        hidden=_hidden(shape, shards, work, holding, chunks, on_gpu),
        activations=_activations(shape, work),
        moments=(len(work.calibration) * widths + gathering) * 8,
        masks=min(shards, work.variants) * pruned // 8,  # so many trials are alive at once
        logits=logits if span.is_last and work.evaluation else 0,
        host=(process + (away if holding.offload == "cpu" else _disk_buffers(shape, holding))) * on_gpu,
        disk=away if holding.offload == "nvme" else 0,
    )


def _disk_buffers(shape: ModelShape, holding: Holding) -> int:
    buffers = BORROWED * shape.packed * shape.dtype.itemsize // holding.ranks
    return buffers if holding.offload == "nvme" else 0


def _borrowed(shape: ModelShape, holding: Holding, on_gpu: bool) -> int:
    """Layers that are here because they are borrowed, or while they are handed over."""
    if holding.offload is None:
        return 0
    layer = shape.packed * shape.dtype.itemsize
    if on_gpu:
        return BORROWED * layer
    gathered = BORROWED * layer if holding.ranks > 1 else 0
    return _disk_buffers(shape, holding) + max(gathered, BORROWED * layer)  # read from the checkpoint, and packed


def _working(shape: ModelShape, largest_layer: int) -> int:
    """A masked copy of a layer with one mask unpacked; or the scores of one matrix, and what sorts them."""
    matrix, item = shape.largest_matrix, shape.dtype.itemsize
    return max(largest_layer * item + 3 * matrix, matrix * (10 if item == 4 else 14))


def _hidden(shape: ModelShape, shards: int, work: Work, holding: Holding, chunks: Chunks, on_gpu: bool) -> int:
    dense = chunks.size(sum(work.calibration), shards, masked=False)
    masked = chunks.size(work.evaluation, shards, masked=True)
    tokens = max(dense, masked, work.sequential_tokens, work.micro_batch) / holding.ranks
    copies = 1 if on_gpu or shards == 1 else 3  # what came in and what goes out are shared memory on one machine
    return int(tokens * shape.token_bytes * copies)


def _activations(shape: ModelShape, work: Work) -> int:
    """Some [tokens, width] tensors, attention scores where they are made whole, squares for the moments."""
    tokens, item = work.micro_batch, shape.dtype.itemsize
    attention = shape.heads * tokens * work.longest * (item + 4)
    squares = tokens * shape.intermediate * 8
    return tokens * (10 * shape.hidden + 3 * shape.intermediate) * item + attention + squares


@dataclass(frozen=True)
class Plan:
    """Which layers go where, how they are held, and what that takes."""

    spans: tuple[Span, ...]
    holding: Holding
    chunks: Chunks
    memory: tuple[WorkerMemory, ...]  # of one rank of each shard
    why: str  # of the residency, in one line


def make_plan(shape: ModelShape, work: Work, machine: Machine, asked: PipelineSpec, name: str) -> Plan:
    """The plan that fits: resident if that does, else offloaded to host memory, else to disk; or what is asked.

    Raises ModelError when nothing fits, SpecError when what is asked cannot be.
    """
    spans = cut(shape, _shards(shape, machine, asked))
    reasons: list[str] = []
    for holding in _candidates(asked, machine):
        plan = _plan(shape, spans, work, machine, holding, asked)
        short = shortage(plan, machine, asked)
        if short is None:
            why = f"{', '.join(reasons)}, so {holding}" if reasons else ""
            return replace(plan, why=why)
        reasons.append(f"{holding} needs {short}")
    if asked.residency != "auto":
        remedy = f"{reasons[-1]}; take auto, or zero with offload nvme" if asked.residency == "resident" else ""
        remedy = remedy or f"{reasons[-1]}; take more shards, offload nvme, or fewer calibration tokens"
        raise ModelError("pipeline.residency", asked.residency, f"{name!r} does not fit: {remedy}")
    raise ModelError("model.path", repr(name), f"does not fit: {'; '.join(reasons)}; take more shards or bfloat16")


def _shards(shape: ModelShape, machine: Machine, asked: PipelineSpec) -> int:
    """As many shards as there are GPUs for; one shard where there is none."""
    if asked.shards != "auto":
        return asked.shards
    return min(max(1, machine.all_gpus // asked.ranks_per_shard), len(shape.layers))


def _candidates(asked: PipelineSpec, machine: Machine) -> list[Holding]:
    """What may be taken, best first. Without a GPU, offloading to host memory saves nothing."""
    ranks = asked.ranks_per_shard
    resident = [Holding("resident")] if asked.residency != "zero" and ranks == 1 else []
    if asked.residency == "resident":
        return resident
    places: list[Literal["cpu", "nvme"]] = ["cpu", "nvme"]
    if asked.offload:
        places = [asked.offload]
    elif resident and not machine.gpus:
        places = ["nvme"]
    return resident + [Holding("zero", place, ranks) for place in places]


def _plan(
    shape: ModelShape, spans: tuple[Span, ...], work: Work, machine: Machine, holding: Holding, asked: PipelineSpec
) -> Plan:
    chunks = Chunks(CHUNK_BYTES // shape.token_bytes, few=False)
    if holding.offload:
        chunks = Chunks(_whole_pass(shape, spans, work, machine, holding, asked), few=True)
    memory = tuple(
        worker_memory(shape, span, len(spans), work, holding, chunks, machine.gpus > 0) for span in spans
    )
    return Plan(spans, holding, chunks, memory, "")


def _whole_pass(
    shape: ModelShape, spans: tuple[Span, ...], work: Work, machine: Machine, holding: Holding, asked: PipelineSpec
) -> int:
    """Tokens of a chunk, where each brings every weight anew: a whole pass, or what there is room for."""
    longest = max(sum(work.calibration), work.evaluation, work.micro_batch)
    least = Chunks(work.micro_batch, few=True)
    bare = max(
        worker_memory(shape, span, len(spans), work, holding, least, machine.gpus > 0).total for span in spans
    )
    room = (device_bytes(machine, len(spans) * holding.ranks, asked) - bare) * holding.ranks
    copies = 1 if machine.gpus or len(spans) == 1 else 3
    limit = work.micro_batch + room // (shape.token_bytes * copies)
    if len(spans) > 1:  # a chunk a shard is on its way at once
        limit = min(limit, int(machine.host_memory * HIDDEN_SHARE) // len(spans) // shape.token_bytes)
    return max(work.micro_batch, min(longest, limit))


def device_bytes(machine: Machine, workers: int, asked: PipelineSpec) -> int:
    """What one worker may hold: its part of a GPU, or of the memory of the machine it is on."""
    if machine.gpus:
        have = int(machine.gpu_memory * GPU_USABLE) // -(-workers // machine.all_gpus)
    else:
        have = machine.host_memory // -(-workers // machine.nodes)
    return min(have, int(asked.worker_memory)) if asked.worker_memory else have


def shortage(plan: Plan, machine: Machine, asked: PipelineSpec) -> str | None:
    """What the plan lacks, as `31 GiB of 24 GiB a worker`; None if it fits."""
    ranks = plan.holding.ranks
    workers = len(plan.spans) * ranks
    if machine.gpus and ranks > 1 and workers > machine.all_gpus:
        return f"{workers} GPUs of {machine.all_gpus}: a rank has one of its own"
    if machine.gpus or asked.worker_memory:
        need, have = max(part.total for part in plan.memory), device_bytes(machine, workers, asked)
        if need > have:
            return f"{size_text(need)} of {size_text(have)} a worker"
    totals = [part.host if machine.gpus else part.total for part in plan.memory for _ in range(ranks)]
    a_node = -(-workers // machine.nodes)
    need = max(sum(totals[n : n + a_node]) for n in range(0, workers, a_node))
    if need > machine.host_memory:
        return f"{size_text(need)} of {size_text(machine.host_memory)} host memory"
    disk = max(sum(part.disk for part in plan.memory) * ranks // machine.nodes, 0)
    if machine.disk is not None and disk > machine.disk:
        return f"{size_text(disk)} of {size_text(machine.disk)} disk"
    return None


def cut(shape: ModelShape, shards: int) -> tuple[Span, ...]:
    """Contiguous spans whose largest is as small as can be, in bytes; every shard gets a layer."""
    count = len(shape.layers)
    if not 1 <= shards <= count:
        raise SpecError("pipeline.shards", shards, f"the model has {count} layers; write 1 to {count}")
    sizes = list(shape.layers)
    if shards > 1:  # one shard holds all, in whatever way
        sizes[0] += shape.ends[0]
        sizes[-1] += shape.ends[1]
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
