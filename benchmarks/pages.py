"""Memory that a process keeps: what the C library gives back to the system must be got again, page by page.

glibc gives freed blocks of over 32 MiB back at once, and smaller ones as soon as they add up. Getting them again costs
a system call, and a fault for each page: on some machines more than the computing itself, by turns more and less.
Timings of memory-bound kernels are therefore taken twice: as the library has it, and with all memory kept, as pooling
allocators do.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, from now on; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 1 << 26))
    )
