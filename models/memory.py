"""glibc's allocator, told to keep what large tensors leave behind.

Otherwise it gives every large tensor's memory back to the kernel at once, and takes and zeroes it again at the next
step; on a CPU that can cost as much as the arithmetic. The Makefile says the same by GLIBC_TUNABLES.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory for the rest of the process; return whether the allocator took it.

    False where the C library is not glibc, or GLIBC_TUNABLES says something already.
    """
    if not sys.platform.startswith("linux") or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER)))
