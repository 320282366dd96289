"""Describes what a job can run on: this machine, or several identical nodes.

The nodes of a Ray cluster are read in `runtime`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

# Dense bf16 FLOP/s from the vendors' data sheets, without sparsity.
GPU_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "L4": 121e12,
    "V100": 125e12,
}
UNKNOWN_GPU_FLOPS = 100e12
HOST_TO_DEVICE = 25e9  # bytes per second: PCIe 4.0 x16, from pinned memory


@dataclass(frozen=True)
class Machine:
    """`nodes` identical machines. Memory is in bytes, rates are per second and device."""

    nodes: int
    gpus: int  # per node; 0: its cores compute
    gpu_memory: int  # per GPU
    host_memory: int  # per node
    host_to_device: float
    flops: float  # per GPU; without GPUs, per node
    disk: int | None = None  # free for offloaded weights, per node; None: unknown
    elastic: bool = False  # an autoscaler launches nodes on demand, at most `nodes`

    @property
    def all_gpus(self) -> int:
        """Return the number of GPUs of all nodes."""
        return self.nodes * self.gpus

    @property
    def device(self) -> torch.device:
        """Return the kind of device that workers use."""
        return torch.device("cuda" if self.gpus else "cpu")


def this_machine() -> Machine:
    """Return what is free on this machine now. The speed of cores is not measured: their `flops` is 0."""
    gpus = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))[: torch.cuda.device_count()]
    if not gpus and torch.cuda.is_available():  # no nvidia-smi: ask torch, which makes a context
        every = range(torch.cuda.device_count())
        gpus = [(torch.cuda.get_device_name(n), torch.cuda.mem_get_info(n)[0]) for n in every]
    return local_machine(gpus)


def local_machine(gpus: Sequence[tuple[str, int]]) -> Machine:
    """Return this machine with the given GPUs: name and free bytes of each."""
    return Machine(
        nodes=1,
        gpus=len(gpus),
        gpu_memory=min((free for _, free in gpus), default=0),
        host_memory=free_host_memory(),
        host_to_device=HOST_TO_DEVICE,
        flops=gpu_flops(gpus[0][0]) if gpus else 0.0,
    )


def replica_share(machine: Machine, replicas: int) -> Machine:
    """Return the share of one of `replicas`: whole nodes if there are enough, otherwise an even part of one."""
    if replicas <= machine.nodes:
        return replace(machine, nodes=machine.nodes // replicas)
    per_node = -(-replicas // machine.nodes)
    return replace(
        machine,
        nodes=1,
        gpus=machine.gpus // per_node,
        host_memory=machine.host_memory // per_node,
        disk=None if machine.disk is None else machine.disk // per_node,
    )


def with_disk(machine: Machine, folder: Path) -> Machine:
    """Return the machine with the free disk space where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return replace(machine, disk=psutil.disk_usage(str(folder)).free)


def visible_gpus(visible: str | None = None) -> list[tuple[str, int]]:
    """Return name and free bytes of each GPU, or of the `visible` ones (as in CUDA_VISIBLE_DEVICES).

    Runs nvidia-smi, because torch would create a context on the GPU.
    """
    if shutil.which("nvidia-smi") is None or visible == "":
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    query += [f"--id={visible}"] if visible else []
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    rows = [line.rpartition(",") for line in lines]
    return [(name.strip(), int(free) * 2**20) for name, _, free in rows if free.strip().isdigit()]


def free_host_memory() -> int:
    """Return the bytes that this process may still allocate: in the machine, or in its control group (v2)."""
    free = int(psutil.virtual_memory().available)
    try:
        name = Path("/proc/self/cgroup").read_text().partition("0::")[2].splitlines()[0]
        group = Path("/sys/fs/cgroup") / name.lstrip("/")
        limit, used = (int((group / f"memory.{kind}").read_text()) for kind in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError, IndexError):  # no such group, or no limit ("max")
        return free
    return min(free, limit - used + int(stat.get("inactive_file", 0)))  # the file cache is reclaimed on demand


def usable_cores() -> int:
    """Return how many physical cores this process may use."""
    cores = psutil.cpu_count(logical=False) or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def gpu_flops(gpu: str) -> float:
    """Return the dense bf16 FLOP/s of a GPU by its name."""
    matches = (flops for name, flops in GPU_FLOPS.items() if re.search(rf"\b{name}\b", gpu))
    return next(matches, UNKNOWN_GPU_FLOPS)


def measure_flops(dtype: torch.dtype) -> float:
    """Measure the FLOP/s of this machine's cores by multiplying matrices for a tenth of a second."""
    width = 1024
    a, b = torch.randn(width, width).to(dtype), torch.randn(width, width).to(dtype)
    a @ b
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        a @ b
        done += 1
    return 2 * width**3 * done / (time.perf_counter() - started)
