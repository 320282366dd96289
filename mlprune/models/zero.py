"""DeepSpeed ZeRO-Inference: a shard's weights are partitioned over its ranks and kept in host memory or on a disk.

A layer is one ZeRO parameter: its weights are packed into one flat tensor. So a fetch is one copy, one read or one
gather, and the disk buffers hold exactly two layers. While one layer works, the next is prefetched: on a GPU on a
stream of its own, from pinned memory; from a disk by DeepSpeed's own threads. No DeepSpeed engine is used,
because an engine fetches once per micro-batch and prefetches only from its second pass on.

This is the only module that imports DeepSpeed. The residency without ZeRO is in `residency`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from mlprune.errors import SpecError
from mlprune.models.memory import Heap
from mlprune.models.offload_folder import OffloadFolder
from mlprune.models.residency import Ranks, Residency

ALIGNMENT = 64  # bytes: each weight begins at an address that suits vector loads
LEAST_ON_DISK = 2**20  # bytes: DeepSpeed silently keeps smaller partitions in memory
BORROWED = 2  # layers in memory at once: the one that works, and the next

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offload:
    """Where a shard's weights are kept while they are not borrowed."""

    target: Literal["cpu", "nvme"]
    folder: Path  # on a disk of each worker's machine, for nvme
    layer_elements: int  # packed size of the largest layer


@dataclass(frozen=True)
class Layout:
    """The positions of a layer's parameters of one dtype in a flat tensor of `elements`."""

    slots: Mapping[str, tuple[int, torch.Size]]  # parameter -> its start and its shape
    elements: int

    @classmethod
    def of(cls, layer: nn.Module, dtype: torch.dtype) -> Layout:
        """Lay out the layer. Parameters of another dtype (e.g. a norm kept in float32) are small and left out."""
        slots, end, step = {}, 0, ALIGNMENT // dtype.itemsize
        for name, parameter in layer.named_parameters():
            if parameter.dtype == dtype:
                slots[name] = end, parameter.shape
                end += -(-parameter.numel() // step) * step
        return cls(slots, end)

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and its view of the flat tensor."""
        for name, (start, shape) in self.slots.items():
            yield name, flat[start : start + shape.numel()].view(shape)


class _Handle(Protocol):
    """A gather that DeepSpeed has started."""

    def wait(self) -> object: ...


class _Swapper(Protocol):
    """DeepSpeed's reader of parameters from a disk."""

    def swap_in(self, params: Sequence[_ZeroParameter], *, async_op: bool) -> object: ...


class _ZeroParameter(Protocol):
    """What DeepSpeed makes of a parameter that it partitions."""

    data: Tensor
    nvme_swapper: _Swapper | None

    def numel(self) -> int: ...
    def convert_to_zero_parameters(self, param_list: Sequence[_ZeroParameter]) -> object: ...
    def all_gather_coalesced(self, params: Sequence[_ZeroParameter]) -> _Handle: ...
    def partition(self, *, param_list: Sequence[_ZeroParameter], has_been_updated: bool) -> object: ...


@dataclass(frozen=True)
class _Prefetch:
    """A layer that is being fetched. A read from a disk has no handle: it is gathered when it is complete."""

    index: int
    handle: _Handle | None


class Zero(Residency):
    """Layers whose weights are offloaded until borrowed. All ranks borrow the same layers in the same order."""

    def __init__(
        self,
        layers: Iterable[tuple[int, nn.Module]],
        dtype: torch.dtype,
        device: torch.device,
        offload: Offload,
        ranks: Ranks,
    ) -> None:
        """Take the `layers` one at a time, so that at most one of them is complete in memory."""
        self._device, self._ranks, self._dtype = device, ranks, dtype
        self._heap = Heap()
        self._deepspeed = _deepspeed(device)
        _join_ranks(ranks, device)
        self._folder = OffloadFolder(offload.folder) if offload.target == "nvme" else None
        self._config = self._configuration(offload)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._layers: dict[int, nn.Module] = {}
        self._layouts: dict[int, Layout] = {}
        self._flats: dict[int, _ZeroParameter] = {}
        self._prefetched: _Prefetch | None = None
        self.fetches: Counter[int] = Counter()  # how often each layer was fetched
        try:
            for index, layer in layers:
                self._offload(index, layer)
        except BaseException:
            self.close()
            raise

    def _configuration(self, offload: Offload) -> dict[str, object]:
        target: dict[str, object] = {"device": offload.target, "pin_memory": self._device.type == "cuda"}
        if self._folder is not None:
            size = self._padded(offload.layer_elements) // self._ranks.size
            target |= {"nvme_path": str(self._folder.path), "buffer_count": BORROWED, "buffer_size": size}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": self._dtype == torch.bfloat16},
            "fp16": {"enabled": self._dtype == torch.float16},
            # the memory-efficient form replaces torch's linear in the whole process
            "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "offload_param": target},
        }

    def _padded(self, elements: int) -> int:
        """Round up to a multiple of the ranks, and for a disk to the size from which DeepSpeed uses the disk."""
        if self._folder is not None:
            elements = max(elements, LEAST_ON_DISK // self._dtype.itemsize * self._ranks.size)
        return -(-elements // self._ranks.size) * self._ranks.size

    def _offload(self, index: int, layer: nn.Module) -> None:
        """Pack the layer's weights and pass them to DeepSpeed, which partitions and offloads them."""
        layout = Layout.of(layer, self._dtype)
        packed = torch.zeros(self._padded(layout.elements), dtype=self._dtype)
        for name, view in layout.views(packed):
            view.copy_(layer.get_parameter(name))
        self._empty(layer, layout)
        parameter = nn.Parameter(packed, requires_grad=False)
        flat = cast(_ZeroParameter, parameter)
        if self._flats:
            next(iter(self._flats.values())).convert_to_zero_parameters(param_list=[flat])
        else:
            holder = nn.ParameterList([parameter])
            self._deepspeed.zero.Init(module=holder, config_dict_or_path=self._config)
        self._layers[index], self._layouts[index], self._flats[index] = layer.to(self._device), layout, flat
        self._heap.trim()

    def _empty(self, layer: nn.Module, layout: Layout) -> None:
        for name in layout.slots:
            layer.get_parameter(name).data = torch.empty(0, dtype=self._dtype, device=self._device)

    @contextmanager
    def borrow(self, index: int, prefetch: int | None = None) -> Iterator[nn.Module]:
        layer, layout, flat = self._layers[index], self._layouts[index], self._flats[index]
        self._fetch(index)
        try:
            if prefetch is not None:
                self._start_prefetch(prefetch)
            for name, view in layout.views(flat.data):
                layer.get_parameter(name).data = view
            yield layer
        finally:
            self._empty(layer, layout)
            flat.partition(param_list=[flat], has_been_updated=False)
            self._heap.trim()

    def _start_prefetch(self, index: int) -> None:
        """Start to fetch a layer. `_fetch` waits for it."""
        flat = self._flats[index]
        self.fetches[index] += 1
        if flat.nvme_swapper is not None:
            flat.nvme_swapper.swap_in([flat], async_op=True)
            self._prefetched = _Prefetch(index, None)
            return
        with self._on_fetch_stream():
            self._prefetched = _Prefetch(index, flat.all_gather_coalesced([flat]))

    def _fetch(self, index: int) -> None:
        """Return when the layer's weights are on the device."""
        if self._prefetched is not None and self._prefetched.index != index:
            self._cancel_prefetch(self._prefetched.index)
        if self._prefetched is None:
            self._start_prefetch(index)
        assert self._prefetched is not None
        flat, handle = self._flats[index], self._prefetched.handle
        self._prefetched = None
        with self._on_fetch_stream():
            (handle or flat.all_gather_coalesced([flat])).wait()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _cancel_prefetch(self, index: int) -> None:
        """Offload the prefetched layer again: it is not needed, because a pass was interrupted."""
        logger.debug("layer %d was prefetched and is not needed", index)
        self._fetch(index)
        self._flats[index].partition(param_list=[self._flats[index]], has_been_updated=False)

    def _on_fetch_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if self._ranks.size > 1:
            dist.all_reduce(values)
        return values

    def close(self) -> None:
        if self._prefetched is not None:
            self._cancel_prefetch(self._prefetched.index)
        self._layers.clear()
        self._flats.clear()
        if self._folder is not None:
            self._folder.close()


def _deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed, quietly and for the device's kind of accelerator."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the import resets the level
    # only an all-reduce between CPUs would use this operator, and compiling it takes half a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module


def open_rendezvous(host: str, size: int) -> tuple[TCPStore, str]:
    """Open the store through which a shard's ranks find each other. Return it and its address.

    The store lives as long as the returned object.
    """
    listening = socket.create_server((host, 0))  # without a socket, the store would listen on every interface
    port = listening.getsockname()[1]
    store = TCPStore(host, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    return store, f"{host}:{port}"


def _join_ranks(ranks: Ranks, device: torch.device) -> None:
    """Make this process a rank of its group, once per process; DeepSpeed then uses the existing group."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)  # the ranks are on one node
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.size), LOCAL_RANK="0")
    if not dist.is_initialized():
        store: Store = HashStore()
        if ranks.size > 1:
            host, _, port = ranks.address.rpartition(":")
            store = TCPStore(host, int(port), ranks.size, is_master=False)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size)
    assert dist.get_world_size() == ranks.size, "this process is a rank of another group"
    _deepspeed(device).init_distributed(verbose=False)


def check_disk_access(device: torch.device) -> None:
    """Check that DeepSpeed's disk access can be compiled. Raises SpecError if it cannot."""
    _disk_access_builder(device)


def compile_disk_access(device: torch.device) -> None:
    """Compile DeepSpeed's disk access, which takes minutes and is needed once per machine.

    It is compiled before the workers start, so that they do not all compile it at the same time.
    """
    _disk_access_builder(device).load(verbose=False)


class _Builder(Protocol):
    """DeepSpeed's builder of a compiled operator."""

    def load(self, verbose: bool) -> object: ...


def _disk_access_builder(device: torch.device) -> _Builder:
    _deepspeed(device)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        remedy = "needs libaio's headers and a C++ compiler: apt install libaio-dev g++, or choose cpu"
        raise SpecError("pipeline.offload", "nvme", remedy)
    return cast(_Builder, builder)
