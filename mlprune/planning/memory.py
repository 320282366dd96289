"""What a worker holds, by kind, each kind by a formula of its own; tests hold the sum to the peak of real workers.

Sizes are bytes, where not said otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mlprune.data.calibration import MICRO_BATCH_TOKENS, Batch
from mlprune.models.hollow import Span
from mlprune.models.memory import SLACK
from mlprune.models.zero import BORROWED
from mlprune.planning.model_size import ModelSize

# Logits are made for this many tokens at a time: 512 x 256k words x 4 bytes is half a gigabyte.
LOGIT_TOKENS = 512
# hidden states on their way between two shards: as much as fits a modest object store many times over
CHUNK_BYTES = 256 * 2**20
# Chunks a shard of a pass: more keep more shards busy, but each makes the masked layers anew.
DENSE_CHUNKS, MASKED_CHUNKS = 4, 2
# Measured: an interpreter with torch, transformers and Ray; DeepSpeed beside them. Not measured: a CUDA context.
PROCESS_BYTES, DEEPSPEED_BYTES = 400 * 2**20, 90 * 2**20
GPU_PROCESS_BYTES = 2**30


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
    solved: int = 0  # of the variants, those whose weights are changed
    written: int = 0  # tokens of rows that are written at the same time, their prompts included

    @property
    def micro_batch(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(MICRO_BATCH_TOKENS, self.longest)


@dataclass(frozen=True)
class ResidencyPlan:
    """How a shard's weights are held: on the device, or offloaded and partitioned over `ranks`."""

    kind: Literal["resident", "zero"]
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
    writing: int = 0  # keys and values while text is written, and the masked layers that are kept for it
    host: int = 0  # in the machine's memory, where the device is a GPU
    disk: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return int(sum(vars(self).values())) - self.host - self.disk


def worker_memory(
    size: ModelSize,
    span: Span,
    shards: int,
    work: Work,
    residency: ResidencyPlan,
    chunks: Chunks,
    on_gpu: bool,
    trials: int,
) -> WorkerMemory:
    """The memory of one rank of the shard that holds `span`, one of `shards`, with `trials` alive at once."""
    ends = size.ends[0] * span.is_first + size.ends[1] * span.is_last
    if size.tied and span.is_first and span.is_last:
        ends = size.ends[0]
    layers = sum(size.layers[index] for index in span.layers)
    away = layers // residency.ranks if residency.offload else 0
    here = away if residency.offload == "cpu" and not on_gpu else 0  # "offloaded" to where it is used
    item, zero = size.dtype.itemsize, residency.offload is not None
    widths = sum(size.layer_widths[index] for index in span.layers)
    gathering = max(size.layer_widths[index] for index in span.layers)
    pruned = sum(size.pruned[index] for index in span.layers)
    told = min(LOGIT_TOKENS, size.positions or LOGIT_TOKENS, work.evaluation)
    logits = told * size.vocabulary * (8 if item == 4 else item + 8)
    hidden = _hidden(size, shards, work, residency, chunks, on_gpu)
    on_the_way = 2 * hidden if shards > 1 else 0
    beside = away if residency.offload == "cpu" else _disk_buffers(size, residency)
    process = PROCESS_BYTES + DEEPSPEED_BYTES * zero + SLACK
    return WorkerMemory(
        process=GPU_PROCESS_BYTES if on_gpu else process,
        weights=ends + (here if zero else layers),
        working=_borrowed(size, residency, on_gpu)
        + _working(size, work, max(size.pruned[index] for index in span.layers)),
        hidden=hidden,
        activations=_activations(size, work),
        moments=(len(work.calibration) * widths + gathering) * 8 + _grams(size, work),
        masks=trials * pruned // 8 + min(trials, work.solved) * pruned * item,
        logits=logits * span.is_last,
        writing=_writing(size, work, len(span.layers), 0 if zero else layers) * trials,
        host=(process + on_the_way + beside) * on_gpu,
        disk=away if residency.offload == "nvme" else 0,
    )


def _disk_buffers(size: ModelSize, residency: ResidencyPlan) -> int:
    buffers = BORROWED * size.packed * size.dtype.itemsize // residency.ranks
    return buffers if residency.offload == "nvme" else 0


def _borrowed(size: ModelSize, residency: ResidencyPlan, on_gpu: bool) -> int:
    """Layers that are here because they are borrowed, or while they are handed over."""
    if residency.offload is None:
        return 0
    layer = size.packed * size.dtype.itemsize
    if on_gpu:
        return BORROWED * layer
    gathered = BORROWED * layer if residency.ranks > 1 else 0
    return _disk_buffers(size, residency) + max(gathered, BORROWED * layer)  # read from the checkpoint, and packed


def _working(size: ModelSize, work: Work, largest_layer: int) -> int:
    """A masked copy of a layer with one mask unpacked; or the scores of one matrix, and what sorts them.

    Or, where weights are changed, a Hessian with its factors, and the matrix with its errors.
    """
    matrix, item = size.largest_matrix, size.dtype.itemsize
    solving = (size.intermediate**2 * 8 * 4 + matrix * 4 * 4) * (work.solved > 0)
    return max(largest_layer * item + 3 * matrix, matrix * (10 if item == 4 else 14), solving)


def _writing(size: ModelSize, work: Work, layers: int, resident: int) -> int:
    """Of one trial; and as it works a layer's keys and values once more, for all its heads."""
    if not work.written:
        return 0
    all_heads = 2 * size.hidden * work.micro_batch
    return (layers * size.kept * work.written + all_heads) * size.dtype.itemsize + resident


def _grams(size: ModelSize, work: Work) -> int:
    """Products of channels at the inputs of the largest layer's matrices, and those of one micro-batch."""
    if not work.solved:
        return 0
    squares: Counter[str] = Counter()
    for name, width in size.widths.items():
        squares[name.partition(".")[0]] += width**2
    return (max(squares.values()) + 2 * size.intermediate**2) * 8


def _hidden(
    size: ModelSize, shards: int, work: Work, residency: ResidencyPlan, chunks: Chunks, on_gpu: bool
) -> int:
    dense = chunks.size(sum(work.calibration), shards, masked=False)
    masked = chunks.size(work.evaluation, shards, masked=True)
    most = max(dense, masked, work.sequential_tokens, work.written, work.micro_batch)
    tokens = max(most / residency.ranks, work.micro_batch)  # a micro-batch is not shared out
    return int(tokens * size.token_bytes * copies_of_hidden(shards, on_gpu))


def copies_of_hidden(shards: int, on_gpu: bool) -> int:
    """Of hidden states, in a worker's memory: what came in and what goes out are shared memory on one machine."""
    return 1 if on_gpu or shards == 1 else 3


def _activations(size: ModelSize, work: Work) -> int:
    """Some [tokens, width] tensors, attention scores where they are made whole, squares for the moments."""
    tokens, item = work.micro_batch, size.dtype.itemsize
    attention = size.heads * tokens * work.longest * (item + 4)
    squares = tokens * size.intermediate * 8
    return tokens * (10 * size.hidden + 3 * size.intermediate) * item + attention + squares
