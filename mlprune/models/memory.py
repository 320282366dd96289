"""Measures the memory of this process and returns freed memory to the system. GPU memory is not covered."""

import ctypes
import functools
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

SLACK = 64 * 2**20  # bytes by which the process may grow before its heap is trimmed


class Heap:
    """Lets the C library return freed memory that lies between used blocks, from time to time.

    A pass allocates and frees tensors of a hundred sizes, and leaves a heap half as large again as its content.
    Trimming after each layer would cost more than it saves, because every page comes back with a page fault.
    """

    def __init__(self) -> None:
        self._before = resident_bytes()

    def trim(self) -> None:
        """Return freed memory if the process has grown by more than SLACK. To be called between layers."""
        if resident_bytes() - self._before > SLACK:
            _malloc_trim()(0)
            self._before = resident_bytes()


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # the C library is not glibc and has no such function
        return lambda _: 0
    return trim


def resident_bytes() -> int:
    """Return the bytes that this process holds in memory now; 0 where the system does not report them."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """Return the most bytes that this process has held in memory."""
    status = Path("/proc/self/status")
    if status.exists():  # the peak of getrusage may be that of the process that started this one: exec keeps it
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
