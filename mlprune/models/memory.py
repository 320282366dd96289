"""The memory of this process."""

import ctypes
import functools
from collections.abc import Callable


def give_back_freed_memory() -> None:
    """Have the C library return what was freed but lies between blocks that are in use.

    A pass frees and takes tensors of a hundred sizes, and leaves the heap a third larger than what is in it.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # not glibc: its allocator does as it does
        return lambda _: 0
    return trim
