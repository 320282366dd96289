"""Estimates the memory of a worker, one formula per kind of memory; tests compare the sum with real workers.

Sizes are in bytes unless a comment says otherwise. Which plan is chosen is decided in `planner`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mlprune.data.batches import Batch
from mlprune.models.hollow import Span
from mlprune.models.memory import SLACK
from mlprune.models.zero import BORROWED
from mlprune.planning.model_size import ModelSize
from mlprune.planning.work import Work

# Logits are computed for this many tokens at a time: 512 x 256k vocabulary x 4 bytes is half a gigabyte.
LOGIT_TOKENS = 512
# Hidden states of one chunk between two shards: a modest object store holds many such chunks.
CHUNK_BYTES = 256 * 2**20
# Chunks of a pass per shard: more of them keep more shards busy, but each chunk makes the masked layers again.
DENSE_CHUNKS, MASKED_CHUNKS = 4, 2
# Measured: an interpreter with torch, transformers and Ray; DeepSpeed in addition. Not measured: a CUDA context.
PROCESS_BYTES, DEEPSPEED_BYTES = 400 * 2**20, 90 * 2**20
GPU_PROCESS_BYTES = 2**30


@dataclass(frozen=True)
class Chunks:
    """How the micro-batches of a pass are grouped into chunks, which follow each other through the shards."""

    limit: int  # maximum tokens of a chunk, padding included; a micro-batch is never cut
    few: bool  # weights are transferred for each chunk, so make as few chunks as `limit` allows

    def size(self, tokens: int, shards: int, masked: bool) -> float:
        """Return the tokens per chunk for a pass of `tokens`."""
        per_shard = MASKED_CHUNKS if masked else DENSE_CHUNKS
        single = self.few or (masked and shards == 1)
        return min(tokens / (1 if single else per_shard * shards), self.limit)

    def split(self, batches: Sequence[Batch], shards: int, masked: bool) -> Iterator[Sequence[Batch]]:
        """Yield chunks of consecutive micro-batches: at most `size` tokens each, or a single micro-batch."""
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
class ResidencyPlan:
    """Where the weights of a shard are held: on the device, or offloaded and partitioned over `ranks`."""

    kind: Literal["resident", "zero"]
    offload: Literal["cpu", "nvme"] | None = None
    ranks: int = 1

    def __str__(self) -> str:
        return f"zero/{self.offload}" if self.offload else "resident"


@dataclass(frozen=True)
class WorkerMemory:
    """Peak bytes of one rank of one shard: on its device by kind, and in host memory and on disk."""

    process: int  # interpreter and libraries; on a GPU the CUDA context
    weights: int  # weights held all the time: with ZeRO only embedding and head
    working: int  # layers borrowed from ZeRO, the masked copy of one layer, scores while masks are made
    hidden: int  # hidden states of one chunk
    activations: int  # within a layer, for one micro-batch
    moments: int
    masks: int
    logits: int
    writing: int = 0  # while text is generated: key-value cache, and masked layers that are kept for it
    host: int = 0  # in host memory, if the device is a GPU
    disk: int = 0

    @property
    def total(self) -> int:
        """Return the bytes on the device."""
        return int(sum(vars(self).values())) - self.host - self.disk


def worker_memory(
    model: ModelSize,
    span: Span,
    shards: int,
    work: Work,
    residency: ResidencyPlan,
    chunks: Chunks,
    on_gpu: bool,
    trials: int,
) -> WorkerMemory:
    """Return the memory of one rank of the shard that holds `span`, one of `shards`, with `trials` in progress."""
    ends = model.ends[0] * span.is_first + model.ends[1] * span.is_last
    if model.tied and span.is_first and span.is_last:
        ends = model.ends[0]
    layers = sum(model.layers[index] for index in span.layers)
    offloaded = layers // residency.ranks if residency.offload else 0
    # without a GPU, host memory is the device: what is offloaded to it stays there
    local = offloaded if residency.offload == "cpu" and not on_gpu else 0
    item, zero = model.dtype.itemsize, residency.offload is not None
    widths = sum(model.layer_widths[index] for index in span.layers)
    gathering = max(model.layer_widths[index] for index in span.layers)
    pruned = sum(model.pruned[index] for index in span.layers)
    logit_tokens = min(LOGIT_TOKENS, model.positions or LOGIT_TOKENS, work.evaluation)
    logits = logit_tokens * model.vocabulary * (8 if item == 4 else item + 8)
    hidden = _hidden(model, shards, work, residency, chunks, on_gpu)
    in_transit = 2 * hidden if shards > 1 else 0
    beside = offloaded if residency.offload == "cpu" else _disk_buffers(model, residency)
    process = PROCESS_BYTES + DEEPSPEED_BYTES * zero + SLACK
    return WorkerMemory(
        process=GPU_PROCESS_BYTES if on_gpu else process,
        weights=ends + (local if zero else layers),
        working=_borrowed(model, residency, on_gpu)
        + _working(model, work, max(model.pruned[index] for index in span.layers)),
        hidden=hidden,
        activations=_activations(model, work),
        moments=(len(work.calibration) * widths + gathering) * 8 + _grams(model, work),
        masks=trials * pruned // 8 + min(trials, work.solved) * pruned * item,
        logits=logits * span.is_last,
        writing=_writing(model, work, len(span.layers), 0 if zero else layers) * trials,
        host=(process + in_transit + beside) * on_gpu,
        disk=offloaded if residency.offload == "nvme" else 0,
    )


def _disk_buffers(model: ModelSize, residency: ResidencyPlan) -> int:
    buffers = BORROWED * model.packed * model.dtype.itemsize // residency.ranks
    return buffers if residency.offload == "nvme" else 0


def _borrowed(model: ModelSize, residency: ResidencyPlan, on_gpu: bool) -> int:
    """Return the bytes of layers on the device while they are borrowed from ZeRO or handed over to it."""
    if residency.offload is None:
        return 0
    layer = model.packed * model.dtype.itemsize
    if on_gpu:
        return BORROWED * layer
    gathered = BORROWED * layer if residency.ranks > 1 else 0
    loading = BORROWED * layer  # as read from the checkpoint, and packed
    return _disk_buffers(model, residency) + max(gathered, loading)


def _working(model: ModelSize, work: Work, largest_layer: int) -> int:
    """Return the bytes of the largest step on one matrix or layer.

    The steps are: a masked copy of a layer with one mask unpacked; the scores of one matrix, sorted; and, where
    weights are changed, a Hessian with its factors plus the matrix with its errors. Where ranks are combined, the
    best ranks and the scores of the next text exist at once; ranking a whole matrix also takes its keys.
    """
    matrix, item = model.largest_matrix, model.dtype.itemsize
    scoring = 36 if work.sorted_matrix else 10 if item == 4 else 14
    solving = (model.intermediate**2 * 8 * 4 + matrix * 4 * 4) * (work.solved > 0)
    return max(largest_layer * item + 3 * matrix, matrix * scoring, solving)


def _writing(model: ModelSize, work: Work, layers: int, resident: int) -> int:
    """Return the bytes of generating text, per trial; one layer's keys and values are expanded to all heads."""
    if not work.written:
        return 0
    all_heads = 2 * model.hidden * work.micro_batch
    return (layers * model.cached * work.written + all_heads) * model.dtype.itemsize + resident


def _grams(model: ModelSize, work: Work) -> int:
    """Return the bytes of the input Gram matrices of the largest layer, and of those of one micro-batch."""
    if not work.solved:
        return 0
    squares: Counter[str] = Counter()
    for name, width in model.widths.items():
        squares[name.partition(".")[0]] += width**2
    return (max(squares.values()) + 2 * model.intermediate**2) * 8


def _hidden(
    model: ModelSize, shards: int, work: Work, residency: ResidencyPlan, chunks: Chunks, on_gpu: bool
) -> int:
    dense = chunks.size(sum(work.calibration), shards, masked=False)
    masked = chunks.size(work.evaluation, shards, masked=True)
    most = max(dense, masked, work.sequential_tokens, work.written, work.micro_batch)
    tokens = max(most / residency.ranks, work.micro_batch)  # a micro-batch is not split over ranks
    return int(tokens * model.token_bytes * copies_of_hidden(shards, on_gpu))


def copies_of_hidden(shards: int, on_gpu: bool) -> int:
    """Return how often a worker holds hidden states: input and output are shared memory on one machine."""
    return 1 if on_gpu or shards == 1 else 3


def _activations(model: ModelSize, work: Work) -> int:
    """Return the bytes of some [tokens, width] tensors, full attention scores, and squares for the moments."""
    tokens, item = work.micro_batch, model.dtype.itemsize
    attention = model.heads * tokens * work.longest * (item + 4)
    squares = tokens * model.intermediate * 8
    return tokens * (10 * model.hidden + 3 * model.intermediate) * item + attention + squares
