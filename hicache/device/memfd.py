"""Host memory that other processes may map and read, and only we can write."""

from __future__ import annotations

import fcntl
import mmap
import os

#: <linux/fcntl.h>; Python names it from 3.13 on.
F_SEAL_FUTURE_WRITE = 0x0010
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class SealedMemory:
    """A memfd, all zeros, and our writable mapping of it, made before it was sealed. Raises OSError."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = os.memfd_create("hicache-device", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size_bytes)
            self.mapped = mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Close the descriptor; our mapping goes with the last view of it, others' with them."""
        os.close(self.fd)
        self.fd = -1
