"""Large messages without page faults.

glibc maps and unmaps a block of its own for every large allocation, and gives freed memory at the top of the heap
back at once: a 512 KiB prompt then costs about 480 page faults in its client and 230 in its server, more than all
else that the call does (3.5 times the CPU time at the client, measured). With the thresholds raised the memory of
one message serves the next.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BLOCK_BYTES = 32 << 20  # larger ones are still mapped; glibc refuses more than 32 MiB
_KEPT_FREE_BYTES = 256 << 20


def keep_message_memory() -> bool:
    """Raise the thresholds of this whole process; False where there is no glibc, which is fine."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)
        and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
    )
