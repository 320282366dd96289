"""The memory of this process."""

import ctypes
import functools
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

SLACK = 64 * 2**20  # bytes that the heap may keep, freed, between two layers


class Heap:
    """Has the C library return what was freed but lies between blocks that are in use, now and then.

    A pass frees and takes tensors of a hundred sizes, and leaves a heap larger by half than what is in it. To
    return everything after each layer would cost more than it brings: every page comes back as a fault.
    """

    def __init__(self) -> None:
        self._before = memory_held()

    def trim(self) -> None:
        """Call between layers: returns what was freed, if the process has grown by more than SLACK."""
        if memory_held() - self._before > SLACK:
            _malloc_trim()(0)
            self._before = memory_held()


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # not glibc: its allocator does as it does
        return lambda _: 0
    return trim


def memory_held() -> int:
    """Bytes that this process holds in memory now; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """The most bytes that this process has held in memory."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell of the process that this one was started from, if that was larger
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
