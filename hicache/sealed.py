"""Host memory that other processes may map and read, and only we can write: a memfd, mapped, then sealed.

SHRINK and GROW make the mapping safe from SIGBUS; FUTURE_WRITE refuses new writable mappings and ``write()``. It also
refuses hole punching, so such memory is given back by closing it. Sandboxed and old kernels do not know FUTURE_WRITE
(EINVAL): there others are given a descriptor that was opened again for reading only, which a process of our own user
could get round; checksums tell then.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os

_log = logging.getLogger(__name__)

#: <linux/fcntl.h>; Python names it from 3.13 on.
F_SEAL_FUTURE_WRITE = 0x0010
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_warned: list[OSError] = []


class SealedMemory:
    """A memfd, all zeros, and our writable mapping of it, which lives as long as anything views ``mapped``.

    ``fd``: what others are given; ours to close. Raises OSError without a descriptor or memory for it.
    """

    __slots__ = ("fd", "mapped", "size_bytes")

    def __init__(self, name: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size_bytes)
            self.mapped = mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._seal()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor; our mapping goes with the last view of it, others' with them. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _seal(self) -> None:
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SIZE_SEALS | F_SEAL_FUTURE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if not _warned:
                _warned.append(error)
                _log.warning(
                    "this kernel has no F_SEAL_FUTURE_WRITE: shared memory is opened for reading only"
                )
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
            reading = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
            os.close(self.fd)
            self.fd = reading
