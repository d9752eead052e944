"""Large blocks of memory without page faults, by telling glibc's malloc to keep what is freed.

glibc maps and unmaps a block of its own for every large allocation, and gives freed memory at the top of the heap
back at once. A 512 KiB prompt then costs about 480 page faults in its client and 230 in its server, more than all
else that the call does (3.5 times the CPU time at the client, measured); and LMDB, which mallocs every value, puts
2 MiB values 3.3 times slower (measured). With the thresholds raised the memory of one message serves the next.

They belong to the whole process, so several rooms may ask, and the one that wants to keep most decides.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BLOCK_BYTES = 32 << 20  # larger ones are still mapped; glibc refuses more than 32 MiB
#: What freed messages may leave on the heap, and what LMDB's dirty pages may (the disk's writer gives back when idle).
MESSAGE_BYTES, COMMIT_BYTES = 256 << 20, 64 << 20
_asked_bytes: list[int] = []


def keep_freed(free_bytes: int) -> bool:
    """Keep up to so much at the heap's top; False where there is no glibc, which is fine."""
    libc = _libc("mallopt")
    if libc is None:
        return False
    _asked_bytes[:] = [max(free_bytes, *_asked_bytes)] if _asked_bytes else [free_bytes]
    return bool(
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)
        and libc.mallopt(_M_TRIM_THRESHOLD, _asked_bytes[0])
    )


def give_back() -> None:
    """Give all free memory of the heap back to the system. No-op without glibc."""
    libc = _libc("malloc_trim")
    if libc is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


def _libc(name: str) -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, name) else None
