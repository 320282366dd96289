"""DeepSpeed ZeRO-Inference: a shard's weights partitioned over its ranks and kept in host memory or on a disk.

A layer is one ZeRO parameter: its weights packed into one flat tensor, so that bringing it is one copy, one read
or one gather, and the disk's buffers are exactly two layers. While a layer works the next one is on its way (on a
GPU on a stream of its own, from pinned memory; from a disk by DeepSpeed's own threads). There is no engine: a
DeepSpeed engine fetches once a micro-batch, and looks ahead only from its second pass on.

The only door to DeepSpeed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from mlprune.errors import SpecError
from mlprune.models.memory import Heap
from mlprune.models.residency import Ranks, Residency

ALIGNMENT = 64  # bytes: each weight begins where a vector load would have it
LEAST_ON_DISK = 2**20  # bytes: DeepSpeed keeps in memory, silently, what is smaller
BORROWED = 2  # layers in memory at once: the one that works, and the next


@dataclass(frozen=True)
class Offload:
    """Where a shard's weights wait while they are not borrowed."""

    place: Literal["cpu", "nvme"]
    folder: Path  # on a disk of each worker's machine, for nvme
    layer_elements: int  # of the largest layer, packed


@dataclass(frozen=True)
class Layout:
    """How a layer's parameters of one dtype lie in a flat tensor of `elements`."""

    slots: Mapping[str, tuple[int, torch.Size]]  # parameter -> where it begins, and its shape
    elements: int

    @classmethod
    def of(cls, layer: nn.Module, dtype: torch.dtype) -> Layout:
        """What has another dtype (a norm that the family keeps in float32, say) is small, and is left out."""
        slots, end, step = {}, 0, ALIGNMENT // dtype.itemsize
        for name, parameter in layer.named_parameters():
            if parameter.dtype == dtype:
                slots[name] = end, parameter.shape
                end += -(-parameter.numel() // step) * step
        return cls(slots, end)

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, (start, shape) in self.slots.items():
            yield name, flat[start : start + shape.numel()].view(shape)


class Zero(Residency):
    """Layers whose weights are away until borrowed. All ranks borrow the same layers, in the same order."""

    def __init__(
        self,
        layers: Iterable[tuple[int, nn.Module]],
        dtype: torch.dtype,
        device: torch.device,
        offload: Offload,
        ranks: Ranks,
    ) -> None:
        """Take the `layers` one at a time, so that no more than one is ever whole in memory."""
        self._device, self._ranks, self._dtype = device, ranks, dtype
        self._heap = Heap()
        self._deepspeed = _deepspeed(device)
        _meet(ranks, device)
        self._folder = _Folder(offload.folder) if offload.place == "nvme" else None
        self._config = self._configuration(offload)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._layers: dict[int, nn.Module] = {}
        self._layouts: dict[int, Layout] = {}
        self._flats: dict[int, Any] = {}
        self._coming: tuple[int, Any] | None = None  # the layer that was sent for, and DeepSpeed's handle
        self.fetches: Counter[int] = Counter()  # how often each layer was brought
        try:
            for index, layer in layers:
                self._hand_over(index, layer)
        except BaseException:
            self.close()
            raise

    def _configuration(self, offload: Offload) -> dict[str, Any]:
        away: dict[str, Any] = {"device": offload.place, "pin_memory": self._device.type == "cuda"}
        if self._folder is not None:
            size = self._padded(offload.layer_elements) // self._ranks.size
            away |= {"nvme_path": str(self._folder.path), "buffer_count": BORROWED, "buffer_size": size}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": self._dtype == torch.bfloat16},
            "fp16": {"enabled": self._dtype == torch.float16},
            # the memory-efficient form replaces torch's linear, for the whole process
            "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "offload_param": away},
        }

    def _padded(self, elements: int) -> int:
        """Divisible by the ranks, and for a disk never so small that DeepSpeed would not put it there."""
        if self._folder is not None:
            elements = max(elements, LEAST_ON_DISK // self._dtype.itemsize * self._ranks.size)
        return -(-elements // self._ranks.size) * self._ranks.size

    def _hand_over(self, index: int, layer: nn.Module) -> None:
        """Pack the layer's weights, and give them to DeepSpeed, which partitions and sends them away."""
        layout = Layout.of(layer, self._dtype)
        packed = torch.zeros(self._padded(layout.elements), dtype=self._dtype)
        for name, view in layout.views(packed):
            view.copy_(layer.get_parameter(name))
        self._empty(layer, layout)
        flat: Any = nn.Parameter(packed, requires_grad=False)
        if self._flats:
            next(iter(self._flats.values())).convert_to_zero_parameters(param_list=[flat])
        else:
            holder = nn.ParameterList([flat])
            self._deepspeed.zero.Init(module=holder, config_dict_or_path=self._config)
        self._layers[index], self._layouts[index], self._flats[index] = layer.to(self._device), layout, flat
        self._heap.trim()

    def _empty(self, layer: nn.Module, layout: Layout) -> None:
        for name in layout.slots:
            layer.get_parameter(name).data = torch.empty(0, dtype=self._dtype, device=self._device)

    @contextmanager
    def borrow(self, index: int, prefetch: int | None = None) -> Iterator[nn.Module]:
        layer, layout, flat = self._layers[index], self._layouts[index], self._flats[index]
        self._bring(index)
        try:
            if prefetch is not None:
                self._send_for(prefetch)
            for name, view in layout.views(flat.data):
                layer.get_parameter(name).data = view
            yield layer
        finally:
            self._empty(layer, layout)
            flat.partition(param_list=[flat], has_been_updated=False)
            self._heap.trim()

    def _send_for(self, index: int) -> None:
        """Begin to bring a layer; `_bring` waits for it."""
        flat = self._flats[index]
        self.fetches[index] += 1
        if flat.nvme_swapper is not None:
            flat.nvme_swapper.swap_in([flat], async_op=True)
            self._coming = index, None  # what was read is gathered when it is there
            return
        with self._aside():
            self._coming = index, flat.all_gather_coalesced([flat])

    def _bring(self, index: int) -> None:
        """Have the layer's weights on the device."""
        if self._coming is not None and self._coming[0] != index:
            self._turn_back()
        if self._coming is None:
            self._send_for(index)
        assert self._coming is not None
        flat, handle = self._flats[index], self._coming[1]
        self._coming = None
        with self._aside():
            (handle or flat.all_gather_coalesced([flat])).wait()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _turn_back(self) -> None:
        """What was sent for and is not wanted (a pass broke off) goes back."""
        assert self._coming is not None
        wrong = self._coming[0]
        self._bring(wrong)
        self._flats[wrong].partition(param_list=[self._flats[wrong]], has_been_updated=False)

    def _aside(self) -> AbstractContextManager[Any]:
        """On the stream of fetches, where there is one."""
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if self._ranks.size > 1:
            dist.all_reduce(values)
        return values

    def close(self) -> None:
        if self._coming is not None:
            self._turn_back()
        self._layers.clear()
        self._flats.clear()
        if self._folder is not None:
            self._folder.close()


class _Folder:
    """A folder of one process's own; one that a killed process left is removed by the next that comes."""

    def __init__(self, root: Path) -> None:
        root = root / "mlprune-offload"  # what was left in it is removed, so it holds nobody else's
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root, wait=True):  # nobody takes a folder that is new for one that was left
            for left in root.glob("shard-*"):
                with contextlib.suppress(BlockingIOError, FileNotFoundError):  # its process lives, or just went
                    _lock(left).close()
                    shutil.rmtree(left, ignore_errors=True)
            self.path = Path(tempfile.mkdtemp(prefix="shard-", dir=root))
            self._held = _lock(self.path)

    def close(self) -> None:
        self._held.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _lock(folder: Path, wait: bool = False) -> IO[str]:
    """Held until it is closed, or its process ends, however it ends."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    return file


def _deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import sets it
    # an operator that only all-reduce between CPUs would use, and half a minute of compilation
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def open_rendezvous(host: str, size: int) -> tuple[Any, str]:
    """Where the ranks of a shard meet: a store, to be kept alive by who made it, and its address."""
    listening = socket.create_server((host, 0))  # given none, the store listens on every interface
    port = listening.getsockname()[1]
    store = TCPStore(host, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    return store, f"{host}:{port}"


def _meet(ranks: Ranks, device: torch.device) -> None:
    """Make this process a rank of its group, once; DeepSpeed takes the group that is there."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)  # the ranks are on one node
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.size), LOCAL_RANK="0")
    if not dist.is_initialized():
        store: Any = HashStore()
        if ranks.size > 1:
            host, _, port = ranks.address.rpartition(":")
            store = TCPStore(host, int(port), ranks.size, is_master=False)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size)
    assert dist.get_world_size() == ranks.size, "this process is a rank of another group"
    _deepspeed(device).init_distributed(verbose=False)


def compile_disk_access(device: torch.device) -> None:
    """Compile what reads and writes the disk, once a machine (minutes); before workers do it at the same time."""
    disk_access_builder(device).load(verbose=False)


def disk_access_builder(device: torch.device) -> Any:
    """DeepSpeed's builder of what reads and writes a disk. Raises SpecError where it cannot be compiled."""
    _deepspeed(device)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        remedy = "needs libaio's headers and a C++ compiler: apt install libaio-dev g++, or take cpu"
        raise SpecError("pipeline.offload", "nvme", remedy)
    return builder
